"""Profiles of traces, traces that are drawn from them, lookups after traces in training, and Zipf's distribution."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from test_random_data import drawn_by

from dlrm.data.data_set import open_data_set
from dlrm.data.random_data import RandomData
from dlrm.data.trace import TraceGenerator, TraceProfile, main, profile_path, profile_trace
from dlrm.errors import RunError, UsageError
from dlrm.options import Options

EXAMPLE = TraceProfile([1, 2, 3, 4, 5, 6], [0, 1, 3, 4, 5], [0.55, 0.64, 0.82, 0.91, 1.0])


def stack_distances(trace) -> list[int]:
    stack, distances = [], []
    for row in trace:
        distances.append(len(stack) - stack.index(row) if row in stack else 0)
        stack = [other for other in stack if other != row] + [row]
    return distances


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_a_profile_counts_stack_distances(trace):
    profile, distances = profile_trace(trace), stack_distances(trace)
    assert profile.rows == list(dict.fromkeys(trace))
    assert profile.distances == sorted(set(distances))
    expected = np.searchsorted(np.sort(distances), profile.distances, side="right") / len(trace)
    np.testing.assert_allclose(profile.cumulative, expected)


def test_a_profile_of_an_example():
    trace = [1, 2, 3, 4, 5, 1, 2, 4, 4, 2, 6]
    assert profile_trace(trace).rows == EXAMPLE.rows
    assert profile_trace(trace).cumulative[0] == pytest.approx(6 / 11)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.booleans(), st.integers(0, 99))
def test_a_drawn_trace_has_the_profiled_rows_and_distances(trace, padding, seed):
    profile = profile_trace(trace, padding)
    drawn = TraceGenerator(profile, padding).draw_rows(np.random.RandomState(seed).random_sample(80)).tolist()
    assert set(drawn) <= set(trace)
    assert list(dict.fromkeys(drawn)) == profile.rows[: len(set(drawn))]
    assert TraceGenerator(profile, padding).draw_rows(np.full(3, 1e-9))[0] == profile.rows[0]


def test_a_long_drawn_trace_keeps_the_distribution():
    drawn = TraceGenerator(EXAMPLE, padding=True).draw_rows(np.random.RandomState(0).random_sample(20_000))
    distances = np.array(stack_distances(drawn.tolist()))[1000:]
    probabilities = np.diff(EXAMPLE.cumulative) / (1 - EXAMPLE.cumulative[0])
    for distance, probability in zip(EXAMPLE.distances[1:], probabilities, strict=True):
        assert (distances == distance).mean() == pytest.approx(probability, abs=0.02)


@pytest.mark.parametrize("binary", [False, True])
def test_the_command_line_profiles_and_draws(tmp_path, binary):
    trace = [3, 1, 3, 2, 1, 1]
    path = tmp_path / "trace.log"
    np.array(trace, np.uint64).tofile(path) if binary else path.write_text("3, 1, 3, 2, 1, 1")
    flags = [f"--trace-file={path}", f"--dist-file={tmp_path / 'dist.log'}", f"--synthetic-file={tmp_path / 'new.log'}"]
    assert main([*flags, *(["--trace-file-binary-type"] if binary else [])]) == 0
    assert TraceProfile.read(tmp_path / "dist.log") == profile_trace(trace)
    new = tmp_path / "new.log"
    drawn = np.fromfile(new, np.uint64).tolist() if binary else [int(x) for x in new.read_text().split(", ")]
    assert len(drawn) == 6
    assert drawn[0] == 3


def test_the_table_number_replaces_a_j_in_the_name_but_not_in_the_folder():
    assert str(profile_path("jobs/dist_emb_j.json", 3)) == "jobs/dist_emb_3.json"


def synthetic(tmp_path, **given) -> Options:
    for table in range(2):
        EXAMPLE.write(tmp_path / f"dist_{table}.log")
    defaults = {"arch_embedding_size": (7, 5), "mini_batch_size": 8, "num_batches": 4, "num_indices_per_lookup": (3,)}
    trace = {"data_generation": "synthetic", "data_trace_file": str(tmp_path / "dist_j.log")}
    return open_data_set(Options(**defaults | trace | given)).options


def test_lookups_go_on_with_the_trace_from_bag_to_bag(tmp_path, capsys):
    options = synthetic(tmp_path, num_indices_per_lookup_fixed=True, num_indices_per_lookup=(1,))
    assert "dist_1.log has row 6, table 1 has 5 rows" in capsys.readouterr().out
    batches = list(RandomData(options))
    rows = np.concatenate([batch.indices[0].numpy() for batch in batches])
    assert list(dict.fromkeys(rows)) == EXAMPLE.rows  # if each bag started anew, all would hold row 1
    assert all(batch.indices[1].max() < 5 for batch in batches)
    again = np.concatenate([batch.indices[0].numpy() for batch in RandomData(options)])
    np.testing.assert_array_equal(rows, again)


def assert_kernel_equals_numpy(options: Options) -> None:
    data = RandomData(options)
    with drawn_by("numpy"):
        by_numpy = list(data)
    for ours, expected in zip(data, by_numpy, strict=True):
        for name in ("dense", "offsets", "target"):
            assert torch.equal(getattr(ours, name), getattr(expected, name))
        assert all(map(torch.equal, ours.indices, expected.indices))


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=80), st.booleans(), st.booleans(),
    st.tuples(st.integers(1, 6), st.integers(1, 6)), st.integers(0, 99),
)  # fmt: skip
def test_the_kernel_draws_the_same_traces(tmp_path_factory, trace, padding, fixed, lookups, seed):
    profile_trace(trace, padding).write(tmp_path_factory.getbasetemp() / "dist.log")
    assert_kernel_equals_numpy(
        Options(
            data_generation="synthetic", data_trace_file=str(tmp_path_factory.getbasetemp() / "dist.log"),
            arch_embedding_size=(31, 9), mini_batch_size=12, num_batches=3, num_indices_per_lookup=lookups,
            num_indices_per_lookup_fixed=fixed, data_trace_enable_padding=padding, numpy_rand_seed=seed,
        )
    )  # fmt: skip


@given(st.sampled_from([0, 0.5, 1, 1.05, 3.0]), st.lists(st.sampled_from([1, 2, 1000, 10**7]), min_size=1, max_size=3),
       st.booleans(), st.integers(1, 9), st.integers(0, 99))  # fmt: skip
def test_the_kernel_draws_the_same_zipf_rows(alpha, rows, fixed, lookups, seed):
    assert_kernel_equals_numpy(
        Options(
            rand_data_dist="zipf", rand_data_alpha=alpha, arch_embedding_size=tuple(rows), mini_batch_size=20,
            num_batches=2, num_indices_per_lookup=(lookups,), num_indices_per_lookup_fixed=fixed, numpy_rand_seed=seed,
        )
    )  # fmt: skip


def test_synthetic_data_trains(tmp_path, script):
    EXAMPLE.write(tmp_path / "dist_0.log")
    status, out, err = script(
        f"--device=cpu --data-generation=synthetic --data-trace-file={tmp_path}/dist_j.log --arch-embedding-size=7 "
        "--num-batches=3 --mini-batch-size=4 --data-trace-enable-padding"
    )
    assert (status, err) == (0, "")
    assert "Finished training it 3/3" in out


def test_errors_name_the_wrong_profile(tmp_path):
    with pytest.raises(UsageError, match=r"--data-trace-file: .*nowhere_0.log: No such file"):
        synthetic(tmp_path, data_trace_file=str(tmp_path / "nowhere_j.log"))
    (tmp_path / "bad_0.log").write_text("1, 2\n1, 2\n0.5, 1.0\n")
    with pytest.raises(RunError, match=r"bad_0.log: distances must ascend from 0"):
        synthetic(tmp_path, data_trace_file=str(tmp_path / "bad_j.log"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("-1, 2\n0, 1\n0.5, 1.0\n", "expected rows from 0 to 9223372036854775807"),
        (f"1, {2**63}\n0, 1\n0.5, 1.0\n", "expected rows from 0 to 9223372036854775807"),
        ("1, 2\n0, 1\nnan, 1.0\n", "cumulative probabilities must start above 0"),
        ("1, 2\n0, 1\n0.5, nan\n", "cumulative probabilities must start above 0"),
        ("1, 2\n0, 1\n0.5, 0.9\n", "cumulative probabilities must start above 0"),
    ],
)
def test_impossible_numbers_of_a_profile_are_refused(content, message, tmp_path):
    (tmp_path / "bad_0.log").write_text(content)
    with pytest.raises(RunError, match=f"bad_0.log: {message}"):
        synthetic(tmp_path, data_trace_file=str(tmp_path / "bad_j.log"))


@pytest.mark.parametrize(("row", "binary"), [("-3", False), (str(2**63), False), (2**64 - 1, True)])
def test_a_trace_of_impossible_rows_is_not_profiled(row, binary, tmp_path, capsys):
    path = tmp_path / "trace"
    path.write_bytes(np.array([1, row], np.uint64).tobytes()) if binary else path.write_text(f"1, {row}")
    flags = [f"--trace-file={path}", f"--dist-file={tmp_path / 'dist'}", f"--synthetic-file={tmp_path / 'drawn'}"]
    assert main([*flags, f"--trace-file-binary-type={binary}"]) == 1
    message = f"{path}: access 2 is to row {row}; expected rows from 0 to 9223372036854775807\n"
    assert capsys.readouterr().err == f"python -m dlrm.data.trace: error: {message}"
    assert list(tmp_path.iterdir()) == [path]


def test_a_negative_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--numpy-rand-seed=-1"])
    assert "--numpy-rand-seed: expected an integer from 0 to 4294967295" in capsys.readouterr().err


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.05, 2.0])
def test_zipf_rows_are_as_frequent_as_their_integrals(alpha):
    rows, draws = 50, 100_000
    options = Options(
        rand_data_dist="zipf", rand_data_alpha=alpha, arch_embedding_size=(rows,), mini_batch_size=draws,
        num_batches=1, num_indices_per_lookup=(1,),
    )  # fmt: skip
    drawn = next(iter(RandomData(options))).indices[0].numpy()
    x = np.linspace(1, rows + 1, rows * 200 + 1)
    density = ((x[1:] + x[:-1]) / 2) ** -alpha
    expected = density.reshape(rows, 200).sum(axis=1) / density.sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=rows) / draws, expected, atol=0.006)
