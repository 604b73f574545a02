"""Side-by-side timing: candidates take turns in one process, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PAUSE = 0.1  # seconds; OpenBLAS spins for a third of that


@dataclass
class Result:
    """The cost of a job for us and for one peer: the median time in ms or the peak memory in GiB.

    A peer whose name begins with "bound" does less than the whole job, such as its matrix products alone. A peer whose
    name begins with "ours" is our code with other settings.
    """

    job: str
    ours: float
    peer: str
    theirs: float
    unit: str = "ms"
    benchmark: str = ""  # name of the module in this folder that measured the job

    @property
    def ratio(self) -> float:
        """The peer's cost divided by ours."""
        return self.theirs / self.ours


def median_ms(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median time of each candidate in milliseconds.

    Calls each candidate twice to warm up, then `rounds` times all of them in turn, with pauses. A library's threads may
    spin for a while after their work, in wait for more, and would slow the next candidate.
    """
    times = {name: [] for name in candidates}
    for call in candidates.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def against(job: str, ours: str, times: dict[str, float]) -> list[Result]:
    """Returns one result per candidate other than `ours`, from the time of each candidate in ms."""
    return [Result(job, times[ours], peer, ms) for peer, ms in times.items() if peer != ours]


def with_next(step: Callable, inputs: Sequence) -> Callable[[], object]:
    """Returns a function that calls `step` with the next input at each call, and begins again after the last input.

    No input stays in the cache if there are enough of them.
    """
    inputs_in_turn = itertools.cycle(inputs)
    return lambda: step(next(inputs_in_turn))
