"""Host preprocessing: grouping lookups by row, beside torch's sort and unique, and beside the whole job in plain torch.

The first peer does less than we do: it groups lookups, but neither checks them nor finds their bags.
"""

from __future__ import annotations

import torch

from benchmarks.embedding import BATCHES, SHAPES, RawBatch, Shape, lookup_buffers, random_batch
from benchmarks.measure import Result, against, median_ms, with_next
from dlrm.kernels import ops
from dlrm.kernels.native import load_kernels


def sort_and_unique(batch: RawBatch) -> None:
    for indices in batch.indices:
        indices.sort(stable=True)[0].unique_consecutive(return_counts=True)


def measure(rounds: int) -> list[Result]:
    load_kernels()
    return [result for shape in SHAPES for result in measure_shape(shape, rounds)]


def measure_shape(shape: Shape, rounds: int) -> list[Result]:
    batches, buffers = [random_batch(shape) for _ in range(BATCHES)], lookup_buffers(shape)
    sizes = [shape.rows] * shape.tables, buffers.max_lookups

    def preprocess_with(coalesce):
        return lambda batch: coalesce(batch.indices, batch.offsets, *sizes, *buffers.fields())

    candidates = {
        "ours": preprocess_with(torch.ops.dlrm.coalesce_lookups),
        "torch.sort + unique_consecutive": sort_and_unique,
        "plain torch": preprocess_with(ops.coalesce_lookups_reference),
    }
    calls = {name: with_next(call, batches) for name, call in candidates.items()}
    return against(f"preprocessing {shape}", "ours", median_ms(calls, 5 * rounds))
