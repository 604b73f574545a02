"""Growth of the cost of embedding bags with rows per table, batch size, tables and lookups per bag, beside torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from benchmarks.embedding import Shape, measure_contenders, ours, torch_modules
from benchmarks.measure import Result
from dlrm.kernels.embedding import SparseAdagrad
from dlrm.kernels.native import load_kernels
from dlrm.system.memory import keep_freed_memory

MIDDLE = Shape(tables=4, rows=1_000_000, dim=64, batch_size=1024, lookups_per_bag=8)
GROWTH = {
    "rows": (10_000, 100_000, 1_000_000, 10_000_000),
    "batch_size": (128, 512, 2048, 8192),
    "tables": (1, 2, 4, 8),
    "lookups_per_bag": (1, 4, 16, 64),
}


def measure(rounds: int) -> list[Result]:
    load_kernels()
    keep_freed_memory()
    results = []
    for name, values in GROWTH.items():
        for value in values:
            shape = replace(MIDDLE, **{name: value}, **({"tables": 1} if name == "rows" else {}))
            contenders = {
                "ours": partial(ours, SparseAdagrad),
                "nn.EmbeddingBag + torch.optim.Adagrad": partial(torch_modules, torch.optim.Adagrad),
            }
            results += measure_contenders(f"{name} {value}: {shape}", shape, contenders, rounds)
    return results
