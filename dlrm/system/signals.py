"""Signals that end a run at a point from which it can be resumed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType, TracebackType

STAND_INS = {signal.SIGINT: signal.SIGUSR1, signal.SIGTERM: signal.SIGUSR2}  # what mpirun forwards in their place

ANNOUNCEMENT = "dlrm_s_pytorch.py: stopping after this iteration; a second Ctrl-C stops at once\n"


def heed_stand_ins() -> None:
    """Makes SIGUSR1 act as SIGINT, and SIGUSR2 as SIGTERM.

    mpirun does not forward SIGINT and SIGTERM to its ranks, but does forward SIGUSR1 and SIGUSR2.
    """
    for number, stand_in in STAND_INS.items():
        signal.signal(stand_in, lambda *_, number=number: signal.raise_signal(number))


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """Ends a run after SIGTERM or Ctrl-C, at a point from which it can be resumed."""

    def __init__(self, number: int):
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.exit_status = 128 + number


class StopSignals:
    """Delays the effect of SIGINT and SIGTERM during its `with` block.

    `received` is the number of the first of these signals, or 0 if none has come; the training loop reads it between
    steps. A second signal ends the process at once. A signal within one second of the first one does not count as a
    second one, because Ctrl-C reaches a rank twice: from the terminal and from the launcher.

    With `announces`, SIGINT prints a line on stderr at once, because the iteration that has to end may take long.
    """

    def __init__(self, announces: bool = True):
        self.received, self._announces = 0, announces

    def __enter__(self) -> StopSignals:
        stop_signals = (signal.SIGINT, signal.SIGTERM)
        self._previous_handlers = {number: signal.signal(number, self._receive) for number in stop_signals}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._time_received = number, time.monotonic()
            if self._announces and number == signal.SIGINT:
                with contextlib.suppress(OSError):
                    os.write(2, ANNOUNCEMENT.encode())  # a handler that interrupts `print` must not print
        elif time.monotonic() > self._time_received + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restores the previous handlers, and lets a received signal take effect if the block ended in a RuntimeError.

        A collective raises a RuntimeError when other ranks have died, possibly of the same signal.
        """
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if self.received and isinstance(error, RuntimeError):
            signal.raise_signal(self.received)
