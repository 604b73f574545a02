"""Side-by-side timing: candidates take turns in one process, so that what slows the machine slows all of them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Result:
    """What a job costs us and a peer: median ms, unless `unit` says otherwise.

    A bound is a peer that does less than the whole job, such as its matrix products alone.
    """

    job: str
    ours: float
    peer: str
    theirs: float
    unit: str = "ms"

    @property
    def ratio(self) -> float:
        """How many times as much the peer takes."""
        return self.theirs / self.ours


def median_ms(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Calls each candidate twice to warm up, then all of them in turn, `rounds` times."""
    times = {name: [] for name in candidates}
    for call in candidates.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def against(job: str, ours: str, times: dict[str, float]) -> list[Result]:
    """The candidate `ours` beside each other one."""
    return [Result(job, times[ours], peer, ms) for peer, ms in times.items() if peer != ours]


def with_next(step: Callable, inputs: Sequence) -> Callable[[], object]:
    """Calls `step` with the next input each time, from the first again after the last: none of them stays cached."""
    turn = itertools.cycle(inputs)
    return lambda: step(next(turn))
