"""Random data, compared with a plain loop over numpy's legacy generator; data of several ranks, with those of one."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from benchmarks.random_data_loop import batches
from dlrm.batch import Batch, Share
from dlrm.data.random_data import RandomData
from dlrm.data.trace import profile_trace
from dlrm.distributed.launch import Launch
from dlrm.distributed.placement import Piece, make_plan
from dlrm.distributed.ranks import ManyRanks
from dlrm.kernels.native import load_kernels
from dlrm.options import Options

WAYS = ["native", "numpy"] if load_kernels() == "native" else ["numpy"]


def drawn_by(way: str):
    """Lets the C++ kernel ("native") or numpy draw random data in a `with` block."""
    return mock.patch("dlrm.data.random_data.load_kernels", return_value=way)


def lookups_per_bag(tables: int) -> st.SearchStrategy[tuple[int, ...]]:
    """One number for all tables, or one per table."""
    return st.sampled_from([1, tables]).flatmap(lambda count: st.tuples(*[st.integers(1, 12)] * count))


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
        num_indices_per_lookup=draw(lookups_per_bag(len(rows))),
        num_indices_per_lookup_fixed=draw(st.booleans()),
        round_targets=draw(st.booleans()),
        rand_data_dist=draw(st.sampled_from(["uniform", "gaussian"])),
        rand_data_min=low,
        rand_data_max=high,
        rand_data_mu=draw(st.sampled_from([-1.0, 0.5])),
        rand_data_sigma=draw(st.floats(0, 5)),
    )


@pytest.mark.parametrize("way", WAYS)
@given(options())
@settings(deadline=None, max_examples=200)
def test_batches_equal_a_loop_that_draws_one_number_at_a_time(way, options):
    data = RandomData(options)
    with drawn_by(way):
        drawn, expected = list(data), list(batches(options))
    assert len(drawn) == len(expected) == len(data)
    for batch, (dense, indices, lengths, target) in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(batch.dense.numpy(), dense)
        np.testing.assert_array_equal(batch.target.numpy(), target)
        np.testing.assert_array_equal(batch.offsets.diff().numpy(), lengths)
        for ours, theirs in zip(batch.indices, indices, strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs)


def test_first_numbers_of_the_default_seed():
    """The reference script prints these with `--mini-batch-size=2 --data-size=6 --debug-mode`."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------


def lookups_in(piece: Piece, batch: Batch) -> list[list[int]]:
    """Returns the rows of each bag that lie in a piece, counted from the first row of the piece."""
    indices, offsets = batch.indices[piece.table].tolist(), batch.offsets[piece.table].tolist()
    bags = [indices[begin:end] for begin, end in pairwise(offsets)]
    return [[row - piece.first_row for row in bag if 0 <= row - piece.first_row < piece.rows] for bag in bags]


def bags_of(indices: torch.Tensor, offsets: torch.Tensor) -> list[list[int]]:
    return [bag.tolist() for bag in indices.split(offsets.diff().tolist())]


@pytest.mark.parametrize("way", WAYS)
@given(
    options(), st.sampled_from(["uniform", "gaussian", "zipf", "trace"]), st.sampled_from(["table", "row", "column"]),
    st.integers(2, 5), st.integers(0, 3), st.integers(1, 3),
)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_ranks_draw_together_what_one_draws(tmp_path_factory, way, options, distribution, sharding, size, first, width):
    """Ranks skip samples, tables, and the batches before the first one."""
    if distribution == "trace":
        trace = tmp_path_factory.getbasetemp() / "dist.log"
        profile_trace([3, 1, 3, 2, 1, 1, 8, 3, 2, 0]).write(trace)
        options = dataclasses.replace(options, data_generation="synthetic", data_trace_file=str(trace))
    else:
        options = dataclasses.replace(options, rand_data_dist=distribution)
    data, plan = RandomData(options), make_plan(dataclasses.replace(options, sharding=sharding), size)
    ranks = [ManyRanks(options, Launch("", size, rank), plan, None, None) for rank in range(size)]
    with drawn_by(way):
        shares = [list(rank.share(data).batches(first, width)) for rank in ranks]
        wholes = list(data.batches(0, 1))[first:]
    assert {len(share) for share in shares} == {-(-len(wholes) // width)}
    for step, parts in enumerate(zip(*shares, strict=True)):
        whole_batches = wholes[width * step : width * (step + 1)]
        for name in ("dense", "target"):
            assert torch.cat([getattr(part, name) for part in parts]).equal(
                torch.cat([getattr(batch, name) for batch in whole_batches])
            )
        room = -(-width * options.mini_batch_size // size)
        assert all(len(part) <= room for part in parts)
        for rank, part in enumerate(parts):
            for number, piece in enumerate(plan.ranks[rank]):
                expected = [bag for batch in whole_batches for bag in lookups_in(piece, batch)]
                assert bags_of(part.indices[number], part.offsets[number]) == expected


@pytest.mark.skipif("native" not in WAYS, reason="the C++ kernels cannot be built here")
def test_a_rank_only_allocates_its_own_share():
    data = RandomData(
        Options(mini_batch_size=6, num_batches=3, arch_embedding_size=(9, 8, 7), num_indices_per_lookup=(5,))
    )
    allocated = []
    draw = torch.ops.dlrm.draw_random_batch

    def note_and_draw(*arguments) -> None:
        allocated.append([tensor.numel() for tensor in arguments[-4:]])
        draw(*arguments)

    with mock.patch.object(torch.ops.dlrm, "draw_random_batch", note_and_draw):
        list(data.batches(1, share=Share(slice(4, 8), [0, 2])))
    own = [2 * data.num_dense_features, 2 * 6 * 5, 2 * 7, 2]
    assert allocated == [[0, 0, 0, 0], own, own]
