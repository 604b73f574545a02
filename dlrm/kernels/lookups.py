"""The lookups of a batch, prepared on the host: checked, grouped by row, in tensors whose sizes never change.

B batch, T tables, N room for lookups in all tables, U rows that the lookups of one table hit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dlrm.batch import Batch


class Sizes(NamedTuple):
    """The numbers that decide the sizes of a batch's tensors."""

    table_rows: Sequence[int]
    batch_size: int  # B
    lookups_per_bag: Sequence[int]  # at most, in each table
    num_dense: int
    ranks: int = 1  # that share the dense features and targets of the samples

    @property
    def max_lookups(self) -> list[int]:
        """The room for lookups in each table; N in all."""
        return [self.batch_size * lookups for lookups in self.lookups_per_bag]


class Lookups:
    """What prepared lookups of any form have in common: they carry the rows that were read for them.

    The tables are not leaves of autograd, but the rows read from them are. A forward pass puts them here, its backward
    pass leaves their gradient in `rows.grad`, and the sparse optimizer takes it from here.
    """

    rows: Tensor | None = None

    @staticmethod
    def shapes(sizes: Sizes) -> list[tuple[int, ...]]:
        """Returns the shape of each tensor that travels to the device. All of them are int32."""
        raise NotImplementedError

    @classmethod
    def of(cls, sizes: Sizes, tensors: Iterable[Tensor]) -> Lookups:
        """Returns lookups in tensors that have the `shapes` of these sizes."""
        raise NotImplementedError

    @classmethod
    def allocate(cls, sizes: Sizes) -> Lookups:
        """Returns lookups of zeros, on the host."""
        return cls.of(sizes, [torch.zeros(shape, dtype=torch.int32) for shape in cls.shapes(sizes)])


class TableLookups(NamedTuple):
    """The lookups of a batch in one table, which are a part of a `PreparedLookups`; n is the room for them."""

    indices_fwd: Tensor  # (n,)
    offsets: Tensor  # (B + 1,)
    valid_count_fwd: Tensor  # (2,)
    unique_indices: Tensor  # (n,)
    output_rows: Tensor  # (n,)
    output_row_offsets: Tensor  # (n + 1,)
    valid_count_bwd: Tensor  # (2,)
    unique_count: Tensor  # (1,)


@dataclass
class PreparedLookups(Lookups):
    """The lookups of a batch in T tables, as the kernels take them. All tensors are int32.

    The sizes never change: `unique_count` and the valid counts say how much of each tensor counts. The counts are in
    the form that a Gaudi's kernels take. Each table has its own room for lookups, one after the other.
    """

    max_lookups: Sequence[int]  # the room for lookups in each table
    indices_fwd: Tensor  # (N,) rows in the order of the lookups; the rest of a table's room is unused
    offsets: Tensor  # (T, B + 1) start of each bag; the last entry is the number of lookups
    valid_count_fwd: Tensor  # (T, 2) [B + 1, lookups]
    unique_indices: Tensor  # (N,) each row that occurs once, ascending, U of them in a table
    output_rows: Tensor  # (N,) bag of each lookup, the lookups being grouped by row
    output_row_offsets: Tensor  # (N + T,) start of each row's group; entry U of a table is its number of lookups
    valid_count_bwd: Tensor  # (T, 2) [U + 1, lookups]
    unique_count: Tensor  # (T, 1) U

    @staticmethod
    def shapes(sizes: Sizes) -> list[tuple[int, ...]]:
        tables, room = len(sizes.max_lookups), sum(sizes.max_lookups)
        return [(room,), (tables, sizes.batch_size + 1), (tables, 2), (room,), (room,), (room + tables,), (tables, 2),
                (tables, 1)]  # fmt: skip

    @classmethod
    def of(cls, sizes: Sizes, tensors: Iterable[Tensor]) -> PreparedLookups:
        return cls(sizes.max_lookups, *tensors)

    def fields(self) -> list[Tensor]:
        """Returns all tensors, in the order that `dlrm::coalesce_lookups` takes them in."""
        return [getattr(self, name) for name in TableLookups._fields]

    def bagged(self) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Returns what the forward pass needs: the lookups in bags, and the room for them in each table."""
        return self.indices_fwd, self.offsets, self.max_lookups

    def grouped(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Sequence[int]]:
        """Returns what the update needs: the lookups grouped by row, and the room for them in each table."""
        groups = self.unique_indices, self.output_rows, self.output_row_offsets, self.unique_count
        return *groups, self.max_lookups

    def by_table(self) -> list[TableLookups]:
        """Returns the lookups of each table, in tensors that share the memory of these."""
        rooms = list(self.max_lookups)
        return list(map(
            TableLookups,
            self.indices_fwd.split(rooms),
            self.offsets,
            self.valid_count_fwd,
            self.unique_indices.split(rooms),
            self.output_rows.split(rooms),
            self.output_row_offsets.split([room + 1 for room in rooms]),
            self.valid_count_bwd,
            self.unique_count,
        ))  # fmt: skip

    def fill(self, batch: Batch, table_rows: Sequence[int], coalesce: Callable[..., None]) -> PreparedLookups:
        """Fills the tensors from a raw batch, on the host, and returns itself.

        `coalesce` is `torch.ops.dlrm.coalesce_lookups` or a function with the same meaning. Raises IndexError for a
        lookup outside its table and ValueError for offsets that are not offsets.
        """
        coalesce(batch.indices, batch.offsets, table_rows, self.max_lookups, *self.fields())
        return self


def check_lookups(table: int, indices: Tensor, offsets: Tensor, table_rows: int, max_lookups: int) -> None:
    """Raises ValueError for offsets that are not offsets, and IndexError for a lookup outside the table.

    `indices`: (lookups,); `offsets`: (B + 1,). The error names table and sample.
    """
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
