"""The kernels of the trainer: lookups prepared on the host, embedding bags, fused optimizers; a back end a device.

    dlrm::coalesce_lookups    raw lookups of a batch -> bounds-checked, grouped by row, in tensors of fixed size
    dlrm::embedding_bag_sum   all tables, all bags   -> (B, T, D)
    dlrm::sparse_adagrad_     gradient of that       -> the tables and their moments, in place
    dlrm::sparse_rowwise_adagrad_                       likewise, with one moment a row
    dlrm::sparse_sgd_         gradient of that       -> the tables, in place

Each op is a schema, a fake implementation that only knows shapes, and a reference implementation in plain torch, which
states what the op means and runs on any device that has no kernel of its own.

The tables are not autograd leaves; their pooled output is. The backward of a sum bag is itself a sum bag: row r of a
table receives the gradients of all bags that looked it up. So the gradient of the pooled output, (B, T, D), and the
lookups grouped by row are all that a sparse optimizer needs, and no gradient of table size ever exists.

B batch, T tables, D embedding dimension, N most lookups of a table in a batch, U rows that a table's lookups hit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.library import define, impl, register_autograd, register_fake
from torch.nn.functional import embedding, embedding_bag

from dlrm_data_pytorch import Batch, RandomData
from dlrm_native import keep_freed_memory, load_kernels
from dlrm_options import Options, RunError, UsageError, gaudi_environment


def reference(op: str) -> Callable[[Callable], Callable]:
    """Registers a function as what `op` does on devices without a kernel of their own, and leaves it callable."""

    def register(function: Callable) -> Callable:
        impl(op, "default", function)
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------------
# The prepared lookup
# ---------------------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What the sizes of a batch's tensors follow from."""

    table_rows: Sequence[int]
    batch_size: int  # B
    lookups_per_bag: int  # at most
    num_dense: int

    @property
    def max_lookups(self) -> int:
        """N"""
        return self.batch_size * self.lookups_per_bag


@dataclass
class PreparedLookups:
    """The lookups of a batch in T tables, as the device wants them. int32; sizes never change, only how much counts.

    The counts of `valid_count_fwd`, `valid_count_bwd` and `unique_count` are in the form that Gaudi's kernels take.
    """

    indices_fwd: Tensor  # (T, N) rows in the order of the lookups, then unused
    offsets: Tensor  # (T, B + 1) where each bag starts; the last entry is the number of lookups
    valid_count_fwd: Tensor  # (T, 2) [B + 1, lookups]
    unique_indices: Tensor  # (T, N) each row that occurs once, ascending, U of them
    output_rows: Tensor  # (T, N) for each lookup, grouped by row: its bag
    output_row_offsets: Tensor  # (T, N + 1) where each row's group starts; entry U is the number of lookups
    valid_count_bwd: Tensor  # (T, 2) [U + 1, lookups]
    unique_count: Tensor  # (T, 1) U

    @staticmethod
    def shapes(num_tables: int, batch_size: int, max_lookups: int) -> list[tuple[int, int]]:
        """Of each field; `max_lookups` is N."""
        widths = (max_lookups, batch_size + 1, 2, max_lookups, max_lookups, max_lookups + 1, 2, 1)
        return [(num_tables, width) for width in widths]

    @classmethod
    def allocate(cls, sizes: Sizes, **settings) -> PreparedLookups:
        """Tensors with `settings` such as device."""
        shapes = cls.shapes(len(sizes.table_rows), sizes.batch_size, sizes.max_lookups)
        return cls(*(torch.zeros(shape, dtype=torch.int32, **settings) for shape in shapes))

    def fields(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def grouped(self) -> tuple[Tensor, ...]:
        """What the update of the tables needs."""
        return self.unique_indices, self.output_rows, self.output_row_offsets, self.unique_count

    def fill(self, batch: Batch, table_rows: Sequence[int], coalesce: Callable[..., None]) -> PreparedLookups:
        """From a raw batch, on the host, by `torch.ops.dlrm.coalesce_lookups` or its like. Returns itself."""
        coalesce(batch.indices, batch.offsets, table_rows, *self.fields())
        return self


GROUPED_LOOKUPS = "Tensor unique_indices, Tensor output_rows, Tensor output_row_offsets, Tensor unique_count"

define(
    "dlrm::coalesce_lookups",
    "(Tensor[] indices, Tensor offsets, int[] table_rows, Tensor(a!) indices_fwd, Tensor(b!) offsets_fwd, "
    "Tensor(c!) valid_count_fwd, Tensor(d!) unique_indices, Tensor(e!) output_rows, Tensor(f!) output_row_offsets, "
    "Tensor(g!) valid_count_bwd, Tensor(h!) unique_count) -> ()",
)


@register_fake("dlrm::coalesce_lookups")
def _(indices, offsets, table_rows, *prepared) -> None:
    torch._check(len(indices) == len(table_rows) == offsets.shape[0], lambda: "one indices, offsets and rows a table")


@reference("dlrm::coalesce_lookups")
def coalesce_lookups_reference(
    indices: Sequence[Tensor], offsets: Tensor, table_rows: Sequence[int], *prepared: Tensor
) -> None:
    """Fills the fields of a `PreparedLookups` from raw lookups, in place.

    `indices[t]`: (lookups,) int32 or int64; `offsets`: (T, B + 1) int32 or int64; `table_rows[t]`: rows of table t.
    IndexError or ValueError, naming table and sample, for a lookup outside its table or offsets that are no offsets.
    """
    into = PreparedLookups(*prepared)
    bags = torch.arange(offsets.shape[1] - 1)
    for t, (rows, starts) in enumerate(zip(indices, offsets, strict=True)):
        check_lookups(t, rows, starts, table_rows[t], into.indices_fwd.shape[1])
        in_row_order, order = rows.sort(stable=True)
        unique, occurrences = in_row_order.unique_consecutive(return_counts=True)
        into.indices_fwd[t, : len(rows)] = rows
        into.offsets[t] = starts
        into.valid_count_fwd[t] = torch.tensor([len(starts), len(rows)])
        into.unique_indices[t, : len(unique)] = unique
        into.output_rows[t, : len(rows)] = bags.repeat_interleave(starts.diff())[order]
        into.output_row_offsets[t, 0] = 0
        into.output_row_offsets[t, 1 : len(unique) + 1] = occurrences.cumsum(0)
        into.valid_count_bwd[t] = torch.tensor([len(unique) + 1, len(rows)])
        into.unique_count[t] = len(unique)


def check_lookups(table: int, indices: Tensor, offsets: Tensor, table_rows: int, max_lookups: int) -> None:
    """ValueError for offsets that are no offsets, IndexError for a lookup outside the table."""
    lookups = len(indices)
    if lookups > max_lookups:
        raise ValueError(f"table {table}: {lookups} lookups, but there is room for {max_lookups}")
    if offsets[0] != 0:
        raise ValueError(f"table {table}, sample 0: offsets must start at 0, not at {offsets[0]}")
    decreasing = (offsets.diff() < 0).nonzero()
    if len(decreasing):
        sample = int(decreasing[0])
        raise ValueError(
            f"table {table}, sample {sample}: offsets must not decrease, as from {offsets[sample]} to "
            f"{offsets[sample + 1]}"
        )
    if offsets[-1] != lookups:
        raise ValueError(
            f"table {table}, sample {len(offsets) - 2}: offsets must end at the number of lookups, {lookups}, not at "
            f"{offsets[-1]}"
        )
    outside = ((indices < 0) | (indices >= table_rows)).nonzero()
    if len(outside):
        position = int(outside[0])
        sample = int(torch.searchsorted(offsets, position, right=True)) - 1
        raise IndexError(
            f"table {table}, sample {sample}: lookup of row {indices[position]}, but the table's rows are 0 to "
            f"{table_rows - 1}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The embedding bag
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::embedding_bag_sum", "(Tensor[] weights, Tensor indices_fwd, Tensor offsets) -> Tensor")


@register_fake("dlrm::embedding_bag_sum")
def _(weights, indices_fwd, offsets) -> Tensor:
    torch._check(len(weights) == offsets.shape[0], lambda: f"{len(weights)} tables, offsets for {offsets.shape[0]}")
    shape = (offsets.shape[1] - 1, len(weights), weights[0].shape[1])
    return weights[0].new_empty(shape, dtype=torch.promote_types(weights[0].dtype, torch.float32))


@reference("dlrm::embedding_bag_sum")
def embedding_bag_sum_reference(weights: Sequence[Tensor], indices_fwd: Tensor, offsets: Tensor) -> Tensor:
    """pooled[b, t] = sum of weights[t][i] over the lookups i of bag b; an empty bag gives zeros.

    `weights[t]`: (rows, D) float32 or bfloat16; `indices_fwd`, `offsets`: as in `PreparedLookups`. Returns (B, T, D)
    float32.
    """
    at_least_float = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    return torch.stack([sum_bags(*table) for table in zip(at_least_float, indices_fwd, offsets, strict=True)], dim=1)


def sum_bags(rows: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """(n, D), indices of which the last offset tells how many count, (bags + 1,) -> (bags, D)."""
    return embedding_bag(indices[: offsets[-1]], rows, offsets, mode="sum", include_last_offset=True)


def _save_lookups(ctx, inputs, output) -> None:
    weights, indices_fwd, offsets = inputs
    ctx.table_rows = [len(weight) for weight in weights]
    ctx.save_for_backward(indices_fwd, offsets)


def _dense_gradients(ctx, grad_pooled: Tensor):
    """A dense gradient for each table. Training never asks for it; whoever differentiates by a table does."""
    indices_fwd, offsets = ctx.saved_tensors
    position = torch.arange(indices_fwd.shape[1], dtype=offsets.dtype, device=offsets.device)
    gradients = []
    for t, rows in enumerate(ctx.table_rows):
        bag = torch.searchsorted(offsets[t], position, right=True) - 1  # B for positions past the last lookup
        in_some_bag = bag < len(grad_pooled)
        by_lookup = grad_pooled[bag.clamp(max=len(grad_pooled) - 1), t] * in_some_bag[:, None]
        gradient = grad_pooled.new_zeros(rows, grad_pooled.shape[2])
        gradients.append(gradient.index_add(0, indices_fwd[t] * in_some_bag, by_lookup))
    return gradients, None, None


register_autograd("dlrm::embedding_bag_sum", _dense_gradients, setup_context=_save_lookups)


class EmbeddingTable(nn.Module):
    """Holds the rows of a table, so that its name in a checkpoint is `emb_l.0.weight`, as it has always been."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        torch.ops.dlrm.advise_huge_pages(self.weight)


class EmbeddingBags(nn.ModuleList):
    """All tables of a model. Remembers what it looked up last, and where, for the sparse optimizer."""

    lookups_type = PreparedLookups  # what a batch must hold

    def __init__(self, tables: Iterable[Tensor]):
        super().__init__(map(EmbeddingTable, tables))

    @property
    def weights(self) -> list[Tensor]:
        return [table.weight for table in self]

    def forward(self, lookups: PreparedLookups) -> Tensor:
        """What is read from the tables for a batch: a leaf of autograd while gradients are on. Input of `pool`."""
        looked_up = self.look_up(lookups)
        if torch.is_grad_enabled():
            self.looked_up, self.lookups = looked_up.requires_grad_(), lookups
        return looked_up

    def look_up(self, lookups: PreparedLookups) -> Tensor:
        return torch.ops.dlrm.embedding_bag_sum(self.weights, lookups.indices_fwd, lookups.offsets)

    def pool(self, looked_up: Tensor, lookups: PreparedLookups) -> Tensor:
        """The sum of each bag, (B, T, D)."""
        return looked_up


# ---------------------------------------------------------------------------------------------------------------------
# Sparse optimizers
# ---------------------------------------------------------------------------------------------------------------------

define(
    "dlrm::sparse_adagrad_",
    f"(Tensor(a!)[] weights, Tensor(b!)[] moments, Tensor grad_pooled, {GROUPED_LOOKUPS}, float lr, float eps, "
    "int? seed=None) -> ()",
)
define(
    "dlrm::sparse_rowwise_adagrad_",
    f"(Tensor(a!)[] weights, Tensor(b!)[] moments, Tensor grad_pooled, {GROUPED_LOOKUPS}, float lr, float eps, "
    "int? seed=None) -> ()",
)
define(
    "dlrm::sparse_sgd_",
    f"(Tensor(a!)[] weights, Tensor grad_pooled, {GROUPED_LOOKUPS}, float lr, int? seed=None) -> ()",
)


@register_fake("dlrm::sparse_adagrad_")
@register_fake("dlrm::sparse_rowwise_adagrad_")
def _(weights, moments, grad_pooled, *_, **__) -> None:
    torch._check(len(weights) == len(moments) == grad_pooled.shape[1], lambda: "one moment and gradient a table")


@register_fake("dlrm::sparse_sgd_")
def _(weights, grad_pooled, *_, **__) -> None:
    torch._check(len(weights) == grad_pooled.shape[1], lambda: "one gradient a table")


@reference("dlrm::sparse_adagrad_")
def sparse_adagrad_reference(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    lr: float,
    eps: float,
    seed: int | None = None,
) -> None:
    """Adagrad (Duchi et al. 2011, as `torch.optim.Adagrad` computes it) on the rows that were looked up, in place:

        moment[r] += g^2;  weight[r] -= lr * g / (sqrt(moment[r]) + eps),   g the sum of row r's gradients

    The update is not linear in g, so g must be whole: that is what the lookups are grouped for.
    `weights[t]`: (rows, D) float32 or bfloat16; `moments[t]`: (rows, D) float32; `grad_pooled`: (B, T, D), float32 or
    bfloat16; `seed`: see `subtract_from_rows`; the rest as in `PreparedLookups`.
    """
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count)
    for t, (rows, gradient) in enumerate(row_gradients(grad_pooled, *lookups)):
        moments[t].index_add_(0, rows, gradient.square())
        subtract_from_rows(weights[t], rows, lr * gradient / (moments[t][rows].sqrt() + eps), t, seed)


@reference("dlrm::sparse_rowwise_adagrad_")
def sparse_rowwise_adagrad_reference(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    lr: float,
    eps: float,
    seed: int | None = None,
) -> None:
    """Adagrad with one moment a row, the mean of g^2 over the row: for tables whose moments would not fit.

    `moments[t]`: (rows,) float32; the rest as of `sparse_adagrad_reference`.
    """
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count)
    for t, (rows, gradient) in enumerate(row_gradients(grad_pooled, *lookups)):
        moments[t].index_add_(0, rows, gradient.square().mean(1))
        subtract_from_rows(weights[t], rows, lr * gradient / (moments[t][rows, None].sqrt() + eps), t, seed)


@reference("dlrm::sparse_sgd_")
def sparse_sgd_reference(
    weights: Sequence[Tensor],
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    lr: float,
    seed: int | None = None,
) -> None:
    """weight[r] -= lr * g, in place, on the rows that were looked up; arguments as of `sparse_adagrad_reference`."""
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count)
    for t, (rows, gradient) in enumerate(row_gradients(grad_pooled, *lookups)):
        subtract_from_rows(weights[t], rows, lr * gradient, t, seed)


def row_gradients(
    grad_pooled: Tensor, unique_indices: Tensor, output_rows: Tensor, output_row_offsets: Tensor, unique_count: Tensor
) -> Iterable[tuple[Tensor, Tensor]]:
    """For each table the rows that were looked up, (U,) int64, and the gradient of each, (U, D) float32."""
    for t, unique in enumerate(unique_count.flatten().tolist()):
        by_bag = grad_pooled[:, t].float().contiguous()
        yield unique_indices[t, :unique].long(), sum_bags(by_bag, output_rows[t], output_row_offsets[t, : unique + 1])


def subtract_from_rows(weight: Tensor, rows: Tensor, steps: Tensor, table: int, seed: int | None) -> None:
    """weight[rows] -= steps; a bfloat16 weight is `randomly_rounded` if there is a `seed`, else to nearest."""
    values = weight[rows].float() - steps
    if weight.dtype == torch.bfloat16 and seed is not None:
        values = randomly_rounded(values, rows, table, seed)
    weight[rows] = values.to(weight.dtype)


def randomly_rounded(values: Tensor, rows: Tensor, table: int, seed: int) -> Tensor:
    """Values of bfloat16, up or down from `values` (U, D) so that the expected one is the value itself.

    Steps too small for bfloat16's 8 bits then add up instead of vanishing. The random bits are a hash of seed, table,
    row and column, so they depend on nothing else.
    """
    columns = torch.arange(values.shape[1], device=values.device)
    key = mix(mix(mix(torch.tensor(seed, device=values.device)) + table) + rows)  # (U,)
    random = mix(key[:, None] + columns) & 0xFFFF
    rounded = (values.view(torch.int32) + random.int()) & ~0xFFFF
    return torch.where(values.isnan(), values, rounded.view(torch.float32))


def mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 on the low 32 bits of int64 numbers."""
    x = x & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::advise_huge_pages", "(Tensor tensor) -> ()")


@register_fake("dlrm::advise_huge_pages")
@reference("dlrm::advise_huge_pages")
def _(tensor) -> None:
    """Asks for huge pages under a large tensor, where they exist: random rows then cost no walk of the page table."""


class SparseOptimizer(torch.optim.Optimizer):
    """Updates the tables of an `EmbeddingBags` from the gradient of what it looked up last."""

    def __init__(self, embeddings: EmbeddingBags, **defaults: float):
        super().__init__(embeddings.weights, defaults)
        self._embeddings = embeddings

    @torch.no_grad()
    def step(self) -> None:
        self.update(self._embeddings, self._embeddings.looked_up.grad, self._embeddings.lookups)

    def update(self, embeddings: EmbeddingBags, gradient: Tensor, lookups: PreparedLookups) -> None:
        raise NotImplementedError


class SparseAdagrad(SparseOptimizer):
    """`sparse_adagrad_`; `state[weight]["sum"]` is the moment, (rows, D) float32."""

    def __init__(self, embeddings: EmbeddingBags, lr: float, eps: float = 1e-10):
        super().__init__(embeddings, lr=lr, eps=eps)
        self.moments = [torch.zeros_like(weight, dtype=torch.float32) for weight in embeddings.weights]
        for weight, moment in zip(embeddings.weights, self.moments, strict=True):
            torch.ops.dlrm.advise_huge_pages(moment)
            self.state[weight]["sum"] = moment

    def update(self, embeddings: EmbeddingBags, gradient: Tensor, lookups: PreparedLookups) -> None:
        group = self.param_groups[0]
        torch.ops.dlrm.sparse_adagrad_(
            embeddings.weights, self.moments, gradient, *lookups.grouped(), group["lr"], group["eps"]
        )


class SparseSGD(SparseOptimizer):
    """`sparse_sgd_`."""

    def __init__(self, embeddings: EmbeddingBags, lr: float):
        super().__init__(embeddings, lr=lr)

    def update(self, embeddings: EmbeddingBags, gradient: Tensor, lookups: PreparedLookups) -> None:
        torch.ops.dlrm.sparse_sgd_(embeddings.weights, gradient, *lookups.grouped(), self.param_groups[0]["lr"])


# ---------------------------------------------------------------------------------------------------------------------
# Static shapes: embedding bags and their update out of native operators alone
#
# For devices where the ops above have no kernel, and where a size that follows the data costs a recompilation or a
# wait. Bags are padded with a row of zeros, groups with no gradient; what is padded is thrown away or written back as
# it was.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class StaticLookups:
    """The lookups of a batch for tables that are stacked in one, below them a row of zeros; L lookups a bag at most."""

    unique_rows: Tensor  # (T * N + 1,) int32; from t * N on, the rows of table t that occur, then the row of zeros
    positions: Tensor  # (T, B, L) int32; for each lookup its place in `unique_rows`, then the last one
    host: PreparedLookups | None = None  # where the lookups of a batch are grouped first

    @classmethod
    def allocate(cls, sizes: Sizes, **settings) -> StaticLookups:
        tables = len(sizes.table_rows)
        positions = (tables, sizes.batch_size, sizes.lookups_per_bag)
        return cls(
            torch.zeros(tables * sizes.max_lookups + 1, dtype=torch.int32, **settings),
            torch.zeros(positions, dtype=torch.int32, **settings),
            PreparedLookups.allocate(sizes) if settings["device"].type == "cpu" else None,
        )

    def fields(self) -> list[Tensor]:
        return [self.unique_rows, self.positions]

    def fill(self, batch: Batch, table_rows: Sequence[int], coalesce: Callable[..., None]) -> PreparedLookups:
        """From a raw batch, on the host. Returns the grouped lookups that it went through."""
        grouped = self.host.fill(batch, table_rows, coalesce)
        torch.ops.dlrm.pad_lookups(grouped.offsets, *grouped.grouped(), table_rows, *self.fields())
        return grouped


define(
    "dlrm::pad_lookups",
    f"(Tensor offsets, {GROUPED_LOOKUPS}, int[] table_rows, Tensor(a!) unique_rows, Tensor(b!) positions) -> ()",
)


@register_fake("dlrm::pad_lookups")
def _(offsets, unique_indices, output_rows, output_row_offsets, unique_count, table_rows, *padded) -> None:
    torch._check(offsets.shape[0] == len(table_rows), lambda: "one offsets and rows a table")


@reference("dlrm::pad_lookups")
def pad_lookups_reference(
    offsets: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    table_rows: Sequence[int],
    unique_rows: Tensor,
    positions: Tensor,
) -> None:
    """Fills the fields of a `StaticLookups` from those of a `PreparedLookups`, in place.

    Within a bag, lookups come in the order of their rows.
    """
    room = unique_indices.shape[1]
    first_row = itertools.accumulate(table_rows, initial=0)
    unique_rows.fill_(sum(table_rows))
    positions.fill_(len(unique_rows) - 1)
    for t, (first, unique) in enumerate(zip(first_row, unique_count.flatten().tolist(), strict=False)):
        starts = output_row_offsets[t, : unique + 1]
        bags = output_rows[t, : starts[-1]].long()
        place = t * room + torch.arange(unique, dtype=torch.int32).repeat_interleave(starts.diff())
        by_bag = bags.argsort(stable=True)
        place_in_bag = torch.arange(len(bags)) - offsets[t, bags[by_bag]]
        unique_rows[t * room : t * room + unique] = unique_indices[t, :unique] + first
        positions[t, bags[by_bag], place_in_bag] = place[by_bag]


class StaticEmbeddingBags(EmbeddingBags):
    """Tables stacked in one storage, so that an operator serves all of them."""

    lookups_type = StaticLookups

    def __init__(self, tables: Iterable[Tensor]):
        super().__init__(tables)
        self.stacked = torch.cat([*self.weights, torch.zeros(1, self.weights[0].shape[1])])
        self._share()

    def _share(self) -> None:
        """Makes each table a part of the stack."""
        for table, part in zip(self, self.stacked.split([len(table.weight) for table in self] + [1]), strict=False):
            table.weight = nn.Parameter(part, requires_grad=False)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> StaticEmbeddingBags:
        """Moves the stack, instead of each table by itself."""
        self.stacked = function(self.stacked)
        self._share()
        return self

    def look_up(self, lookups: StaticLookups) -> Tensor:
        """Each row that occurs, once: (T * N + 1, D)."""
        return self.stacked.index_select(0, lookups.unique_rows)

    def pool(self, looked_up: Tensor, lookups: StaticLookups) -> Tensor:
        return embedding(lookups.positions, looked_up).sum(2).transpose(0, 1)


class StaticSGD(SparseOptimizer):
    """SGD on a `StaticEmbeddingBags`."""

    def __init__(self, embeddings: StaticEmbeddingBags, lr: float):
        super().__init__(embeddings, lr=lr)

    def update(self, embeddings: StaticEmbeddingBags, gradient: Tensor, lookups: StaticLookups) -> None:
        step = self.direction(gradient[:-1], lookups.unique_rows[:-1].long())  # the last row is padding's
        updated = embeddings.looked_up[:-1] - self.param_groups[0]["lr"] * step
        embeddings.stacked.index_copy_(0, lookups.unique_rows[:-1].long(), updated)

    def direction(self, gradient: Tensor, rows: Tensor) -> Tensor:
        return gradient


class StaticAdagrad(StaticSGD):
    """Adagrad on a `StaticEmbeddingBags`; `state[weight]["sum"]` is the moment, (rows, D) float32."""

    def __init__(self, embeddings: StaticEmbeddingBags, lr: float, eps: float = 1e-10):
        super().__init__(embeddings, lr=lr)
        self._eps = eps
        self._moments = torch.zeros_like(embeddings.stacked)
        sizes = [len(weight) for weight in embeddings.weights] + [1]
        for weight, moment in zip(embeddings.weights, self._moments.split(sizes), strict=False):
            self.state[weight]["sum"] = moment

    def direction(self, gradient: Tensor, rows: Tensor) -> Tensor:
        moments = self._moments.index_select(0, rows) + gradient.square()
        self._moments.index_copy_(0, rows, moments)
        return gradient / (moments.sqrt() + self._eps)


# ---------------------------------------------------------------------------------------------------------------------
# Gaudi's own kernels, which run in lazy mode alone. They are functions, unknown to autograd and autocast; a count on
# the device says how much of a tensor is valid, and what lies past it is undefined.
# ---------------------------------------------------------------------------------------------------------------------

SUM_BAGS = 1  # kernel_mode: bags of any length


class HpexEmbeddingBags(EmbeddingBags):
    """`hpex.kernels.EmbeddingBag`, a call for each table."""

    def look_up(self, lookups: PreparedLookups) -> Tensor:
        from habana_frameworks.torch.hpex.kernels import EmbeddingBag

        tables = zip(self.weights, lookups.indices_fwd, lookups.offsets, lookups.valid_count_fwd, strict=True)
        return torch.stack([EmbeddingBag.forward(*table, SUM_BAGS) for table in tables], dim=1)


class HpexAdagrad(SparseAdagrad):
    """`hpex.optimizers.SparseAdagrad`, whose eps is fixed at 1e-10, on gradients that `EmbeddingBag.backward` sums."""

    def __init__(self, embeddings: EmbeddingBags, lr: float):
        super().__init__(embeddings, lr)
        self._lr = torch.full((1,), lr, device=embeddings.weights[0].device)

    def update(self, embeddings: EmbeddingBags, gradient: Tensor, lookups: PreparedLookups) -> None:
        from habana_frameworks.torch.hpex.kernels import EmbeddingBag
        from habana_frameworks.torch.hpex.optimizers import SparseAdagrad

        for t, (weight, moment) in enumerate(zip(embeddings.weights, self.moments, strict=True)):
            by_row = gradient.new_empty(lookups.unique_indices.shape[1], gradient.shape[2])
            by_bag = gradient[:, t].contiguous()
            groups = lookups.output_rows[t], lookups.output_row_offsets[t], lookups.valid_count_bwd[t]
            EmbeddingBag.backward(by_row, by_bag, *groups, SUM_BAGS)
            rows = lookups.unique_indices[t], self._lr, lookups.unique_count[t]
            SparseAdagrad.forward(by_row, weight, moment, *rows)


def coalesce_lookups_by_plugin(
    indices: Sequence[Tensor], offsets: Tensor, table_rows: Sequence[int], *prepared: Tensor
) -> None:
    """What `dlrm::coalesce_lookups` does, by `hpex.kernels.EmbeddingBagPreproc`, on one core of the host."""
    from habana_frameworks.torch.hpex.kernels import EmbeddingBagPreproc

    into = PreparedLookups(*prepared)
    for t, (rows, starts) in enumerate(zip(indices, offsets, strict=True)):
        check_lookups(t, rows, starts, table_rows[t], into.indices_fwd.shape[1])
        into.indices_fwd[t, : len(rows)] = rows
        into.offsets[t] = starts
        # It sorts by as many bits as its last argument has: with less than the table's rows, some would occur twice.
        grouped = EmbeddingBagPreproc.forward(rows.int(), starts.int(), table_rows[t])
        into.unique_count[t], into.unique_indices[t, : len(rows)], into.output_rows[t, : len(rows)] = grouped[:3]
        into.output_row_offsets[t, : len(rows) + 1] = grouped[3]
        into.valid_count_fwd[t] = torch.tensor([len(starts), len(rows)])
        into.valid_count_bwd[t] = torch.tensor([int(grouped[0]) + 1, len(rows)])


# ---------------------------------------------------------------------------------------------------------------------
# Batches on the device
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class PreparedBatch:
    """A batch in tensors that keep their sizes and addresses, on the device."""

    dense: Tensor  # (B, dense features) float32
    target: Tensor  # (B, 1) float32
    lookups: PreparedLookups | StaticLookups

    @classmethod
    def allocate(cls, sizes: Sizes, lookups_type: type, **settings) -> PreparedBatch:
        """Tensors with `settings` such as device."""
        return cls(
            torch.empty(sizes.batch_size, sizes.num_dense, **settings),
            torch.empty(sizes.batch_size, 1, **settings),
            lookups_type.allocate(sizes, **settings),
        )

    def tensors(self) -> list[Tensor]:
        return [self.dense, self.target, *self.lookups.fields()]

    def copy_(self, other: PreparedBatch) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs, non_blocking=True)


class BatchPipeline:
    """Host preprocessing, a batch ahead: raw batches -> prepared batches on the device, always in the same tensors.

    While the device works on a batch, a host thread draws the next one and prepares it in the other of two sets of
    host buffers.
    """

    def __init__(self, data: RandomData, backend: Backend):
        sizes = Sizes(data.table_rows, data.batch_size, data.max_lookups_per_bag, data.num_dense_features)
        lookups = backend.embedding_bags.lookups_type
        host = {"device": torch.device("cpu"), "pin_memory": backend.copies}
        self._table_rows, self._backend = data.table_rows, backend
        self._host = [PreparedBatch.allocate(sizes, lookups, **host) for _ in range(2)]
        self._device = PreparedBatch.allocate(sizes, lookups, device=backend.device) if backend.copies else None
        self._host_is_free = [lambda: None, lambda: None]  # waits until the device has read the buffers
        self.data_ms: list[float] = []  # of each batch, on the host thread
        self.preprocess_ms: list[float] = []
        self.batches = self.lookups = self.unique_rows = 0  # so far, over all tables

    def run(self, batches: Iterable[Batch]) -> Iterator[PreparedBatch]:
        """RunError for lookups outside their table. A batch is to be used before the next one is asked for."""
        batches = iter(batches)
        with single_threaded_executor() as host_thread:
            ahead = host_thread.submit(self._prepare_next, batches, 0)
            for turn in itertools.cycle((0, 1)):
                if not ahead.result():
                    return
                prepared = self._to_device(turn)
                ahead = host_thread.submit(self._prepare_next, batches, 1 - turn)
                yield prepared

    def _prepare_next(self, batches: Iterator[Batch], turn: int) -> bool:
        """False when there is no next batch."""
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return False
        drawn = time.perf_counter()
        self._host_is_free[turn]()
        self._prepare(batch, self._host[turn])
        self.data_ms.append(1000 * (drawn - start))
        self.preprocess_ms.append(1000 * (time.perf_counter() - drawn))
        return True

    def _prepare(self, batch: Batch, into: PreparedBatch) -> None:
        into.dense.copy_(batch.dense)
        into.target.copy_(batch.target)
        try:
            grouped = into.lookups.fill(batch, self._table_rows, self._backend.coalesce_lookups)
        except (IndexError, ValueError) as error:
            raise RunError(str(error)) from error
        self.batches += 1
        self.lookups += int(grouped.valid_count_fwd[:, 1].sum())
        self.unique_rows += int(grouped.unique_count.sum())

    def _to_device(self, turn: int) -> PreparedBatch:
        if self._device is None:
            return self._host[turn]
        self._device.copy_(self._host[turn])
        self._host_is_free[turn] = self._backend.waiter()
        return self._device


def single_threaded_executor() -> ThreadPoolExecutor:
    """One host thread, on which torch's ops use one core and leave the others to the training step."""
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(1, thread_name_prefix="host")
    executor.submit(torch.set_num_threads, 1).result()  # holds for that thread, and for threads still to come
    torch.set_num_threads(threads)
    return executor


# ---------------------------------------------------------------------------------------------------------------------
# Back ends: all that differs from device to device
# ---------------------------------------------------------------------------------------------------------------------


class Backend:
    """What the training loop asks of a device. This class is right for the CPU, where work ends when a call returns."""

    fused_optimizers = True  # torch.optim's fused=True, one pass over all parameters
    wide_dtype = torch.float64  # for sums that the public script takes in it
    copies = False  # batches are copied from the host
    times_phases = True  # a time stamp within an iteration means something
    embedding_bags = EmbeddingBags
    sparse_optimizers: ClassVar = {"sgd": SparseSGD, "adagrad": SparseAdagrad}
    coalesce_lookups = staticmethod(torch.ops.dlrm.coalesce_lookups)

    def __init__(self, device: torch.device, options: Options):
        self.device, self.mode, self.data_type = device, options.mode, options.data_type
        self.kernels = load_kernels()  # of the host: native, or reference
        self.notes = []  # what the user should know before the run
        if options.device == "auto":
            self.notes.append(f"No Gaudi here ({why_no_gaudi()}): running on the CPU.")
        if options.mode == "lazy":
            self.notes.append("Lazy mode is a Gaudi's; here it equals eager mode.")

    @property
    def name(self) -> str:
        """The model of the device."""
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.data_type == "bf16")

    def compile(self, function: Callable) -> Callable:
        """`function` as `--mode` wants it; UsageError where that can't be."""
        if self.mode != "compile":
            return function
        if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
            raise UsageError("--mode=compile needs a C++ compiler; install g++, or use --mode=eager")
        return torch.compile(function, dynamic=False)

    def dense_optimizer(self, parameters: Iterable[nn.Parameter], options: Options) -> torch.optim.Optimizer:
        optimizers = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
        return optimizers[options.optimizer](parameters, lr=options.learning_rate, fused=self.fused_optimizers)

    def sparse_optimizer(self, embeddings: EmbeddingBags, options: Options) -> SparseOptimizer:
        return self.sparse_optimizers[options.optimizer](embeddings, lr=options.learning_rate)

    def mark_step(self) -> None:
        """Ends the recording of a graph, where a device records one."""

    def synchronize(self) -> None:
        """Waits until the device has done all it was given."""

    def waiter(self) -> Callable[[], None]:
        """A function that waits until the device has done what it was given up to now."""
        return lambda: None

    def timestamp(self):
        """A moment in the device's work, for `elapsed_ms`."""
        return time.perf_counter()

    def elapsed_ms(self, start, end) -> float:
        """Milliseconds from one `timestamp` to a later one; call after `synchronize`."""
        return 1000 * (end - start)

    def memory_limit(self) -> int:
        """Bytes that a new run can take."""
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(OSError), open("/proc/meminfo") as meminfo:
            available = dict(line.split(":") for line in meminfo)["MemAvailable"]
            limit = min(limit, 1024 * int(available.split()[0]))
        with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as container:
            limit = min(limit, int(container.read()))
        return limit

    def memory_in_use(self) -> tuple[int, int]:
        """Bytes in use now, and at most so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        with contextlib.suppress(OSError), open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), peak
        return peak, peak


class CudaBackend(Backend):
    """A CUDA GPU."""

    fused_optimizers = False
    copies = True
    embedding_bags = StaticEmbeddingBags
    sparse_optimizers: ClassVar = {"sgd": StaticSGD, "adagrad": StaticAdagrad}

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def waiter(self) -> Callable[[], None]:
        return self.timestamp().synchronize

    def timestamp(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start, end) -> float:
        return start.elapsed_time(end)

    def memory_limit(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def memory_in_use(self) -> tuple[int, int]:
        return torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)


class HpuBackend(Backend):
    """A Gaudi, through habana-torch-plugin 1.19 or newer.

    In lazy mode Adagrad runs on the plugin's kernels. Everywhere else, and for SGD (whose sparse kernel the plugin's
    source calls wrong), tables are read and updated by native operators of static shapes: the plugin's kernels refuse
    to run there, and torch's embedding bag and `index_add_` would silently run on the host.
    """

    fused_optimizers = False
    wide_dtype = torch.float32
    copies = True
    oldest = (1, 19)

    def __init__(self, device: torch.device, options: Options):
        super().__init__(device, options)
        import habana_frameworks.torch.core as htcore

        self.notes = gaudi_notes(options)
        self._htcore, self._lazy = htcore, options.mode == "lazy"
        self.times_phases = not self._lazy  # there, work starts at the end of the step
        if self._lazy and options.optimizer == "adagrad":
            self.embedding_bags, self.sparse_optimizers = HpexEmbeddingBags, {"adagrad": HpexAdagrad}
        else:
            self.embedding_bags = StaticEmbeddingBags
            self.sparse_optimizers = {"sgd": StaticSGD, "adagrad": StaticAdagrad}
        if options.lookup_preprocessing == "plugin":
            self.coalesce_lookups = coalesce_lookups_by_plugin
        if self._lazy:
            self._set_lazy_passes(options.optimizer)

    @staticmethod
    def _set_lazy_passes(optimizer: str) -> None:
        """As Habana's fork set them; the switches are private by now, and may go."""
        from habana_frameworks.torch.utils import debug

        passes = {"fuse_t_mm_optimization": True}
        if optimizer == "adagrad":
            passes |= {"eliminate_common_subexpression": False, "constant_pooling": False}
        for name, wanted in passes.items():
            getattr(debug, f"_enable_{name}", lambda flag: None)(wanted)

    @property
    def name(self) -> str:
        return torch.hpu.get_device_name()

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, backend="hpu_backend", dynamic=False) if self.mode == "compile" else function

    def dense_optimizer(self, parameters: Iterable[nn.Parameter], options: Options) -> torch.optim.Optimizer:
        if self._lazy and options.optimizer == "adagrad":
            from habana_frameworks.torch.hpex.optimizers import FusedAdagrad

            return FusedAdagrad(parameters, lr=options.learning_rate)
        optimizers = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
        return optimizers[options.optimizer](parameters, lr=options.learning_rate, foreach=True)

    def mark_step(self) -> None:
        if self._lazy:
            self._htcore.mark_step()

    def synchronize(self) -> None:
        self.mark_step()
        torch.hpu.synchronize()

    def waiter(self) -> Callable[[], None]:
        event = torch.hpu.Event()
        event.record()
        return event.synchronize

    def timestamp(self):
        event = torch.hpu.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start, end) -> float:
        return start.elapsed_time(end)

    def memory_limit(self) -> int:
        return torch.hpu.mem_get_info()[0]

    def memory_in_use(self) -> tuple[int, int]:
        return torch.hpu.memory_allocated(), torch.hpu.max_memory_allocated()


def gaudi_notes(options: Options) -> list[str]:
    notes = []
    if options.hmp_opt_level != "O1" or options.hmp_verbose:
        notes.append("--hmp-opt-level and --hmp-verbose do nothing: torch.autocast took the place of hmp.")
    return notes


def why_no_gaudi() -> str:
    """What keeps a Gaudi from being used; empty where nothing does."""
    if importlib.util.find_spec("habana_frameworks") is None:
        return "habana-torch-plugin is not installed"
    import habana_frameworks.torch.core  # noqa: F401 - brings torch.hpu

    return "" if torch.hpu.is_available() else "habana-torch-plugin finds no device"


def check_gaudi(options: Options) -> None:
    """UsageError, in one line that says what to do, where there is no Gaudi, or its plugin is old, or was loaded in the
    other mode."""
    if reason := why_no_gaudi():
        raise UsageError(
            f"--device=hpu: {reason}; use Intel's Gaudi container or installer, see what hl-smi prints and whether "
            "HABANA_VISIBLE_DEVICES is set, or use --device=cpu"
        )
    release = importlib.metadata.version("habana-torch-plugin")
    if tuple(map(int, release.split(".")[:2])) < HpuBackend.oldest:
        oldest = ".".join(map(str, HpuBackend.oldest))
        raise UsageError(f"--device=hpu: habana-torch-plugin {release} is too old; {oldest} or newer is needed")
    from habana_frameworks.torch.utils.internal import is_lazy

    if is_lazy() != (options.mode == "lazy"):
        needed = gaudi_environment(options)["PT_HPU_LAZY_MODE"]
        raise UsageError(
            f"--mode={options.mode} needs PT_HPU_LAZY_MODE={needed} before torch is imported; start demo_dlrm.py or "
            "dlrm_s_pytorch.py as a program"
        )


def select_backend(options: Options) -> Backend:
    """The back end that `--device` names; UsageError, saying what to do, where that device is not to be had."""
    if options.device == "hpu" or (options.device == "auto" and not why_no_gaudi()):
        check_gaudi(options)
        return HpuBackend(torch.device("hpu"), options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch finds no CUDA GPU here; use --device=cpu")
    if options.device == "cuda":
        return CudaBackend(torch.device("cuda", 0), options)
    keep_freed_memory()
    return Backend(torch.device("cpu"), options)
