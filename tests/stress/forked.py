"""Runs of the programs in processes that are forked from this one, which has imported torch: hundreds take minutes."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dlrm.system.endings import mend_streams

Main = Callable[[Sequence[str]], int]


class Ended(NamedTuple):
    """A run that has ended."""

    status: int  # exit status, or the negative number of the signal that ended it
    out: str
    err: str

    @property
    def fault(self) -> str:
        """What is wrong with the way in which it ended, or an empty text."""
        if self.status not in (0, 1, 2):
            return f"status {self.status}"
        if "Traceback" in self.out + self.err or "dlrm-traceback" in self.err:
            return "a traceback"
        if self.status and len(re.findall(r": error: ", self.err)) != 1:
            return "not one line that says why"
        return ""


class Forked:
    """A run of `main(argv)` in a process of its own, which leads a process group."""

    def __init__(
        self, main: Main, argv: Sequence[str], environment: Mapping[str, str] | None = None, largest_file: int = 0
    ):
        """No file of the process can grow beyond `largest_file` bytes, unless that is 0."""
        sys.stdout.flush()
        pipes = [os.pipe(), os.pipe()]
        self.pid = os.fork()
        if not self.pid:
            self._be_child(main, argv, environment or {}, largest_file, [write for _, write in pipes])
        self._streams = [read for read, _ in pipes]
        for _, write in pipes:
            os.close(write)

    @staticmethod
    def _be_child(main: Main, argv: Sequence[str], environment: Mapping, largest_file: int, streams: list[int]) -> None:
        status = 70
        try:
            os.setsid()
            os.environ.update(environment)
            for descriptor, stream in enumerate(streams, start=1):
                os.dup2(stream, descriptor)
            sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)  # the old one may stand for a file
            sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, closefd=False)
            mend_streams()  # as a program does when it is imported
            if largest_file:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = main(list(argv))
        except SystemExit as end:  # of argparse
            status = end.code
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 71)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 120) -> Ended:
        """Returns how the run has ended. A run that takes longer is killed, which counts as status -9."""
        chunks: dict[int, bytes] = dict.fromkeys(self._streams, b"")
        ending = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for stream in self._streams:
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(timeout=1):
                    if chunk := os.read(key.fd, 2**16):
                        chunks[key.fd] += chunk
                    else:
                        selector.unregister(key.fd)
                if time.monotonic() > ending:
                    self.kill()
        for stream in self._streams:
            os.close(stream)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ended(status, *(chunk.decode(errors="replace") for chunk in chunks.values()))


def run(main: Main, argv: Sequence[str], **settings) -> Ended:
    """Returns how a run of `main(argv)` has ended."""
    return Forked(main, argv, **settings).wait()


class Tally:
    """Counts cases, and prints those in which something was wrong."""

    def __init__(self):
        self.cases, self.faults = 0, 0

    def note(self, case: str, fault: str) -> None:
        self.cases += 1
        if fault:
            self.faults += 1
            print(f"FAULT {case}: {fault}", flush=True)

    def __str__(self) -> str:
        return f"{self.cases:,} cases, {self.faults:,} faults"


def stress(description: str, count: int, attack: Callable[[int, random.Random, Tally], None]) -> int:
    """The main function of a tool: runs `attack(count, random numbers, tally)`, and prints what it has counted."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=count, help=f"the number of cases [{count}]")
    parser.add_argument("--seed", type=int, default=1, help="the seed of the random choices [1]")
    arguments = parser.parse_args()
    tally, start = Tally(), time.perf_counter()
    attack(arguments.count, random.Random(arguments.seed), tally)
    print(f"{tally}, seed {arguments.seed}, {time.perf_counter() - start:,.0f} s")
    return 1 if tally.faults else 0
