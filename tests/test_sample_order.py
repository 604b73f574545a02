"""Orders of training samples, compared with the permutations of the reference script."""

from __future__ import annotations

import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from dlrm.data.sample_order import ComputedOrder, Order, make_order
from dlrm.options import Options

TERABYTE = [180_000_000] * 23  # about the samples of each day


def order(how: str, sizes: list[int], memory: int = 2**32, seed: int = 123) -> Order:
    return make_order(Options(data_randomize=how, preprocess_memory=memory, numpy_rand_seed=seed), sizes)


def reference_order(how: str, sizes: list[int], seed: int) -> np.ndarray:
    """Returns the order that the reference script makes in `CriteoDataset.__init__`."""
    np.random.seed(seed)
    days = np.array_split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    if how == "day":
        days = [np.random.permutation(day) for day in days]
    samples = np.concatenate(days)
    return np.random.permutation(samples) if how == "total" else samples


sizes = st.lists(st.integers(0, 400), min_size=1, max_size=5).filter(any)


@given(sizes, st.sampled_from(["total", "day", "none"]), st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_the_order_is_that_of_the_reference_script(sizes, how, seed, width):
    ours, expected = order(how, sizes, seed=seed), reference_order(how, sizes, seed)
    starts = np.random.default_rng(0).permutation(range(0, sum(sizes), width))  # out of turn
    for start in starts:
        end = min(start + width, sum(sizes))
        np.testing.assert_array_equal(ours.samples_at(start, end), expected[start:end])


def test_the_order_of_a_day_that_left_memory_is_drawn_again():
    sizes = [10_000, 20_000, 15_000, 18_000] * 4
    ours, expected = order("day", sizes, memory=3 * 2 * 20_000), reference_order("day", sizes, 123)
    last = sum(sizes) - 500
    starts = [*range(0, last, 500), *range(last, -1, -500), 44_900, last, 10]
    tracemalloc.start()
    for start in starts:
        np.testing.assert_array_equal(ours.samples_at(start, start + 500), expected[start : start + 500])
    assert tracemalloc.get_traced_memory()[1] < 120_000 + 16 * 4_000  # permutations, and states of the generator
    tracemalloc.stop()


@given(sizes, st.sampled_from(["total", "day"]), st.integers(0, 2**32 - 1))
def test_without_memory_the_order_is_another_permutation(sizes, how, seed):
    ours = order(how, sizes, memory=1, seed=seed)
    everything = ours.samples_at(0, sum(sizes))
    np.testing.assert_array_equal(np.sort(everything), np.arange(sum(sizes)))
    middle = sum(sizes) // 2
    np.testing.assert_array_equal(ours.samples_at(middle, sum(sizes)), everything[middle:])
    if how == "day":
        for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            np.testing.assert_array_equal(np.sort(everything[start : start + size]), np.arange(start, start + size))


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_a_computed_order_is_a_bijection(length, seed):
    np.testing.assert_array_equal(np.sort(ComputedOrder(length, [seed]).samples_at(0, length)), np.arange(length))


def test_a_computed_order_is_shuffled():
    """Correlations with the positions, of neighbours, and with another seed's order are as small as those of a random
    permutation, which are 3e-3 on average."""
    positions = np.arange(100_000)
    first, second = (order("total", [100_000], memory=1, seed=seed).samples_at(0, 100_000) for seed in (1, 2))
    for other in (positions, second):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.02
    chi_squared = ((np.histogram2d(positions, first, bins=10)[0] - 1000) ** 2 / 1000).sum()
    assert 30 < chi_squared < 160  # 81 degrees of freedom


@pytest.mark.parametrize(("how", "memory"), [("total", 4 * 2**30), ("day", 2**30)])
def test_the_order_of_terabyte_takes_no_memory_and_is_announced(how, memory, capsys):
    tracemalloc.start()
    ours = order(how, TERABYTE, memory)
    samples = ours.samples_at(sum(TERABYTE) - 2048, sum(TERABYTE))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(np.unique(samples)) == 2048
    assert samples.min() >= (0 if how == "total" else sum(TERABYTE[:-1]))
    assert samples.max() < sum(TERABYTE)
    note = capsys.readouterr().out
    assert note.startswith(f"--data-randomize={how}: the reference script's order of 4,140,000,000 samples takes ")
    assert note.count("\n") == 1
    assert "GiB, more than --preprocess-memory; another one is computed from the seed" in note
