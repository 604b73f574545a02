"""Ends a rank that waits for longer than `--dist-timeout`, wherever it waits.

gloo and nccl end a collective that takes too long. hccl does not: `wait` ignores its timeout, `abort` is not
implemented (process_group_eager_hccl.cpp of the Gaudi plugin's 1.19 source), and as `wait` only queues, the host hangs
later, in whatever waits for the device next. So a thread looks at how long the others have been at it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

ROOT = Path(__file__).resolve().parents[2]


class Watchdog:
    """Calls `end` with a line of text when a thread has been in a `watch` block for longer than `timeout` seconds.

    Some calls of the Gaudi plugin keep Python's global lock while they wait (`synchronize_device` in its bindings.cpp),
    so that no other thread of Python can run. If this one cannot for `timeout` seconds, faulthandler, which needs no
    lock, writes the stack of all threads to stderr and ends the process with status 1.
    """

    def __init__(self, rank: int, timeout: float, end: Callable[[str], None]):
        self._rank, self._timeout, self._end = rank, timeout, end
        self._numbers, self._lock, self._stopped = itertools.count(), threading.Lock(), threading.Event()
        self._watched: dict[int, tuple[float, str, int]] = {}  # number of a block -> its start, its name, its thread
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    @contextlib.contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Lets this thread be in the block for `timeout` seconds. `what` names the block for the user."""
        number = next(self._numbers)
        with self._lock:
            self._watched[number] = time.monotonic(), what, threading.get_ident()
        try:
            yield
        finally:
            with self._lock:
                del self._watched[number]

    def _run(self) -> None:
        while not self._stopped.wait(min(1, self._timeout / 4)):
            faulthandler.dump_traceback_later(self._timeout, exit=True, file=sys.__stderr__)
            with self._lock:
                start, what, thread = min(self._watched.values(), default=(time.monotonic(), "", 0))
            if time.monotonic() - start > self._timeout:
                place = place_of(sys._current_frames().get(thread))
                self._end(f"rank {self._rank}: {what} takes longer than {self._timeout:g} s, {place}, so the run ends")
        faulthandler.cancel_dump_traceback_later()


def place_of(frame: FrameType | None) -> str:
    """Returns the innermost place in this program's own files from which `frame` was called, as a text."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "dlrm") or path.parent == ROOT:
            return f"in {frame.f_code.co_name} ({path.relative_to(ROOT)}, line {frame.f_lineno})"
        frame = frame.f_back
    return "at an unknown place"
