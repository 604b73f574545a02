"""The stream of uniform random numbers that lookups are drawn from, and what all ways to draw them share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Draws lookups in the next table: (rows of the table, lookups in the largest bag, bags) -> (rows that are looked up,
# lookups in each bag), both int64.
DrawLookups = Callable[[int, int, int], tuple[np.ndarray, np.ndarray]]


class UniformStream:
    """The float64 numbers in [0, 1) that `numpy.random.RandomState(seed)` gives, which may be looked at before they are
    taken."""

    def __init__(self, seed: int):
        self._generator = np.random.RandomState(seed)
        self._ahead = np.empty(0)

    def peek(self, count: int) -> np.ndarray:
        """Returns the next `count` numbers and leaves them in the stream."""
        missing = count - len(self._ahead)
        if missing > 0:
            self._ahead = np.concatenate([self._ahead, self._generator.random_sample(missing)])
        return self._ahead[:count]

    def take(self, count: int) -> np.ndarray:
        """Returns the next `count` numbers and removes them from the stream."""
        numbers = self.peek(count)
        self._ahead = self._ahead[count:]
        return numbers


def bag_sizes(uniforms: np.ndarray, largest: int) -> np.ndarray:
    """Returns the size of the bag that the reference script draws with each uniform u: u * largest, rounded half to
    even, and at least 1."""
    return np.rint(np.maximum(1.0, uniforms * largest)).astype(np.int64)
