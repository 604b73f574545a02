"""Counts of compilations, and of operators that ran on the host."""

from collections import Counter
from contextlib import contextmanager

import torch


class _Metric:
    def __init__(self, name):
        if name not in ("graph_compilation", "cpu_fallback", "memory_defragmentation"):
            raise ValueError(f"no metric {name}")
        self._name = name
        self.reset()

    def _events_so_far(self):
        if self._name == "cpu_fallback":
            return torch.ops.hpu_emulator.cpu_fallbacks()
        return range(torch.ops.hpu_emulator.counters()["compilations"] if self._name == "graph_compilation" else 0)

    def reset(self):
        self._start = len(self._events_so_far())

    def stats(self):
        new = self._events_so_far()[self._start :]
        stats = [("TotalNumber", len(new))]
        if self._name == "cpu_fallback":
            stats.append(("FallbackOps", dict(Counter(new))))
        return stats


_global = {name: _Metric(name) for name in ("graph_compilation", "cpu_fallback", "memory_defragmentation")}


def metric_global(name):
    return _global[name]


@contextmanager
def metric_localcontext(name):
    yield _Metric(name)
