"""The order of training samples in an epoch: that of the reference script where there is memory for it.

The reference script permutes all samples, or those of each day, by numpy's legacy generator. The same permutation is
drawn here, in the narrowest integers that hold it. Where even that takes too much memory, the sample at each position
is computed from the position alone.
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
    """A permutation of the samples 0, 1, ... Any number of threads may use it at once."""

    def samples_at(self, begin: int, end: int) -> np.ndarray:
        """Returns the samples at positions `begin` to `end` of the epoch, (end - begin,) int64."""
        ...


def make_order(options: Options, day_sizes: Sequence[int]) -> Order:
    """Returns the order that `--data-randomize` asks for, of days with so many samples each. Prints one line if it
    cannot be the order of the reference script."""
    if options.data_randomize == "none":
        return StoredOrder()
    seed, memory, total = options.numpy_rand_seed, options.preprocess_memory, sum(day_sizes)
    by_day = options.data_randomize == "day"
    # At the end of a day, batches of two days are being read while the order of a third one is drawn.
    needed = 3 * permutation_bytes(max(day_sizes)) if by_day else permutation_bytes(total)
    if needed <= memory:
        return DrawnDayOrder(day_sizes, seed, memory) if by_day else DrawnOrder(np.random.RandomState(seed), total)
    print(
        f"--data-randomize={options.data_randomize}: the reference script's order of {total:,} samples takes "
        f"{needed / 2**30:.1f} GiB, more than --preprocess-memory; another one is computed from the seed",
        flush=True,
    )
    return ComputedDayOrder(day_sizes, seed) if by_day else ComputedOrder(total, [seed])


def pass_draws_of_reference_script(
    generator: np.random.RandomState, options: Options, day_sizes: Sequence[int]
) -> None:
    """Moves a generator past what the reference script draws from it before the weights, which come from the same one:
    the order of the training samples, once as it opens the training set and once as it opens the test set.

    Does nothing where there is no memory for that order: then the samples have another one anyway.
    """
    lengths = {"none": [], "day": day_sizes, "total": [sum(day_sizes)]}[options.data_randomize]
    if sum(map(permutation_bytes, lengths)) > options.preprocess_memory:
        return
    for length in [*lengths, *lengths]:
        DrawnOrder(generator, length)


def order_settings(options: Options) -> dict[str, object]:
    """Returns the value of each flag that the order depends on."""
    seed = {} if options.data_randomize == "none" else {"--numpy-rand-seed": options.numpy_rand_seed}
    return {"--data-randomize": options.data_randomize} | seed


class StoredOrder:
    """The order in which the samples are stored."""

    def samples_at(self, begin: int, end: int) -> np.ndarray:
        """Returns the positions themselves."""
        return np.arange(begin, end)


class DayByDayOrder(abc.ABC):
    """One day after the other, with a separate order of the samples in each day."""

    def __init__(self, day_sizes: Sequence[int]):
        self._day_sizes, self._day_starts = day_sizes, np.cumsum([0, *day_sizes])

    @abc.abstractmethod
    def order_of_day(self, day: int) -> Order:
        """Returns the order of the samples in a day, which count from 0 there."""

    def samples_at(self, begin: int, end: int) -> np.ndarray:
        """Returns the samples at positions `begin` to `end` of the epoch, (end - begin,) int64."""
        first_day, last_day = np.searchsorted(self._day_starts, [begin, end - 1], side="right") - 1
        return np.concatenate([self._samples_of_day(day, begin, end) for day in range(first_day, last_day + 1)])

    def _samples_of_day(self, day: int, begin: int, end: int) -> np.ndarray:
        start, next_start = self._day_starts[day : day + 2]
        return start + self.order_of_day(day).samples_at(max(begin - start, 0), min(end, next_start) - start)


# ---------------------------------------------------------------------------------------------------------------------
# The order of the reference script
# ---------------------------------------------------------------------------------------------------------------------


class DrawnOrder:
    """`generator.permutation(length)` in fewer bytes. The random numbers that it draws do not depend on the type."""

    def __init__(self, generator: np.random.RandomState, length: int):
        self._permutation = np.arange(length, dtype=narrowest_type(length))
        generator.shuffle(self._permutation)

    def samples_at(self, begin: int, end: int) -> np.ndarray:
        """Returns the samples at positions `begin` to `end`, (end - begin,) int64."""
        return self._permutation[begin:end].astype(np.int64)


def narrowest_type(length: int) -> np.dtype:
    """Returns the narrowest unsigned integers that hold all numbers below `length`."""
    return np.min_scalar_type(max(length - 1, 0))


def permutation_bytes(length: int) -> int:
    """Returns the bytes of a `DrawnOrder`."""
    return max(length, 1) * narrowest_type(length).itemsize


class DrawnDayOrder(DayByDayOrder):
    """The days in the orders that one generator draws one after the other.

    The state of the generator before each day is kept, so that a day which had to leave memory can be drawn again.
    """

    def __init__(self, day_sizes: Sequence[int], seed: int, memory: int):
        """Keeps the orders of as many days as fit in `memory` bytes, beside one that is being drawn."""
        super().__init__(day_sizes)
        self._states = [np.random.RandomState(seed).get_state()]
        self._remembered = lru_cache(memory // permutation_bytes(max(day_sizes)) - 1)(self._draw)
        self._lock = threading.Lock()

    def order_of_day(self, day: int) -> DrawnOrder:
        """Returns the order of a day. Draws it, and those of all days before it, if they have not been drawn."""
        with self._lock:
            while len(self._states) <= day:
                self._remembered(len(self._states) - 1)
            return self._remembered(day)

    def _draw(self, day: int) -> DrawnOrder:
        generator = np.random.RandomState()
        generator.set_state(self._states[day])
        order = DrawnOrder(generator, self._day_sizes[day])
        if day + 1 == len(self._states):
            self._states.append(generator.get_state())
        return order


# ---------------------------------------------------------------------------------------------------------------------
# Orders that are computed position by position
# ---------------------------------------------------------------------------------------------------------------------


class ComputedOrder:
    """A permutation that takes no memory: a Feistel network on pairs (left, right) of digits of mixed radix.

    The pairs stand for slightly more numbers than `length`. Where the network gives a number that is too large, it is
    applied again until the number is not (cycle walking; Black and Rogaway, 2002).
    """

    rounds = 4

    def __init__(self, length: int, key: Sequence[int]):
        self._length = length
        self._lefts = math.isqrt(length) + 1
        self._rights = -(-length // self._lefts)
        self._keys = np.random.default_rng(key).integers(2**64, size=(self.rounds, 2), dtype=np.uint64)

    def samples_at(self, begin: int, end: int) -> np.ndarray:
        """Returns the samples at positions `begin` to `end`, (end - begin,) int64."""
        numbers = self._encrypted(np.arange(begin, end, dtype=np.uint64))
        while (too_large := numbers >= self._length).any():
            numbers[too_large] = self._encrypted(numbers[too_large])
        return numbers.astype(np.int64)

    def _encrypted(self, numbers: np.ndarray) -> np.ndarray:
        left, right = np.divmod(numbers, self._rights)
        for left_key, right_key in self._keys:
            left = (left + hashed(right + left_key) % self._lefts) % self._lefts
            right = (right + hashed(left + right_key) % self._rights) % self._rights
        return left * self._rights + right


def hashed(numbers: np.ndarray) -> np.ndarray:
    """Returns a hash of each number, uint64 -> uint64: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    numbers = (numbers ^ numbers >> 30) * 0xBF58476D1CE4E5B9
    numbers = (numbers ^ numbers >> 27) * 0x94D049BB133111EB
    return numbers ^ numbers >> 31


class ComputedDayOrder(DayByDayOrder):
    """The days one after the other, each in a computed order."""

    def __init__(self, day_sizes: Sequence[int], seed: int):
        super().__init__(day_sizes)
        self._seed = seed

    def order_of_day(self, day: int) -> ComputedOrder:
        """Returns the computed order of a day."""
        return ComputedOrder(self._day_sizes[day], [self._seed, day])
