"""Embedding bags and their update out of native operators of static shapes.

They are for devices on which the ops of `ops.py` have no kernels, and where a size that depends on the data costs a
recompilation or a wait. Bags are padded with a row of zeros, and groups with a gradient of zero: what is padded is
thrown away, or written back as it was.

B batch, T tables, D embedding dimension, N room for lookups in all tables, L room for lookups per bag of a table.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.batch import Batch
from dlrm.errors import UsageError
from dlrm.kernels.embedding import EmbeddingBags, EmbeddingTable, LearningRate, SparseOptimizer
from dlrm.kernels.lookups import Lookups, PreparedLookups, Sizes
from dlrm.options import INT32_MAX


@dataclass
class StaticLookups(Lookups):
    """The lookups of a batch in tables that are stacked into one, with a row of zeros below them."""

    sizes: Sizes
    unique_rows: Tensor  # (N + 1,) int32; the rows that occur, each table's in its own room; the rest is the zero row
    positions: Tensor  # (N,) int32; (B, L) in a table: the place of each lookup in `unique_rows`; the rest is the last

    @staticmethod
    def shapes(sizes: Sizes) -> list[tuple[int, ...]]:
        room = sum(sizes.max_lookups)
        return [(room + 1,), (room,)]

    @classmethod
    def of(cls, sizes: Sizes, tensors: Iterable[Tensor]) -> StaticLookups:
        return cls(sizes, *tensors)

    @functools.cached_property
    def grouped(self) -> PreparedLookups:
        """Where the host groups the lookups of a batch before it fills the tensors."""
        return PreparedLookups.allocate(self.sizes)

    def fill(self, batch: Batch, table_rows: Sequence[int], coalesce: Callable[..., None]) -> PreparedLookups:
        """Fills the tensors from a raw batch, on the host, and returns the grouped lookups that they were made from.

        See `PreparedLookups.fill` for the arguments and errors.
        """
        grouped = self.grouped.fill(batch, table_rows, coalesce)
        torch.ops.dlrm.pad_lookups(grouped.offsets, *grouped.grouped(), table_rows, self.unique_rows, self.positions)
        return grouped


class StaticEmbeddingBags(EmbeddingBags):
    """Tables that share one storage, the stack, so that one operator serves all of them."""

    lookups_type = StaticLookups

    def __init__(self, tables: Iterable[Tensor], origins: Sequence[tuple[int, int]] = ()):
        super().__init__(tables, origins)
        rows = sum(map(len, self.weights))
        if rows >= INT32_MAX:
            raise UsageError(
                f"--arch-embedding-size: {rows:,} rows in all are too many for {type(self).__name__}, which finds them "
                f"by int32; use more ranks (--world_size)"
            )
        self.stacked = torch.empty(rows + 1, self.weights[0].shape[1])
        self.stacked[-1] = 0
        for table, part in self._parts():  # one by one, so that the memory of a copied table can be given back
            table.weight = nn.Parameter(part.copy_(table.weight), requires_grad=False)

    @staticmethod
    def bytes_per_lookup(dim: int) -> int:
        """Returns the bytes on the device that a lookup of a batch takes: two int32, its row, once more in its bag, and
        the gradients of both."""
        return 8 + 4 * 4 * dim

    def _parts(self) -> Iterator[tuple[EmbeddingTable, Tensor]]:
        """Yields each table and its part of the stack."""
        return zip(self, self.stacked.split([*map(len, self.weights), 1]), strict=False)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> StaticEmbeddingBags:
        """Moves the stack in one piece, where nn.Module would move each table by itself."""
        self.stacked = function(self.stacked)
        for table, part in self._parts():
            table.weight = nn.Parameter(part, requires_grad=False)
        return self

    def read(self, lookups: StaticLookups) -> Tensor:
        """Returns each row that occurs, once, (N + 1, D)."""
        return self.stacked.index_select(0, lookups.unique_rows)

    def pool(self, rows: Tensor, lookups: StaticLookups) -> Tensor:
        """Returns the sum over each bag, (B, T, D). Neighbouring tables with equally long bags take one operator."""
        runs = [(longest, len(list(tables))) for longest, tables in itertools.groupby(lookups.sizes.lookups_per_bag)]
        bags = lookups.sizes.batch_size
        looked_up = functional.embedding(lookups.positions, rows).split([bags * size * count for size, count in runs])
        pooled = [part.view(count, bags, size, -1).sum(2) for part, (size, count) in zip(looked_up, runs, strict=True)]
        return (torch.cat(pooled) if len(pooled) > 1 else pooled[0]).transpose(0, 1)


class StaticOptimizer(SparseOptimizer):
    """Moves the rows of a `StaticEmbeddingBags` against the direction that a subclass computes."""

    embeddings: StaticEmbeddingBags

    def update(self, rows: Tensor, lookups: StaticLookups) -> None:
        """`rows`: (N + 1, D), with their gradient; the last row is the padding's."""
        places = lookups.unique_rows[:-1].long()
        step = self.param_groups[0]["lr"] * self.direction(rows.grad[:-1], places)
        self.embeddings.stacked.index_copy_(0, places, rows[:-1] - step)

    def direction(self, gradient: Tensor, places: Tensor) -> Tensor:
        """Returns the step for a learning rate of 1. `gradient` (n, D) is that of rows `places` (n,) of the stack."""
        raise NotImplementedError


class StaticSGD(StaticOptimizer):
    """SGD on a `StaticEmbeddingBags`."""

    def __init__(self, embeddings: StaticEmbeddingBags, lr: LearningRate):
        super().__init__(embeddings, lr=lr)

    def direction(self, gradient: Tensor, places: Tensor) -> Tensor:
        return gradient


class StaticAdagrad(StaticOptimizer):
    """Adagrad on a `StaticEmbeddingBags`. The moment, `state[weight]["sum"]`, is (rows, D) float32."""

    def __init__(
        self,
        embeddings: StaticEmbeddingBags,
        lr: LearningRate,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
    ):
        super().__init__(embeddings, lr=lr)
        self._eps = eps
        self._moments = self.new_moments(embeddings.stacked, initial_accumulator_value)
        sizes = [len(weight) for weight in embeddings.weights] + [1]
        for weight, moment in zip(embeddings.weights, self._moments.split(sizes), strict=False):
            self.state[weight]["sum"] = self.moment_of_table(moment)

    def direction(self, gradient: Tensor, places: Tensor) -> Tensor:
        moments = self._moments.index_select(0, places) + self.squares(gradient)
        self._moments.index_copy_(0, places, moments)
        return gradient / (moments.sqrt() + self._eps)

    @staticmethod
    def new_moments(stacked: Tensor, value: float) -> Tensor:
        return torch.full_like(stacked, value)

    @staticmethod
    def moment_of_table(moment: Tensor) -> Tensor:
        """Returns a table's part of the moments in the shape that checkpoints have."""
        return moment

    @staticmethod
    def squares(gradient: Tensor) -> Tensor:
        """Returns what a gradient (n, D) adds to the moments."""
        return gradient.square()


class StaticRowwiseAdagrad(StaticAdagrad):
    """Row-wise Adagrad on a `StaticEmbeddingBags`. The moment, `state[weight]["sum"]`, is (rows,) float32."""

    @staticmethod
    def new_moments(stacked: Tensor, value: float) -> Tensor:
        return stacked.new_full((len(stacked), 1), value)

    @staticmethod
    def moment_of_table(moment: Tensor) -> Tensor:
        return moment.squeeze(1)

    @staticmethod
    def squares(gradient: Tensor) -> Tensor:
        return gradient.square().mean(1, keepdim=True)
