"""Signals that end a run where it can go on later."""

from __future__ import annotations

import signal
import time
from types import FrameType

STAND_INS = {signal.SIGINT: signal.SIGUSR1, signal.SIGTERM: signal.SIGUSR2}  # under mpirun


def heed_stand_ins() -> None:
    """mpirun keeps SIGINT and SIGTERM to itself, and passes others on: those are taken for these."""
    for number, stand_in in STAND_INS.items():
        signal.signal(stand_in, lambda *_, number=number: signal.raise_signal(number))


class Stopped(Exception):  # noqa: N818 - a wish, not an error
    """SIGTERM or Ctrl-C came, and the run stands where it can go on."""

    def __init__(self, number: int):
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.exit_status = 128 + number


class StopSignals:
    """Inside, SIGTERM and SIGINT are noted, for the loop to see; a second one ends the process at once. What comes
    within a second is the same one: Ctrl-C reaches a rank from the terminal, and again from its launcher."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._time = number, time.monotonic()
        elif time.monotonic() > self._time + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __exit__(self, error_type: type | None, error: BaseException | None, _) -> None:
        """Where a collective failed, as other ranks have died or were ended by the same signal, it is heeded now."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received and isinstance(error, RuntimeError):
            signal.raise_signal(self.received)
