"""The order in which an epoch takes training samples: the public script's where there is memory for it.

That script permutes all samples, or each day's, by numpy's legacy generator. The same permutation is drawn here in the
narrowest integers that hold it. Where even that is too large, a place's sample is computed from the place alone.
"""

from __future__ import annotations

import abc
import math
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from dlrm.options import Options


class Order(Protocol):
    """A bijection of [0, samples)."""

    def take(self, begin: int, end: int) -> np.ndarray:
        """The samples at places `begin` to `end` of the epoch, (end - begin,) int64."""


def make_order(options: Options, sizes: Sequence[int]) -> Order:
    """As `--data-randomize` says, of days of these sizes. Prints a line where it is not the public script's order."""
    if options.data_randomize == "none":
        return AsStored()
    seed, memory, total = options.numpy_rand_seed, options.preprocess_memory, sum(sizes)
    by_day = options.data_randomize == "day"
    # At the end of a day, batches of two are being read, while another is drawn.
    needed = 3 * permutation_bytes(max(sizes)) if by_day else permutation_bytes(total)
    if needed <= memory:
        return DrawnDays(sizes, seed, memory) if by_day else DrawnOrder(np.random.RandomState(seed), total)
    print(
        f"--data-randomize={options.data_randomize}: the public script's order of {total:,} samples takes "
        f"{needed / 2**30:.1f} GiB, more than --preprocess-memory; another one is computed from the seed",
        flush=True,
    )
    return KeyedDays(sizes, seed) if by_day else KeyedOrder(total, [seed])


def order_settings(options: Options) -> dict[str, object]:
    """By flag, what the order depends on."""
    seed = {} if options.data_randomize == "none" else {"--numpy-rand-seed": options.numpy_rand_seed}
    return {"--data-randomize": options.data_randomize} | seed


class AsStored:
    def take(self, begin: int, end: int) -> np.ndarray:
        return np.arange(begin, end)


class DayByDay(abc.ABC):
    """The days in turn, each in an order of its own."""

    def __init__(self, sizes: Sequence[int]):
        self._sizes, self._starts = sizes, np.cumsum([0, *sizes])

    @abc.abstractmethod
    def order_of(self, day: int) -> Order: ...

    def take(self, begin: int, end: int) -> np.ndarray:
        first, last = np.searchsorted(self._starts, [begin, end - 1], side="right") - 1
        return np.concatenate([self._of_day(day, begin, end) for day in range(first, last + 1)])

    def _of_day(self, day: int, begin: int, end: int) -> np.ndarray:
        start, following = self._starts[day : day + 2]
        return start + self.order_of(day).take(max(begin - start, 0), min(end, following) - start)


# ---------------------------------------------------------------------------------------------------------------------
# The public script's
# ---------------------------------------------------------------------------------------------------------------------


class DrawnOrder:
    """`generator.permutation(length)` in fewer bytes: what is drawn does not depend on the type."""

    def __init__(self, generator: np.random.RandomState, length: int):
        self._permutation = np.arange(length, dtype=narrowest(length))
        generator.shuffle(self._permutation)

    def take(self, begin: int, end: int) -> np.ndarray:
        return self._permutation[begin:end].astype(np.int64)


def narrowest(length: int) -> np.dtype:
    """Unsigned integers that hold all below `length`."""
    return np.min_scalar_type(max(length - 1, 0))


def permutation_bytes(length: int) -> int:
    return max(length, 1) * narrowest(length).itemsize


class DrawnDays(DayByDay):
    """One generator draws the days one after the other. Its state before each is noted, so that a day which has had
    to leave memory is drawn again."""

    def __init__(self, sizes: Sequence[int], seed: int, memory: int):
        super().__init__(sizes)
        self._states = [np.random.RandomState(seed).get_state()]
        self._remembered = lru_cache(memory // permutation_bytes(max(sizes)) - 1)(self._draw)
        self._lock = threading.Lock()

    def order_of(self, day: int) -> DrawnOrder:
        with self._lock:
            while len(self._states) <= day:
                self._remembered(len(self._states) - 1)
            return self._remembered(day)

    def _draw(self, day: int) -> DrawnOrder:
        generator = np.random.RandomState()
        generator.set_state(self._states[day])
        order = DrawnOrder(generator, self._sizes[day])
        if day + 1 == len(self._states):
            self._states.append(generator.get_state())
        return order


# ---------------------------------------------------------------------------------------------------------------------
# Computed
# ---------------------------------------------------------------------------------------------------------------------


class KeyedOrder:
    """A Feistel network on pairs (left, right) of digits of mixed radix, which hold little more than `length` numbers;
    from a number beyond, it walks on to one that is not (Black and Rogaway, 2002)."""

    rounds = 4

    def __init__(self, length: int, key: Sequence[int]):
        self._length = length
        self._lefts = math.isqrt(length) + 1
        self._rights = -(-length // self._lefts)
        self._keys = np.random.default_rng(key).integers(2**64, size=(self.rounds, 2), dtype=np.uint64)

    def take(self, begin: int, end: int) -> np.ndarray:
        numbers = self._encrypted(np.arange(begin, end, dtype=np.uint64))
        while (beyond := numbers >= self._length).any():
            numbers[beyond] = self._encrypted(numbers[beyond])
        return numbers.astype(np.int64)

    def _encrypted(self, numbers: np.ndarray) -> np.ndarray:
        left, right = np.divmod(numbers, self._rights)
        for first, second in self._keys:
            left = (left + hashed(right + first) % self._lefts) % self._lefts
            right = (right + hashed(left + second) % self._rights) % self._rights
        return left * self._rights + right


def hashed(numbers: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    numbers = (numbers ^ numbers >> 30) * 0xBF58476D1CE4E5B9
    numbers = (numbers ^ numbers >> 27) * 0x94D049BB133111EB
    return numbers ^ numbers >> 31


class KeyedDays(DayByDay):
    def __init__(self, sizes: Sequence[int], seed: int):
        super().__init__(sizes)
        self._seed = seed

    def order_of(self, day: int) -> KeyedOrder:
        return KeyedOrder(self._sizes[day], [self._seed, day])
