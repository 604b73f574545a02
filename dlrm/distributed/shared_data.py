"""The part of a data set that one of several ranks needs: its own samples, and the lookups in its own tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dlrm.batch import Batch, Share, batch_sizes, samples_of_rank
from dlrm.data.data_set import Data
from dlrm.distributed.placement import Piece, Plan
from dlrm.errors import LocalError, RunError, UsageError
from dlrm.kernels.lookups import check_lookups


class SharedData:
    """For each batch, the dense features and targets of this rank's samples, and all samples' lookups in its pieces.

    It has the members of `Data`, but no share of a share. Its tables are the pieces that the rank holds.
    """

    def __init__(self, data: Data, plan: Plan, rank: int):
        self._data, self._rank, self._ranks = data, rank, len(plan.ranks)
        self._pieces = plan.ranks[rank]
        self._tables = tables_of(self._pieces)
        self.samples, self.batch_size = data.samples, data.batch_size
        self.num_dense_features, self.is_stored_by_sample = data.num_dense_features, data.is_stored_by_sample
        held = plan.held_pieces(rank)
        self.table_rows = [piece.rows for piece in held]
        self.max_lookups_per_bag = [data.max_lookups_per_bag[piece.table] for piece in held]
        self._whole_bags = self._find_whole_bags()

    def _find_whole_bags(self) -> Callable[[Batch], Batch]:
        try:
            return self._data.whole_bags(self._tables)
        except UsageError as error:
            raise LocalError(f"rank {self._rank}: {error}") from error

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, first: int = 0, width: int = 1) -> Iterator[Batch]:
        """Yields the batches of an epoch from batch `first` on, each `width` of them joined into one. Raises
        LocalError for a lookup outside its table."""
        return map(self._in_pieces, map(self._whole_bags, self._in_tables(first, width)))

    def _in_tables(self, first: int, width: int) -> Iterator[Batch]:
        """Yields batches with the lookups in the tables of which this rank has a piece."""
        return self._data.batches(first, width, Share(self._samples(self._rank, width), self._tables))

    def _samples(self, rank: int, width: int) -> slice:
        """Returns the samples of a rank in `width` joined batches."""
        samples = samples_of_rank(width * self._data.batch_size, self._ranks)
        return slice(rank * samples, (rank + 1) * samples)

    def _in_pieces(self, batch: Batch) -> Batch:
        """Returns the batch with lookups in pieces instead of lookups in tables."""
        no_lookups = torch.zeros(0, dtype=torch.int64), torch.zeros(batch.bags + 1, dtype=torch.int64)
        bags = [self._in_piece(piece, batch) for piece in self._pieces] or [no_lookups]
        indices, offsets = zip(*bags, strict=True)
        return Batch(batch.dense, list(indices), torch.stack(offsets), batch.target)

    def _in_piece(self, piece: Piece, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the lookups of a table that fall in a piece, and where each bag starts among them."""
        place, rows = self._tables.index(piece.table), self._data.table_rows[piece.table]
        indices, offsets = batch.indices[place], batch.offsets[place]
        if len(indices) and not 0 <= indices.min() <= indices.max() < rows:
            try:
                check_lookups(piece.table, indices, offsets, rows, len(indices))
            except IndexError as error:
                raise LocalError(f"rank {self._rank}: {error}") from error
        if piece.rows == rows:
            return indices, offsets
        inside = (indices >= piece.first_row) & (indices < piece.first_row + piece.rows)
        inside_before = functional.pad(inside.cumsum(0), (1, 0))  # for each lookup, how many before it are inside
        return indices[inside] - piece.first_row, inside_before[offsets]


class SharedRows(SharedData):
    """A rank's part of data that are stored by sample.

    A rank reads the rows of its own samples alone. Then each rank sends to each other one the stored lookups in that
    one's tables, of which each sample has the same number.
    """

    def __init__(self, data: Data, plan: Plan, rank: int, group: dist.ProcessGroup):
        """`group`: all ranks, on the host, for this exchange alone."""
        super().__init__(data, plan, rank)
        self._group, self._tables_of_ranks = group, [tables_of(pieces) for pieces in plan.ranks]

    def _in_tables(self, first: int, width: int) -> Iterator[Batch]:
        all_tables = list(range(len(self._data.table_rows)))
        share = Share(self._samples(self._rank, width), all_tables)
        read = self._name_rank_in_errors(self._data.batches(first, width, share))
        sizes = batch_sizes(self._data.samples, self._data.batch_size, first, width)
        return map(partial(self._exchange_lookups, width), read, sizes)

    def _name_rank_in_errors(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches. An error is this rank's own, as other ranks read other rows."""
        try:
            yield from batches
        except RunError as error:
            raise LocalError(f"rank {self._rank}: {error}") from error

    def _exchange_lookups(self, width: int, batch: Batch, size: int) -> Batch:
        """Returns the lookups of all `size` samples in this rank's tables; `batch` has those of this rank's samples in
        all tables."""
        counts = [len(range(size)[self._samples(rank, width)]) for rank in range(self._ranks)]
        lookups_per_bag = self._data.stored_lookups_per_bag
        own = [lookups_per_bag[table] for table in self._tables]
        sent = torch.cat([batch.indices[table] for tables in self._tables_of_ranks for table in tables])
        sizes_sent = [len(batch) * sum(lookups_per_bag[table] for table in tables) for tables in self._tables_of_ranks]
        sizes_received = [count * sum(own) for count in counts]
        received = sent.new_empty(sum(sizes_received))
        dist.all_to_all_single(received, sent, sizes_received, sizes_sent, group=self._group)
        by_rank = [part.split([count * lookups for lookups in own])
                   for part, count in zip(received.split(sizes_received), counts, strict=True)]  # fmt: skip
        offsets = torch.tensor(own, dtype=torch.int64)[:, None] * torch.arange(size + 1)
        return Batch(batch.dense, list(map(torch.cat, zip(*by_rank, strict=True))), offsets, batch.target)


def tables_of(pieces: Sequence[Piece]) -> list[int]:
    """Returns the tables that these pieces belong to, in ascending order."""
    return sorted({piece.table for piece in pieces})
