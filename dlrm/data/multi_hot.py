"""Expands each category of a sample to a bag of several rows, as MLPerf's DLRM-dcnv2 does.

The numbers are those of MLPerf's program (`multi_hot.py` of mlcommons/training, recommendation_v2): row r of a table
always comes with the same other rows, which are drawn once, for one row and one table after the other. MLPerf writes
the bags to the disk, 3.8 TB for Criteo's Terabyte data; here only the drawn rows are kept, in memory.

n rows of a table, L lookups per bag in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

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
    """The rows that come with each row of each table."""

    def __init__(self, table_rows: Sequence[int], sizes: Sequence[int], distribution: str):
        """`sizes`: L of each table. Raises UsageError if memory has no room for the drawn rows."""
        self.sizes = sizes
        needed, free = 4 * sum(n * (size - 1) for n, size in zip(table_rows, sizes, strict=True)), free_memory()
        if needed > free:
            raise UsageError(
                f"--multi-hot-sizes: the rows that come with each row take {needed / 2**30:,.1f} GiB, but only "
                f"{free / 2**30:,.1f} GiB are free; lower --max-ind-range"
            )
        generator, draw = np.random.RandomState(SEED), DISTRIBUTIONS[distribution]
        self._others = [drawn_rows(generator, draw, n, size - 1) for n, size in zip(table_rows, sizes, strict=True)]

    def expand(self, rows: Tensor, table: int) -> Tensor:
        """Returns the lookups in a table, (B * L,) int32, of the bags whose first lookups are `rows`, (B,) int32."""
        if self.sizes[table] == 1:
            return rows
        return torch.cat([rows[:, None], self._others[table][rows]], dim=1).flatten()


def drawn_rows(generator: np.random.RandomState, draw: Draw, rows: int, count: int) -> Tensor:
    """Returns `count` drawn rows for each row of a table, (rows, count) int32."""
    drawn = np.empty((rows, count), dtype=np.int32)
    step = max(1, DRAWN_AT_ONCE // max(1, count))
    for begin in range(0, rows if count else 0, step):
        part = drawn[begin : begin + step]
        part[:] = draw(generator, rows, part.shape)
    return torch.from_numpy(drawn)
