"""Embedding bags: preprocessing, forward, backward and Adagrad of all tables, beside torch and fbgemm.

The peers are nn.EmbeddingBag(sparse=True) with torch.optim.Adagrad, and the CPU kernels of fbgemm_gpu if that is
installed. The bound is the time of the memory traffic alone, which reads and writes each row and its moment once.
Our rows and moments are fp32, except that two more peers are ours with bf16 rows and ours with one moment per row.
Each round takes the next of a few batches, so that no contender finds its rows in the cache.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import Result, against, median_ms, with_next
from dlrm.kernels import embedding as kernels
from dlrm.kernels.lookups import PreparedLookups, Sizes
from dlrm.kernels.native import load_kernels
from dlrm.system.memory import keep_freed_memory

BATCHES = 6


@dataclass(frozen=True)
class Shape:
    """Tables of one size, and a batch of bags of one length. Printed as tables x rows x dim, B(atch), L(ookups)."""

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
    """A batch before preprocessing, and the gradient that the backward pass begins with."""

    indices: list[Tensor]  # one tensor (B * L,) per table
    offsets: Tensor  # (T, B + 1)
    gradient: Tensor  # of the pooled output (B, T, D)


def random_batch(shape: Shape) -> RawBatch:
    lookups = shape.batch_size * shape.lookups_per_bag
    indices = [torch.randint(shape.rows, (lookups,)) for _ in range(shape.tables)]
    offsets = torch.arange(0, lookups + 1, shape.lookups_per_bag).repeat(shape.tables, 1)
    return RawBatch(indices, offsets, torch.randn(shape.batch_size, shape.tables, shape.dim))


# ---------------------------------------------------------------------------------------------------------------------
# The contenders: each function here takes a shape and returns a function that does a whole step on a raw batch
# ---------------------------------------------------------------------------------------------------------------------


def lookup_buffers(shape: Shape) -> PreparedLookups:
    """Returns the buffers that preprocessing fills."""
    return PreparedLookups.allocate(Sizes([shape.rows] * shape.tables, shape.batch_size, shape.lookups_per_bag, 0))


def ours(
    shape: Shape, row_type: torch.dtype = torch.float32, optimizer_type: type = kernels.SparseAdagrad
) -> Callable[[RawBatch], None]:
    lookups, table_rows = lookup_buffers(shape), [shape.rows] * shape.tables
    embeddings = kernels.EmbeddingBags(torch.rand(shape.rows, shape.dim).to(row_type) for _ in range(shape.tables))
    optimizer = optimizer_type(embeddings, lr=0.01)

    def step(batch: RawBatch) -> None:
        torch.ops.dlrm.coalesce_lookups(batch.indices, batch.offsets, table_rows, *lookups.fields())
        embeddings(lookups).grad = batch.gradient  # no copy, as autograd makes none of a gradient that it alone holds
        optimizer.step(lookups)

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
    """Returns the step of fbgemm's CPU kernels. Raises ImportError if fbgemm_gpu is not installed."""
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


def memory_traffic(shape: Shape) -> Callable[[RawBatch], None]:
    """Returns a step that reads and writes as many bytes as the rows and moments of a batch have, in address order."""
    unique = sum(len(indices.unique()) for indices in random_batch(shape).indices)
    floats = 2 * unique * shape.dim
    stream = torch.zeros(2 * max(floats, 1 << 25))  # at least 256 MiB, so that little of it stays cached
    torch.ops.dlrm.advise_huge_pages(stream)
    starts = itertools.cycle(range(0, len(stream) - floats + 1, floats))

    def step(_: RawBatch) -> None:
        start = next(starts)
        stream[start : start + floats].add_(1)

    return step


# ---------------------------------------------------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------------------------------------------------


def measure(rounds: int) -> list[Result]:
    load_kernels()
    keep_freed_memory()  # for all contenders alike
    return [result for shape in SHAPES for result in measure_shape(shape, rounds)]


def measure_shape(shape: Shape, rounds: int) -> list[Result]:
    contenders = {
        "ours": ours,
        "ours, tables in bf16": partial(ours, row_type=torch.bfloat16),
        "ours, row-wise Adagrad": partial(ours, optimizer_type=kernels.SparseRowwiseAdagrad),
        "nn.EmbeddingBag + torch.optim.Adagrad": torch_modules,
        "bound: memory traffic of the rows": memory_traffic,
        "fbgemm EXACT_ADAGRAD": fbgemm,
    }
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError) as error:  # not installed, or built for another version of torch
        print(f"fbgemm_gpu is left out: {str(error).splitlines()[0]}", file=sys.stderr)
        del contenders["fbgemm EXACT_ADAGRAD"]
    return measure_contenders(f"embedding {shape}", shape, contenders, 3 * rounds)


def measure_contenders(job: str, shape: Shape, contenders: dict[str, Callable], rounds: int) -> list[Result]:
    """Measures the contenders, each a function that takes a shape and returns a step on a raw batch."""
    batches = [random_batch(shape) for _ in range(BATCHES)]
    steps = {name: with_next(make_step(shape), batches) for name, make_step in contenders.items()}
    return against(job, "ours", median_ms(steps, rounds))
