"""Embedding bags in one process, in alternating rounds: preprocessing, forward, backward and Adagrad, all tables.

    python -m benchmarks.embedding [--json] [--rounds N] [--smallest]

Ours against nn.EmbeddingBag(sparse=True) with torch.optim.Adagrad, against fbgemm_gpu's CPU kernels if they are
installed, and against the time that the memory needs for the rows alone: read and write each row and its moment once.
Each round takes the next of a few batches, so that no contender finds its rows in the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dlrm_habana_kernels as kernels
import dlrm_native
from dlrm_habana_kernels import PreparedLookups

BATCHES = 6


@dataclass(frozen=True)
class Shape:
    tables: int
    rows: int
    dim: int
    batch_size: int
    lookups_per_bag: int

    def __str__(self) -> str:
        return f"{self.tables}x{self.rows}x{self.dim}, B {self.batch_size}, L {self.lookups_per_bag}"


SHAPES = (Shape(26, 100_000, 64, 2048, 1), Shape(26, 100_000, 128, 2048, 10), Shape(8, 1_000_000, 64, 512, 38))


@dataclass
class RawBatch:
    indices: list[Tensor]  # of each table, (B * L,)
    offsets: Tensor  # (T, B + 1)
    gradient: Tensor  # (B, T, D) of the pooled output


def random_batch(shape: Shape) -> RawBatch:
    bags = shape.batch_size * shape.lookups_per_bag
    indices = [torch.randint(shape.rows, (bags,)) for _ in range(shape.tables)]
    offsets = torch.arange(0, bags + 1, shape.lookups_per_bag).repeat(shape.tables, 1)
    return RawBatch(indices, offsets, torch.randn(shape.batch_size, shape.tables, shape.dim))


# ---------------------------------------------------------------------------------------------------------------------
# The contenders: from a shape to a function that does a whole step on a raw batch
# ---------------------------------------------------------------------------------------------------------------------


def preprocessing(shape: Shape, coalesce: Callable) -> tuple[Callable[[RawBatch], None], PreparedLookups]:
    sizes = PreparedLookups.shapes(shape.tables, shape.batch_size, shape.batch_size * shape.lookups_per_bag)
    prepared = PreparedLookups(*(torch.zeros(size, dtype=torch.int32) for size in sizes))
    table_rows = [shape.rows] * shape.tables

    def prepare(batch: RawBatch) -> None:
        coalesce(batch.indices, batch.offsets, table_rows, *prepared.fields())

    return prepare, prepared


def ours(shape: Shape) -> Callable[[RawBatch], None]:
    prepare, lookups = preprocessing(shape, torch.ops.dlrm.coalesce_lookups)
    embeddings = kernels.EmbeddingBags(torch.rand(shape.rows, shape.dim) for _ in range(shape.tables))
    optimizer = kernels.SparseAdagrad(embeddings, lr=0.01)

    def step(batch: RawBatch) -> None:
        prepare(batch)
        embeddings(lookups)
        embeddings.pooled.grad = batch.gradient  # as autograd does with a gradient that nobody else holds
        optimizer.step()

    return step


def torch_modules(shape: Shape) -> Callable[[RawBatch], None]:
    settings = {"mode": "sum", "sparse": True, "include_last_offset": True}
    bags = [nn.EmbeddingBag(shape.rows, shape.dim, **settings) for _ in range(shape.tables)]
    optimizer = torch.optim.Adagrad([bag.weight for bag in bags], lr=0.01)

    def step(batch: RawBatch) -> None:
        optimizer.zero_grad()
        pooled = [bag(*lookups) for bag, *lookups in zip(bags, batch.indices, batch.offsets, strict=True)]
        torch.stack(pooled, 1).backward(batch.gradient)
        optimizer.step()

    return step


def fbgemm(shape: Shape) -> Callable[[RawBatch], None]:
    """ImportError where fbgemm_gpu is not installed."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    tables = [(shape.rows, shape.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * shape.tables
    bags = SplitTableBatchedEmbeddingBagsCodegen(tables, optimizer=EmbOptimType.EXACT_ADAGRAD, learning_rate=0.01)
    bags.init_embedding_weights_uniform(-0.1, 0.1)

    def step(batch: RawBatch) -> None:
        lookups = shape.batch_size * shape.lookups_per_bag
        starts = batch.offsets[:, :-1] + torch.arange(0, shape.tables * lookups, lookups)[:, None]
        offsets = torch.cat([starts.flatten(), torch.tensor([shape.tables * lookups])])
        bags(torch.cat(batch.indices), offsets).backward(batch.gradient.flatten(1))

    return step


def sort_and_unique(batch: RawBatch) -> None:
    """The least that torch must do to group the lookups."""
    for indices in batch.indices:
        indices.sort(stable=True)[0].unique_consecutive(return_counts=True)


def memory_traffic(shape: Shape, batches: list[RawBatch]) -> Callable[[RawBatch], None]:
    """Reads and writes as many bytes as the rows and moments of a batch have, one after the other."""
    unique = sum(len(indices.unique()) for batch in batches for indices in batch.indices) // len(batches)
    size = max(unique * shape.dim, 1 << 25)  # at least 128 MiB, more than is cached of it
    stream = torch.zeros(2 * size)
    torch.ops.dlrm.advise_huge_pages(stream)
    start = 0

    def step(_: RawBatch) -> None:
        nonlocal start
        start = start + 2 * unique * shape.dim if start + 4 * unique * shape.dim <= len(stream) else 0
        stream[start : start + 2 * unique * shape.dim].add_(1)

    return step


# ---------------------------------------------------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------------------------------------------------


def measure(shape: Shape, rounds: int) -> dict[str, float]:
    """Median milliseconds of each contender."""
    batches = [random_batch(shape) for _ in range(BATCHES)]
    contenders = {
        "step, ours": ours(shape),
        "step, nn.EmbeddingBag + Adagrad": torch_modules(shape),
        "memory limit of the update": memory_traffic(shape, batches),
        "preprocessing, ours": preprocessing(shape, torch.ops.dlrm.coalesce_lookups)[0],
        "preprocessing, plain-torch reference": preprocessing(shape, kernels.coalesce_lookups_reference)[0],
        "preprocessing, sort and unique alone": sort_and_unique,
    }
    try:
        contenders["step, fbgemm_gpu"] = fbgemm(shape)
    except ImportError:
        print("fbgemm_gpu is not installed, so it is left out")
    times = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, step in contenders.items():
            start = time.perf_counter()
            step(batches[number % BATCHES])
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object a shape")
    parser.add_argument("--rounds", type=int, default=15, help="of which the median is taken")
    parser.add_argument("--smallest", action="store_true", help="only the first shape")
    args = parser.parse_args()
    built = dlrm_native.load_kernels()
    dlrm_native.keep_freed_memory()  # for all contenders alike
    for shape in SHAPES[: 1 if args.smallest else None]:
        times = measure(shape, args.rounds)
        if args.json:
            print(json.dumps({"shape": str(shape), "threads": torch.get_num_threads(), "kernels": built, "ms": times}))
            continue
        print(f"\n{shape}; kernels: {built}; {torch.get_num_threads()} threads")
        for name, milliseconds in times.items():
            mine = times[name.split(",")[0] + ", ours"] if "," in name else times["step, ours"]
            print(f"{name:40} {milliseconds:9.2f} ms   {milliseconds / mine:6.2f} x ours")


if __name__ == "__main__":
    main()
