"""The lookups of a batch, prepared on the host: checked, grouped by row, in tensors whose sizes never change.

B batch, T tables, N largest number of lookups per table and batch, U rows that the lookups of one table hit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dlrm.batch import Batch


class Sizes(NamedTuple):
    """The numbers that decide the sizes of a batch's tensors."""

    table_rows: Sequence[int]
    batch_size: int  # B
    lookups_per_bag: int  # at most
    num_dense: int
    ranks: int = 1  # that share the dense features and targets of the samples

    @property
    def max_lookups(self) -> int:
        """N, the room for lookups per table."""
        return self.batch_size * self.lookups_per_bag


class Lookups:
    """What prepared lookups of any form have in common: they carry the rows that were read for them.

    The tables are not leaves of autograd, but the rows read from them are. A forward pass puts them here, its backward
    pass leaves their gradient in `rows.grad`, and the sparse optimizer takes it from here.
    """

    rows: Tensor | None = None


@dataclass
class PreparedLookups(Lookups):
    """The lookups of a batch in T tables, as the kernels take them. All tensors are int32.

    The sizes never change: `unique_count` and the valid counts say how much of each tensor counts. The counts are in
    the form that a Gaudi's kernels take.
    """

    indices_fwd: Tensor  # (T, N) rows in the order of the lookups; the rest is unused
    offsets: Tensor  # (T, B + 1) start of each bag; the last entry is the number of lookups
    valid_count_fwd: Tensor  # (T, 2) [B + 1, lookups]
    unique_indices: Tensor  # (T, N) each row that occurs once, ascending, U of them
    output_rows: Tensor  # (T, N) bag of each lookup, the lookups being grouped by row
    output_row_offsets: Tensor  # (T, N + 1) start of each row's group; entry U is the number of lookups
    valid_count_bwd: Tensor  # (T, 2) [U + 1, lookups]
    unique_count: Tensor  # (T, 1) U

    @staticmethod
    def shapes(num_tables: int, batch_size: int, max_lookups: int) -> list[tuple[int, int]]:
        """Returns the shape of each field; `max_lookups` is N."""
        widths = (max_lookups, batch_size + 1, 2, max_lookups, max_lookups, max_lookups + 1, 2, 1)
        return [(num_tables, width) for width in widths]

    @classmethod
    def allocate(cls, sizes: Sizes, **settings) -> PreparedLookups:
        """Returns lookups of zeros. `settings` go to torch.zeros: device, pin_memory."""
        shapes = cls.shapes(len(sizes.table_rows), sizes.batch_size, sizes.max_lookups)
        return cls(*(torch.zeros(shape, dtype=torch.int32, **settings) for shape in shapes))

    def fields(self) -> list[Tensor]:
        """Returns all tensors, in the order that `dlrm::coalesce_lookups` takes them in."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def grouped(self) -> tuple[Tensor, ...]:
        """Returns the tensors that the update of the tables needs: the lookups grouped by row."""
        return self.unique_indices, self.output_rows, self.output_row_offsets, self.unique_count

    def fill(self, batch: Batch, table_rows: Sequence[int], coalesce: Callable[..., None]) -> PreparedLookups:
        """Fills the tensors from a raw batch, on the host, and returns itself.

        `coalesce` is `torch.ops.dlrm.coalesce_lookups` or a function with the same meaning. Raises IndexError for a
        lookup outside its table and ValueError for offsets that are not offsets.
        """
        coalesce(batch.indices, batch.offsets, table_rows, *self.fields())
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
