"""Side-by-side timing: candidates take turns in one process, so that what slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Result:
    """Median ms of a job done by us and by a peer. A bound is a peer that does less than the whole job."""

    job: str
    ours_ms: float
    peer: str
    peer_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster we are."""
        return self.peer_ms / self.ours_ms


def median_ms(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Calls each candidate once to warm up, then all of them in turn, `rounds` times."""
    times = {name: [] for name in candidates}
    for call in candidates.values():
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
