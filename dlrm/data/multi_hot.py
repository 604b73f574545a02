"""Expands each category of a sample to a bag of several rows, as MLPerf's DLRM-dcnv2 does.

The numbers are those of MLPerf's program (`multi_hot.py` of mlcommons/training, recommendation_v2): row r of a table
always comes with the same other rows, which are drawn once, for one row and one table after the other. MLPerf writes
the bags to the disk, 3.8 TB for Criteo's Terabyte data; here only the drawn rows are kept, in memory.

n rows of a table, L lookups per bag in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dlrm.batch import Batch
from dlrm.errors import UsageError
from dlrm.system.memory import free_memory

SEED = 0  # MLPerf's, whatever the other seeds are
PARETO_SHAPE = 0.25
DRAWN_AT_ONCE = 2**22  # numbers, which are twice as wide as those that are kept

Draw = Callable[[np.random.RandomState, int, tuple[int, int]], np.ndarray]


def uniform_rows(generator: np.random.RandomState, rows: int, shape: tuple[int, int]) -> np.ndarray:
    """Returns rows that are all equally frequent, in an array of that shape."""
    return generator.randint(0, rows, size=shape)


def pareto_rows(generator: np.random.RandomState, rows: int, shape: tuple[int, int]) -> np.ndarray:
    """Returns skewed rows: numbers of a Pareto distribution, cut down to int32, modulo the number of rows. Those beyond
    int32 count as the smallest int32, as conversions on x86 make them."""
    drawn = generator.pareto(PARETO_SHAPE, size=shape)
    return np.where(drawn < 2**31, drawn, -(2**31)).astype(np.int32) % rows


DISTRIBUTIONS: dict[str, Draw] = {"uniform": uniform_rows, "pareto": pareto_rows}


class MultiHot:
    """The rows that come with each row of some tables. They are drawn when the tables are named, but once."""

    def __init__(self, table_rows: Sequence[int], sizes: Sequence[int], distribution: str):
        """`sizes`: L of each table."""
        self.sizes = sizes
        self._table_rows, self._draw = table_rows, DISTRIBUTIONS[distribution]
        self._kept: dict[tuple[int, ...], dict[int, Tensor]] = {}  # what was drawn for some tables

    def for_tables(self, tables: Sequence[int]) -> Callable[[Batch], Batch]:
        """Returns a function that expands a batch with one lookup per bag in these tables. Raises UsageError if memory
        has no room for the rows that come with those of the tables."""
        wanted = tuple(table for table in tables if self.sizes[table] > 1)
        if not wanted:
            return lambda batch: batch
        if wanted not in self._kept:
            self._kept[wanted] = self._drawn(wanted)
        return partial(self._expanded, tables, self._kept[wanted])

    def _drawn(self, tables: Sequence[int]) -> dict[int, Tensor]:
        """Returns the rows that come with each row of these tables, (n, L - 1). Draws for all tables in their order, as
        each one's numbers depend on those before."""
        needed, free = 4 * sum(self._table_rows[table] * (self.sizes[table] - 1) for table in tables), free_memory()
        if needed > free:
            raise UsageError(
                f"--multi-hot-sizes: the rows that come with each row take {needed / 2**30:,.1f} GiB, but only "
                f"{free / 2**30:,.1f} GiB are free; lower --max-ind-range"
            )
        generator, kept = np.random.RandomState(SEED), {}
        for table, rows in enumerate(self._table_rows[: max(tables) + 1]):
            count = self.sizes[table] - 1
            drawn = np.empty((rows, count), dtype=np.int32) if table in tables else None
            for begin, part in blocks_of_rows(generator, self._draw, rows, count):
                if drawn is not None:
                    drawn[begin : begin + len(part)] = part
            if drawn is not None:
                kept[table] = torch.from_numpy(drawn)
        return kept

    def _expanded(self, tables: Sequence[int], others: dict[int, Tensor], batch: Batch) -> Batch:
        """Returns the batch with the lookups in `others` behind the one that each bag has."""
        sizes = torch.tensor([self.sizes[table] for table in tables], dtype=torch.int64)
        indices = [
            torch.cat([rows[:, None], others[table][rows]], dim=1).flatten() if table in others else rows
            for table, rows in zip(tables, batch.indices, strict=True)
        ]
        return replace(batch, indices=indices, offsets=sizes[:, None] * torch.arange(batch.bags + 1))


def blocks_of_rows(
    generator: np.random.RandomState, draw: Draw, rows: int, count: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields `count` drawn rows for each row of a table, a block of rows at a time: its first row, and the drawn ones,
    (rows of the block, count)."""
    step = max(1, DRAWN_AT_ONCE // max(1, count))
    for begin in range(0, rows if count else 0, step):
        yield begin, draw(generator, rows, (min(step, rows - begin), count))
