"""Embedding bags: preprocessing, forward, backward and update of all tables, beside torch, fbgemm and IPEX.

Each optimizer of ours stands beside the same one of the peers: nn.EmbeddingBag(sparse=True) with torch.optim, the CPU
kernels of fbgemm_gpu if that is installed, and those of intel-extension-for-pytorch if `--ipex-python` names a Python
that has it. fbgemm has a fast path on CPUs for row-wise Adagrad alone. Rows and moments are fp32, except that one more
peer is ours with bf16 rows. Each round takes the next of a few batches, so that no contender finds its rows in the
cache.

The bound is the time of the memory traffic alone, which reads and writes each row and its moment once. The jobs
"forward" and "update" compare parts of our step with the bytes that each of them has to move.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import ipex
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
    rows = [shape.rows] * shape.tables
    return PreparedLookups.allocate(Sizes(rows, shape.batch_size, [shape.lookups_per_bag] * shape.tables, 0))


def tables_of_ours(shape: Shape, row_type: torch.dtype = torch.float32) -> kernels.EmbeddingBags:
    return kernels.EmbeddingBags(torch.rand(shape.rows, shape.dim).to(row_type) for _ in range(shape.tables))


def ours(optimizer_type: type, shape: Shape, row_type: torch.dtype = torch.float32) -> Callable[[RawBatch], None]:
    lookups = lookup_buffers(shape)
    sizes = [shape.rows] * shape.tables, lookups.max_lookups
    embeddings = tables_of_ours(shape, row_type)
    optimizer = optimizer_type(embeddings, lr=0.01)

    def step(batch: RawBatch) -> None:
        torch.ops.dlrm.coalesce_lookups(batch.indices, batch.offsets, *sizes, *lookups.fields())
        embeddings(lookups).grad = batch.gradient  # no copy, as autograd makes none of a gradient that it alone holds
        optimizer.step(lookups)

    return step


def torch_modules(optimizer_type: type, shape: Shape) -> Callable[[RawBatch], None]:
    settings = {"mode": "sum", "sparse": True, "include_last_offset": True}
    bags = [nn.EmbeddingBag(shape.rows, shape.dim, **settings) for _ in range(shape.tables)]
    optimizer = optimizer_type([bag.weight for bag in bags], lr=0.01)

    def step(batch: RawBatch) -> None:
        optimizer.zero_grad()
        pooled = [bag(*lookups) for bag, *lookups in zip(bags, batch.indices, batch.offsets, strict=True)]
        torch.stack(pooled, 1).backward(batch.gradient)
        optimizer.step()

    return step


def fbgemm(optimizer: str, shape: Shape) -> Callable[[RawBatch], None]:
    """Returns the step of fbgemm's CPU kernels with an optimizer of its `EmbOptimType`."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    tables = [(shape.rows, shape.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * shape.tables
    bags = SplitTableBatchedEmbeddingBagsCodegen(tables, optimizer=EmbOptimType[optimizer], learning_rate=0.01)
    bags.init_embedding_weights_uniform(-0.1, 0.1)

    def step(batch: RawBatch) -> None:
        lookups = shape.batch_size * shape.lookups_per_bag
        starts = batch.offsets[:, :-1] + torch.arange(0, shape.tables * lookups, lookups)[:, None]
        offsets = torch.cat([starts.flatten(), torch.tensor([shape.tables * lookups])])
        bags(torch.cat(batch.indices), offsets).backward(batch.gradient.flatten(1))

    return step


def unique_rows(shape: Shape) -> int:
    """Returns how many rows a batch hits, in all tables together."""
    return sum(len(indices.unique()) for indices in random_batch(shape).indices)


def stream(size: int) -> Callable[[object], None]:
    """Returns a step that reads as many bytes as it writes, in address order: `size` bytes in all."""
    floats = size // 8
    memory = torch.zeros(2 * max(floats, 1 << 25))  # at least 256 MiB, so that little of it stays cached
    torch.ops.dlrm.advise_huge_pages(memory)
    starts = itertools.cycle(range(0, len(memory) - floats + 1, floats))

    def step(_: RawBatch) -> None:
        start = next(starts)
        memory[start : start + floats].add_(1)

    return step


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of ours, and what the peers call theirs."""

    ours: type
    torch: type | None  # None where torch.optim has none for sparse gradients
    fbgemm: str
    ipex: str | None
    moment_bytes: Callable[[int], int]  # per row of a given dimension


OPTIMIZERS = {
    "Adagrad": Optimizer(
        kernels.SparseAdagrad,
        torch.optim.Adagrad,
        "EXACT_ADAGRAD",
        "MergedEmbeddingBagWithAdaGrad",
        lambda dim: 4 * dim,
    ),
    "row-wise Adagrad": Optimizer(kernels.SparseRowwiseAdagrad, None, "EXACT_ROWWISE_ADAGRAD", None, lambda dim: 4),
    "SGD": Optimizer(kernels.SparseSGD, torch.optim.SGD, "EXACT_SGD", "MergedEmbeddingBagWithSGD", lambda dim: 0),
}


# ---------------------------------------------------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------------------------------------------------


def measure(rounds: int, ipex_python: str | None = None) -> list[Result]:
    load_kernels()
    keep_freed_memory()  # for all contenders alike
    results = []
    for shape in SHAPES:
        for name, optimizer in OPTIMIZERS.items():
            results += measure_step(shape, name, optimizer, 3 * rounds, ipex_python)
        results += measure_parts(shape, 3 * rounds)
    return results


def measure_step(shape: Shape, name: str, optimizer: Optimizer, rounds: int, ipex_python: str | None) -> list[Result]:
    contenders = {"ours": partial(ours, optimizer.ours)}
    if optimizer.ours is kernels.SparseAdagrad:
        contenders["ours, tables in bf16"] = partial(ours, optimizer.ours, row_type=torch.bfloat16)
    if optimizer.torch:
        contenders[f"nn.EmbeddingBag + torch.optim.{optimizer.torch.__name__}"] = partial(
            torch_modules, optimizer.torch
        )
    if has_fbgemm():
        contenders[f"fbgemm {optimizer.fbgemm}"] = partial(fbgemm, optimizer.fbgemm)
    row_bytes = 2 * (4 * shape.dim + optimizer.moment_bytes(shape.dim))
    contenders["bound: memory traffic of the rows"] = lambda shape: stream(unique_rows(shape) * row_bytes)
    with contextlib.ExitStack() as stack:
        if ipex_python and optimizer.ipex:
            peer = stack.enter_context(ipex.Peer(ipex_python, optimizer.ipex, shape))
            contenders[peer.name] = lambda _: lambda _: peer.step()
        return measure_contenders(f"embedding {shape}, {name}", shape, contenders, rounds)


@functools.cache
def has_fbgemm() -> bool:
    """Says whether fbgemm_gpu can be imported, and prints why if it cannot."""
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError) as error:  # not installed, or built for another version of torch
        print(f"fbgemm_gpu is left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def measure_contenders(job: str, shape: Shape, contenders: dict[str, Callable], rounds: int) -> list[Result]:
    """Measures the contenders, each a function that takes a shape and returns a step on a raw batch."""
    batches = [random_batch(shape) for _ in range(BATCHES)]
    steps = {name: with_next(make_step(shape), batches) for name, make_step in contenders.items()}
    return against(job, "ours", median_ms(steps, rounds))


def measure_parts(shape: Shape, rounds: int) -> list[Result]:
    """Measures forward and Adagrad's update alone, beside the time of as many bytes in address order."""
    embeddings = tables_of_ours(shape)
    optimizer = kernels.SparseAdagrad(embeddings, lr=0.01)
    steps = []  # the rows that were read, with their gradient, and the lookups
    for batch in (random_batch(shape) for _ in range(BATCHES)):
        lookups = lookup_buffers(shape)
        sizes = [shape.rows] * shape.tables, lookups.max_lookups
        torch.ops.dlrm.coalesce_lookups(batch.indices, batch.offsets, *sizes, *lookups.fields())
        rows = embeddings(lookups)
        rows.grad = batch.gradient
        steps.append((rows, lookups))

    # Forward reads each row once. The update reads the gradient, and reads and writes each row and its moment.
    pooled, rows = 4 * shape.batch_size * shape.tables * shape.dim, 4 * unique_rows(shape) * shape.dim
    parts = {
        "forward": (lambda step: embeddings.read(step[1]), rows + pooled),
        "Adagrad": (lambda step: optimizer.update(*step), pooled + 4 * rows),
    }
    results = []
    for part, (call, size) in parts.items():
        calls = {"ours": torch.no_grad()(call), "bound: its bytes in address order": stream(size)}
        calls = {name: with_next(call, steps) for name, call in calls.items()}
        results += against(f"{part} alone, {shape}, {size / 1e6:.0f} MB", "ours", median_ms(calls, rounds))
    return results
