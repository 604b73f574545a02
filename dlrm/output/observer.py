"""What watches a run, and never ends it: an error of its own is one line, and the run goes on without it.

The trainer passes each number to an `Observer` when it prints the number, so that observing a run adds no wait for the
device.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping

from dlrm.errors import RunError
from dlrm.system.files import reason_of


class Observer:
    """Receives the numbers that a run prints. This base class ignores them."""

    flag = ""  # which asks for this observer

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        """Receives the numbers printed after `step` iterations of the run, epochs before this one included.

        A key is a phase and a quantity, such as "Train/Loss".
        """

    def close(self) -> None:
        """Ends the observation. Also called when a run fails, so that the numbers up to the failure are kept."""


class Observers(Observer):
    """Passes each number to several observers, until one of them fails."""

    def __init__(self, *observers: Observer):
        self._observers = list(observers)

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        for observer in tuple(self._observers):
            with going_on_without(observer.flag, lambda failed=observer: self._observers.remove(failed)):
                observer.observe(step, values)

    def close(self) -> None:
        for observer in self._observers:
            with going_on_without(observer.flag):
                observer.close()


@contextlib.contextmanager
def going_on_without(flag: str, and_then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Prints one line, which names `flag`, about an error in the block, calls `and_then`, and goes on."""
    try:
        yield
    except Exception as error:
        print_failure(flag, error)
        and_then()


def print_failure(flag: str, error: Exception) -> None:
    """Prints one line on stderr: what `flag` asked for has failed, and the run goes on."""
    reason = reason_of(error) if isinstance(error, OSError) else " ".join(str(error).split())
    message = reason if isinstance(error, RunError) and reason.startswith(flag) else f"{flag}: {reason}"
    print(f"{message}; the run goes on without it", file=sys.stderr)
