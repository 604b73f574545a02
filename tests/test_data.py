"""Random data against a plain loop over numpy's legacy generator."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from benchmarks.random_data_loop import batches
from dlrm_data_pytorch import RandomData
from dlrm_options import Options


@st.composite
def options(draw) -> Options:
    rows = draw(st.lists(st.sampled_from([1, 2, 3, 10, 1000, 10**6]), min_size=1, max_size=4))
    low, high = sorted([draw(st.floats(0, min(rows) - 1)), draw(st.floats(0, min(rows) - 1))])
    batch = draw(st.integers(1, 40))
    by_size = draw(st.booleans())
    return Options(
        arch_embedding_size=tuple(rows),
        arch_mlp_bot=(draw(st.integers(1, 5)), 2),
        mini_batch_size=batch,
        num_batches=0 if by_size else draw(st.integers(1, 4)),
        data_size=batch * draw(st.integers(1, 4)) + draw(st.integers(0, batch - 1)),
        numpy_rand_seed=draw(st.integers(0, 2**32 - 1)),
        num_indices_per_lookup=draw(st.integers(1, 12)),
        num_indices_per_lookup_fixed=draw(st.booleans()),
        round_targets=draw(st.booleans()),
        rand_data_dist=draw(st.sampled_from(["uniform", "gaussian"])),
        rand_data_min=low,
        rand_data_max=high,
        rand_data_mu=draw(st.sampled_from([-1.0, 0.5])),
        rand_data_sigma=draw(st.floats(0, 5)),
    )


@pytest.mark.parametrize("how", [RandomData.__iter__, RandomData._drawn_in_blocks])
@given(options())
@settings(deadline=None, max_examples=200)
def test_batches_equal_a_loop_that_draws_one_number_at_a_time(how, options):
    data = RandomData(options)
    drawn, expected = list(how(data)), list(batches(options))
    assert len(drawn) == len(expected) == len(data)
    for batch, (dense, indices, lengths, target) in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(batch.dense.numpy(), dense)
        np.testing.assert_array_equal(batch.target.numpy(), target)
        np.testing.assert_array_equal(batch.offsets.diff().numpy(), lengths)
        for ours, theirs in zip(batch.indices, indices, strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs)


def test_first_numbers_of_the_default_seed():
    """Printed by the public script: `--mini-batch-size=2 --data-size=6 --debug-mode`."""
    batch = next(iter(RandomData(Options(mini_batch_size=2, data_size=6))))
    expected = [[0.69646919, 0.28613934, 0.22685145, 0.55131477], [0.71946897, 0.42310646, 0.98076420, 0.68482974]]
    torch.testing.assert_close(batch.dense, torch.tensor(expected), atol=1e-7, rtol=0)
    assert [indices.tolist() for indices in batch.indices] == [[1, 0, 1], [0, 1], [1, 0]]
    assert batch.offsets.tolist() == [[0, 1, 3], [0, 1, 2], [0, 1, 2]]


def test_epochs_repeat_and_seeds_differ():
    data = RandomData(Options(num_batches=2))
    first, second = [b.dense for b in data], [b.dense for b in data]
    assert all(map(torch.equal, first, second))
    other = next(iter(RandomData(Options(num_batches=2, numpy_rand_seed=124))))
    assert not torch.equal(first[0], other.dense)
