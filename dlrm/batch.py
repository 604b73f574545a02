"""A batch, and what is done with one wherever it comes from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass
class Batch:
    """B samples. Bag b of table t is `indices[t][offsets[t, b] : offsets[t, b + 1]]`."""

    dense: Tensor  # (B, dense features) float32
    indices: list[Tensor]  # for each table (lookups,) int32 or int64
    offsets: Tensor  # (T, B + 1) int64
    target: Tensor  # (B, 1) float32

    def __len__(self) -> int:
        return len(self.target)

    @property
    def bags(self) -> int:
        """Of a table. More than samples where this is what one of several ranks has of a batch."""
        return self.offsets.shape[1] - 1


def padded(batch: Batch, samples: int, bags: int) -> Batch:
    """The batch with samples of zeros and empty bags behind its own, so many in all."""
    missing, missing_bags = samples - len(batch), bags - batch.bags
    if not missing and not missing_bags:
        return batch
    below = (0, 0, 0, missing)
    return Batch(
        dense=pad(batch.dense, below),
        indices=batch.indices,
        offsets=torch.cat([batch.offsets, batch.offsets[:, -1:].expand(-1, missing_bags)], dim=1),
        target=pad(batch.target, below),
    )


class Share(NamedTuple):
    """Of a batch, what a rank needs: dense features and targets of its samples, all lookups in its tables."""

    samples: slice
    tables: list[int]

    def of(self, batch: Batch) -> Batch:
        indices = [batch.indices[table] for table in self.tables]
        return Batch(batch.dense[self.samples], indices, batch.offsets[self.tables], batch.target[self.samples])

    def of_part(self, start: int) -> Share:
        """Of the part of the batch that begins at sample `start`."""
        begin, end = (max(0, sample - start) for sample in (self.samples.start, self.samples.stop))
        return Share(slice(begin, end), self.tables)


def batch_sizes(samples: int, batch_size: int, first: int = 0, width: int = 1) -> Iterator[int]:
    """Of the batches of an epoch from the given one on, each `width` as one; the last may be smaller."""
    for start in range(first * batch_size, samples, width * batch_size):
        yield min(width * batch_size, samples - start)


def samples_of_rank(batch_size: int, ranks: int) -> int:
    """Room for samples of a batch on each of its ranks; the last of them may have less."""
    return -(-batch_size // ranks)


def joined(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Each `count` batches as one."""
    if count == 1:
        yield from batches
        return
    batches = iter(batches)
    while parts := list(itertools.islice(batches, count)):
        lookups = [[0] * len(parts[0].indices), *([len(indices) for indices in part.indices] for part in parts)]
        starts = torch.tensor(lookups).cumsum(0)  # (parts + 1, T) lookups before each part
        ends = [part.offsets[:, 1:] + start[:, None] for part, start in zip(parts, starts, strict=False)]
        yield Batch(
            dense=torch.cat([part.dense for part in parts]),
            indices=[torch.cat(of_table) for of_table in zip(*(part.indices for part in parts), strict=True)],
            offsets=torch.cat([parts[0].offsets[:, :1], *ends], dim=1),
            target=torch.cat([part.target for part in parts]),
        )


def bag_sizes(uniforms: np.ndarray, largest: int) -> np.ndarray:
    """The size of a bag that the public script draws with each uniform: u * largest, half to even, at least 1."""
    return np.rint(np.maximum(1.0, uniforms * largest)).astype(np.int64)
