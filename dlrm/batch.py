"""A raw batch, as every source of data gives it: padding it, joining several into one, and a rank's share of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass
class Batch:
    """B samples and their lookups in T tables. Bag b of table t is `indices[t][offsets[t, b] : offsets[t, b + 1]]`."""

    dense: Tensor  # (B, dense features) float32
    indices: list[Tensor]  # one tensor per table, (lookups,) int32 or int64
    offsets: Tensor  # (T, bags + 1) int64
    target: Tensor  # (B, 1) float32

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.target)

    @property
    def bags(self) -> int:
        """Bags per table. Larger than the number of samples on one of several ranks, which has all lookups of its
        tables but only its own samples."""
        return self.offsets.shape[1] - 1


def padded(batch: Batch, samples: int, bags: int) -> Batch:
    """Returns the batch with samples of zeros and with empty bags at the end, `samples` and `bags` in all."""
    missing_samples, missing_bags = samples - len(batch), bags - batch.bags
    if not missing_samples and not missing_bags:
        return batch
    rows_below = (0, 0, 0, missing_samples)
    return Batch(
        dense=pad(batch.dense, rows_below),
        indices=batch.indices,
        offsets=torch.cat([batch.offsets, batch.offsets[:, -1:].expand(-1, missing_bags)], dim=1),
        target=pad(batch.target, rows_below),
    )


class Share(NamedTuple):
    """The part of a batch that one rank asks for: the dense features and targets of some samples, and the lookups in
    some tables."""

    samples: slice
    tables: list[int]

    @classmethod
    def whole(cls, samples: int, tables: int) -> Share:
        """Returns the share of a single rank: everything in a batch of so many samples and tables."""
        return cls(slice(0, samples), list(range(tables)))

    def cut_from(self, batch: Batch) -> Batch:
        """Returns this share of `batch`, with the lookups of all its samples."""
        indices = [batch.indices[table] for table in self.tables]
        return Batch(batch.dense[self.samples], indices, batch.offsets[self.tables], batch.target[self.samples])

    def in_batch_from(self, start: int) -> Share:
        """Returns the part of this share of a joined batch that lies in the single batch which begins at sample
        `start`. Samples of the result count from there."""
        begin, end = (max(0, sample - start) for sample in (self.samples.start, self.samples.stop))
        return Share(slice(begin, end), self.tables)


def batch_sizes(samples: int, batch_size: int, first: int = 0, width: int = 1) -> Iterator[int]:
    """Yields the number of samples in each batch of an epoch of `samples` samples, from batch `first` on, where each
    `width` batches are joined into one. The last one may be smaller."""
    for start in range(first * batch_size, samples, width * batch_size):
        yield min(width * batch_size, samples - start)


def samples_of_rank(batch_size: int, ranks: int) -> int:
    """Returns how many samples of a batch each rank gets at most. The last ranks may get fewer."""
    return -(-batch_size // ranks)


def joined(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yields each `count` batches joined into one. Those at the end, if they are fewer, are joined as well."""
    if count == 1:
        yield from batches
        return
    batches = iter(batches)
    while group := list(itertools.islice(batches, count)):
        lookups = [[0] * len(group[0].indices), *([len(indices) for indices in batch.indices] for batch in group)]
        lookups_before = torch.tensor(lookups).cumsum(0)  # (batches + 1, T): in the batches before each one
        ends = [batch.offsets[:, 1:] + before[:, None] for batch, before in zip(group, lookups_before, strict=False)]
        yield Batch(
            dense=torch.cat([batch.dense for batch in group]),
            indices=[torch.cat(of_table) for of_table in zip(*(batch.indices for batch in group), strict=True)],
            offsets=torch.cat([group[0].offsets[:, :1], *ends], dim=1),
            target=torch.cat([batch.target for batch in group]),
        )
