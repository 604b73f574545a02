"""Batches of the Criteo data sets, from every kind of file, and what a model learns from them."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import itertools
import os
import re
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from test_random_data import bags_of, lookups_in

from dlrm.batch import Batch
from dlrm.data import criteo_files, criteo_generator
from dlrm.data.criteo_files import SplitRows
from dlrm.data.criteo_generator import generate, optimal_auc
from dlrm.data.criteo_manifest import verify
from dlrm.data.criteo_rows import write_rows
from dlrm.data.data_set import Data, DataSet, open_data_set
from dlrm.distributed.launch import Launch
from dlrm.distributed.placement import make_plan
from dlrm.distributed.ranks import ManyRanks
from dlrm.distributed.rendezvous import faults_named
from dlrm.distributed.shared_data import SharedRows
from dlrm.errors import LocalError, RunError, UsageError
from dlrm.options import Options
from dlrm.pipeline import BatchPipeline
from dlrm_s_pytorch import select_backend

COUNTS = list(range(30, 56))


def random_rows(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack(
        [rng.integers(0, 2, count), rng.integers(0, 1000, (count, 13)), rng.integers(0, COUNTS, (count, 26))]
    ).astype(np.int32)


def opened(**given) -> DataSet:
    defaults = {"data_generation": "dataset", "arch_mlp_bot": (13, 2), "mini_batch_size": 4, "data_randomize": "none"}
    return open_data_set(Options(**defaults | given))


def rows_of(data: Data) -> np.ndarray:
    """Returns the rows that the batches of an epoch were made of."""
    batches = list(data)
    for batch in batches:
        size = len(batch.target)
        assert (batch.dense.dtype, batch.target.dtype, batch.indices[0].dtype) == (
            torch.float32, torch.float32, torch.int32
        )  # fmt: skip
        assert batch.offsets.tolist() == [list(range(size + 1))] * 26
    dense = np.rint(np.expm1(torch.cat([batch.dense for batch in batches]).numpy().astype(np.float64)))
    ids = torch.cat([torch.stack(batch.indices).T for batch in batches]).numpy()
    return np.column_stack([torch.cat([batch.target for batch in batches]).numpy(), dense, ids]).astype(np.int64)


def write_npz(path, rows: np.ndarray, **more) -> None:
    np.savez_compressed(path, X_cat=rows[:, 14:].astype(np.float64), X_int=rows[:, 1:14], y=rows[:, 0], **more)


@pytest.fixture
def processed(tmp_path):
    """The rows and the path of the reference script's one file: 59 samples, in days of 9, 9, 9, 8, 8, 8 and 8."""
    rows = random_rows(59)
    write_npz(tmp_path / "kaggle_processed.npz", rows, counts=np.array(COUNTS, dtype=np.int32))
    return rows, tmp_path / "kaggle_processed.npz"


@pytest.mark.parametrize(("workers", "test_workers"), [(0, 2), (3, -1), (3, 0)])
def test_processed_npz_is_read_in_order(processed, workers, test_workers):
    rows, path = processed
    data_set = opened(processed_data_file=str(path), num_workers=workers, test_num_workers=test_workers)
    chosen, data = data_set.options, data_set.training_data()
    assert chosen.arch_embedding_size == tuple(COUNTS)
    assert (chosen.data_size, chosen.batches_per_epoch, chosen.num_indices_per_lookup) == (51, 12, (1,))
    assert (data.table_rows, data.batch_size, len(data)) == (tuple(COUNTS), 4, 12)
    np.testing.assert_array_equal(rows_of(data), rows[:48])
    np.testing.assert_array_equal(rows_of(data_set.test_data()), rows[51:55])
    assert torch.equal(next(iter(data)).dense, torch.log(torch.tensor(rows[:4, 1:14], dtype=torch.float) + 1))


@pytest.mark.parametrize("randomize", ["total", "day"])
def test_rows_are_shuffled_as_by_the_reference_script_and_read_from_any_batch_on(processed, randomize):
    rows, path = processed
    data = opened(processed_data_file=str(path), data_randomize=randomize).training_data()
    generator = np.random.RandomState(123)
    days = np.array_split(np.arange(59), 7)[:-1]
    order = np.concatenate(days)
    order = (
        generator.permutation(order) if randomize == "total" else np.concatenate(list(map(generator.permutation, days)))
    )
    np.testing.assert_array_equal(rows_of(data), rows[order[:48]])
    np.testing.assert_array_equal(rows_of(data), rows[order[:48]])  # epochs repeat
    for first in (0, 5, 12):
        rest = [batch.dense for batch in data.batches(first)]
        assert len(rest) == 12 - first
        assert all(map(torch.equal, rest, [batch.dense for batch in data][first:]))


def on_ranks(size: int, action: Callable) -> list:
    """Returns what `action(rank, group)` returns on `size` threads, each of which is a rank of a gloo group."""
    store = dist.HashStore()
    has_options = hasattr(dist.ProcessGroup, "Options")  # torch 2.5 wants them, and later ones have none
    options = [dist.ProcessGroup.Options("gloo")] if has_options else []

    def be_rank(rank: int):
        group = dist.ProcessGroup(store, rank, size, *options)
        gloo = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        return action(rank, group)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(be_rank, range(size)))


@pytest.fixture
def positions_read(monkeypatch) -> dict[int, list[int]]:
    """The positions at which rows have been read, by thread."""
    noted, read = defaultdict(list), SplitRows.read

    def read_and_note(rows: SplitRows, positions: np.ndarray) -> np.ndarray:
        noted[threading.get_ident()] += positions.tolist()
        return read(rows, positions)

    monkeypatch.setattr(SplitRows, "read", read_and_note)
    return noted


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("sharding", ["table", "row", "column"])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("multi_hot_sizes", [(1,), (3, 1) * 13], ids=["one-hot", "multi-hot"])
def test_ranks_have_together_what_one_has(processed, positions_read, multi_hot_sizes, size, sharding, test):
    """A step is two batches of 4 samples, which do not divide over three or five ranks. The last step of training is
    one batch, and the last batch of tests is one sample."""
    given = {"data_randomize": "total", "max_ind_range": 40, "sharding": sharding, "optimizer": "sgd", "num_workers": 0}
    given |= {"multi_hot_sizes": multi_hot_sizes}
    data_set = opened(processed_data_file=str(processed[1]), test_mini_batch_size=3, **given)
    data, chosen = data_set.test_data() if test else data_set.training_data(), data_set.options
    plan = make_plan(chosen, size)
    first, width = (0, 1) if test else (1, 2)

    def read_by(rank: int, group: dist.ProcessGroup) -> tuple[list[Batch], list[int]]:
        return list(SharedRows(data, plan, rank, group).batches(first, width)), positions_read[threading.get_ident()]

    shares, read = zip(*on_ranks(size, read_by), strict=True)
    positions_read.clear()
    wholes = list(data.batches(first, width))
    assert {len(share) for share in shares} == {len(wholes)}
    for whole, *parts in zip(wholes, *shares, strict=True):
        assert torch.cat([part.dense for part in parts]).equal(whole.dense)
        assert torch.cat([part.target for part in parts]).equal(whole.target)
        for rank, part in enumerate(parts):
            for piece, *bags in zip(plan.ranks[rank], part.indices, part.offsets, strict=True):
                assert bags_of(*bags) == lookups_in(piece, whole)
    (all_positions,) = positions_read.values()
    assert sorted(itertools.chain(*read)) == sorted(all_positions)
    assert [len(positions) for positions in read] == [sum(len(part) for part in share) for share in shares]


def test_ranks_notice_at_their_next_batch_that_another_rank_is_gone(processed, monkeypatch):
    """The exchange of lookups, on the host thread of a pipeline, is all that the ranks of this test do together."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    data_set = opened(processed_data_file=str(processed[1]), num_workers=0, device="cpu")
    chosen = data_set.options
    backend, plan, store = select_backend(chosen), make_plan(chosen, 2), dist.HashStore()

    def take_batches(rank: int, group: dist.ProcessGroup) -> None:
        shared = SharedRows(data_set.training_data(), plan, rank, group)
        pipeline = BatchPipeline(shared, backend, ranks=2)
        with faults_named(Launch("", 2, rank), store):
            for _ in itertools.islice(pipeline.run(shared), 2 if rank else None):
                pass

    with pytest.raises(LocalError, match="rank 0: rank 1 no longer answered, so the run can't go on"):
        on_ranks(2, take_batches)


def test_a_rank_that_cannot_read_its_rows_is_named(processed, monkeypatch):
    def broken(*_) -> np.ndarray:
        raise RunError("day_3.npz: not a readable .npz file")

    monkeypatch.setattr(SplitRows, "read", broken)
    data_set = opened(processed_data_file=str(processed[1]))
    chosen = data_set.options
    with pytest.raises(LocalError, match=r"rank 1: day_3\.npz: not a readable"):
        next(SharedRows(data_set.training_data(), make_plan(chosen, 2), 1, None).batches())


def test_ranks_with_other_samples_are_refused(processed, monkeypatch):
    data_set = opened(processed_data_file=str(processed[1]))
    data = data_set.test_data()
    monkeypatch.setattr(ManyRanks, "gather_objects", lambda _, samples: [samples, samples + 1])
    ranks = ManyRanks(data_set.options, Launch("", 2, 0), make_plan(data_set.options, 2), None, None)
    with pytest.raises(UsageError, match=f"rank 1 finds {data.samples + 1} samples where rank 0 finds {data.samples}"):
        ranks.share(data)


def test_max_ind_range_caps_ids_and_tables(processed):
    rows, path = processed
    data = opened(processed_data_file=str(path), max_ind_range=40).training_data()
    assert data.table_rows == tuple(min(count, 40) for count in COUNTS)
    np.testing.assert_array_equal(rows_of(data)[:, 14:], rows[:48, 14:] % 40)


def test_reordered_npz_has_a_file_per_day(tmp_path):
    days = [random_rows(5 + day, seed=day) for day in range(24)]
    for day, rows in enumerate(days):
        write_npz(tmp_path / f"day_{day}_reordered.npz", rows)
    np.savez_compressed(tmp_path / "day_fea_count.npz", counts=np.array(COUNTS, dtype=np.int32))
    data_set = opened(data_set="terabyte", memory_map=True, raw_data_file=str(tmp_path / "day"), mini_batch_size=7)
    expected = np.concatenate(days[:-1])
    np.testing.assert_array_equal(rows_of(data_set.training_data()), expected[: len(expected) // 7 * 7])
    np.testing.assert_array_equal(rows_of(data_set.test_data()), days[-1][:14])


def test_binary_files_of_mlperf_are_written_and_read(processed, tmp_path):
    rows, path = processed
    data_set = opened(processed_data_file=str(path), mlperf_bin_loader=True)
    written = {split: (tmp_path / f"kaggle_processed_{split}.bin").read_bytes() for split in ("train", "test", "val")}
    assert written == {"train": rows[:51].tobytes(), "test": rows[51:55].tobytes(), "val": rows[55:].tobytes()}
    np.testing.assert_array_equal(rows_of(data_set.training_data()), rows[:48])
    np.testing.assert_array_equal(rows_of(data_set.test_data()), rows[51:55])
    data_set = opened(processed_data_file=str(path), mlperf_bin_loader=True, mlperf_bin_shuffle=True)
    shuffled = rows_of(data_set.training_data())
    batches = {batch.tobytes() for batch in shuffled.reshape(12, 4, 40)}
    assert batches == {batch.astype(np.int64).tobytes() for batch in rows[:48].reshape(12, 4, 40)}
    assert not np.array_equal(shuffled, rows[:48])


def test_threads_read_a_compressed_file_once(tmp_path, monkeypatch):
    write_npz(tmp_path / "kaggle_processed.npz", random_rows(20_000), counts=np.array(COUNTS, dtype=np.int32))
    data = opened(processed_data_file=str(tmp_path / "kaggle_processed.npz"), num_workers=8).training_data()
    openings = Counter()
    monkeypatch.setattr(io, "open", counting_openings(openings, of=tmp_path))  # which zipfile calls
    next(iter(data))
    assert openings == {"kaggle_processed.npz": 1}


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="tells how the system reads mapped files")
def test_rows_are_read_alone_if_memory_has_no_room_for_all(tmp_path, monkeypatch):
    pytest.importorskip("polars", reason="preprocessing needs polars: pip install -r requirements-data.txt")
    generate(str(tmp_path / "train.txt"), 100)
    days = [15, 15, 14, 14, 14, 14]

    def reads_at_random(randomize: str, memory: int) -> set[bool]:
        data_set = opened(raw_data_file=str(tmp_path / "train.txt"), data_randomize=randomize)
        with monkeypatch.context() as patch:
            patch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 160, "SC_PHYS_PAGES": memory}.get)
            data = data_set.training_data()
        next(iter(data))
        flags = re.findall(r"day_[0-5]\.npy\n(?:.*\n)*?VmFlags:(.*)", Path("/proc/self/smaps").read_text())
        assert len(flags) == len(days)
        return {" rr " in of_day for of_day in flags}

    assert reads_at_random("total", sum(days) - 1) == {True}
    assert reads_at_random("total", sum(days)) == {False}
    assert reads_at_random("day", max(days) - 1) == {True}
    assert reads_at_random("day", max(days)) == {False}
    assert reads_at_random("none", 0) == {False}


@pytest.mark.parametrize("memory", [2**32, 1])
def test_the_binary_file_is_in_the_order_of_an_epoch(processed, memory, monkeypatch):
    monkeypatch.setattr(criteo_files, "ROWS_PER_BLOCK", 2)  # so that there are more blocks than are read ahead
    monkeypatch.setattr(criteo_files, "READERS", 4)
    path = str(processed[1])
    given = {"processed_data_file": path, "data_randomize": "total", "preprocess_memory": memory}
    epoch, binary = (rows_of(opened(**given, mlperf_bin_loader=b).training_data()) for b in (False, True))
    np.testing.assert_array_equal(binary, epoch)
    assert not np.array_equal(epoch, processed[0][:48])


def test_a_binary_file_that_was_made_with_other_flags_is_refused(processed, tmp_path):
    pytest.importorskip("polars", reason="preprocessing needs polars: pip install -r requirements-data.txt")
    text = str(tmp_path / "train.txt")
    generate(text, 100)
    made = {"raw_data_file": text, "mlperf_bin_loader": True, "max_ind_range": 100, "data_randomize": "total"}
    opened(**made)
    opened(**made, preprocess_memory=2**30)
    differences = "--max-ind-range=100, not 1000; --data-sub-sample-rate=0.0, not 0.5; --data-randomize=total, not none"
    with pytest.raises(RunError, match=rf"_\*\.bin is stale: it was made with {differences}\. Delete it"):
        opened(**made | {"max_ind_range": 1000, "data_sub_sample_rate": 0.5, "data_randomize": "none"})
    with pytest.raises(RunError, match=r"made with --numpy-rand-seed=123, not 7\. Delete it"):
        opened(**made, numpy_rand_seed=7)
    (tmp_path / "train_processed_bin.json").unlink()  # as if the files were MLPerf's own
    opened(**made, numpy_rand_seed=7)
    of_npz = {"processed_data_file": str(processed[1]), "mlperf_bin_loader": True}
    opened(**of_npz, max_ind_range=40)
    opened(**of_npz, max_ind_range=30, numpy_rand_seed=7)  # flags on which these files do not depend
    with pytest.raises(RunError, match=r"made with --data-randomize=none, not day\. Delete it"):
        opened(**of_npz, data_randomize="day")


def test_a_run_opens_each_file_of_its_data_set_once(tmp_path, script, monkeypatch):
    pytest.importorskip("polars", reason="preprocessing needs polars: pip install -r requirements-data.txt")
    generate(str(tmp_path / "train.txt"), 100)
    flags = (
        f"--data-generation=dataset --raw-data-file={tmp_path / 'train.txt'} --arch-mlp-bot=13-2 --mini-batch-size=20 "
        "--test-freq=2 "
    )
    store = {"train.txt", "manifest.json", *(f"day_{day}.npy" for day in range(7))}
    binary = {"manifest.json", "train_processed_bin.json", "train_processed_train.bin", "train_processed_test.bin"}
    for loader, files in (("--mlperf-bin-loader=false", store), ("--mlperf-bin-loader=true", binary)):
        assert script(flags + loader)[0] == 0  # preprocesses
        openings = Counter()
        with monkeypatch.context() as patch:
            counting = counting_openings(openings, of=tmp_path)
            for module in (builtins, io):
                patch.setattr(module, "open", counting)
            status, output, _ = script(flags + loader)
        assert status == 0
        assert "Testing at" in output
        assert openings == dict.fromkeys(files, 1)


def counting_openings(openings: Counter, of: Path):
    """Returns a function like `open` that counts how often each file of a folder is opened, by name."""

    def counting(file, *arguments, **settings):
        if isinstance(file, (str, Path)) and of in Path(file).parents:
            openings[Path(file).name] += 1
        return real_open(file, *arguments, **settings)

    real_open = open
    return counting


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 2, "row 5: the label is 2; expected 0 or 1"),
        (0, -1, "row 5: the label is -1; expected 0 or 1"),
        (3, -1, "row 5: dense feature 3 is -1; expected 0 or more"),
        (13, -2, "row 5: dense feature 13 is -2; expected 0 or more"),
    ],
)
def test_an_impossible_number_is_named_with_its_file_and_row(tmp_path, column, value, message):
    rows, path = random_rows(59), tmp_path / "kaggle_processed.npz"
    rows[4, column] = value
    write_npz(path, rows, counts=np.array(COUNTS, dtype=np.int32))
    with pytest.raises(RunError, match=rf"kaggle_processed\.npz, {message}"):
        list(opened(processed_data_file=str(path)).training_data())
    rows[:51].tofile(tmp_path / "kaggle_processed_train.bin")
    rows[51:].tofile(tmp_path / "kaggle_processed_test.bin")
    with pytest.raises(RunError, match=rf"kaggle_processed_train\.bin, {message}"):
        list(opened(processed_data_file=str(path), mlperf_bin_loader=True).training_data())


def test_verify_covers_binary_files(processed, tmp_path):
    opened(processed_data_file=str(processed[1]), mlperf_bin_loader=True)
    stem = tmp_path / "kaggle_processed"
    verify(stem)
    for split in ("train", "test", "val"):
        path = tmp_path / f"kaggle_processed_{split}.bin"
        content = path.read_bytes()
        path.write_bytes(content[:100] + bytes([content[100] ^ 4]) + content[101:])
        with pytest.raises(RunError, match=rf"{path.name} is damaged: its checksum is"):
            verify(stem)
        path.write_bytes(content[:-160])
        with pytest.raises(RunError, match=rf"{path.name} is not as long as \d+ rows; delete "):
            opened(processed_data_file=str(processed[1]), mlperf_bin_loader=True)
        path.write_bytes(content)
    verify(stem)


@pytest.mark.parametrize("failing", ["train", "test", "val"])
def test_binary_files_that_filled_the_disk_are_written_anew(processed, tmp_path, failing, monkeypatch):
    def write_until(path: Path, blocks):
        if path.name.endswith(f"_{failing}.bin"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_rows(path, blocks)

    flags = {"processed_data_file": str(processed[1]), "mlperf_bin_loader": True}
    with monkeypatch.context() as patch:
        patch.setattr(criteo_files, "write_rows", write_until)
        with pytest.raises(
            RunError, match=r"cannot write .*_\*\.bin: No space left on device; the next run writes all"
        ):
            opened(**flags)
    with pytest.raises(RunError, match="not complete"):
        verify(tmp_path / "kaggle_processed")
    np.testing.assert_array_equal(rows_of(opened(**flags).training_data()), processed[0][:48])
    verify(tmp_path / "kaggle_processed")


def test_a_missing_binary_file_is_named(tmp_path):
    random_rows(8).tofile(tmp_path / "x_test.bin")
    with pytest.raises(UsageError, match=r"x_train\.bin is missing, and cannot be written: "):
        opened(processed_data_file=str(tmp_path / "x"), mlperf_bin_loader=True)
    with pytest.raises(UsageError, match=r"expected the name of binary files without _train\.bin, got .*x_test\.bin"):
        opened(processed_data_file=str(tmp_path / "x_test.bin"), mlperf_bin_loader=True)


@pytest.mark.parametrize("binary", [False, True])
def test_too_few_samples_for_a_step_or_a_test_are_refused(processed, tmp_path, binary):
    given = {"processed_data_file": str(processed[1]), "mlperf_bin_loader": binary}
    split = "the data set's training split of 51 samples does not fill"
    with pytest.raises(UsageError, match=f"{split} a batch of --mini-batch-size=100; give a smaller --mini-batch-size"):
        opened(**given, mini_batch_size=100)
    with pytest.raises(UsageError, match=f"{split} --mlperf-grad-accum-iter=4 batches of --mini-batch-size=20"):
        opened(**given, mini_batch_size=20, mlperf_grad_accum_iter=4)
    with pytest.raises(UsageError, match="--num-batches=1 is less than --mlperf-grad-accum-iter=2"):
        opened(**given, num_batches=1, mlperf_grad_accum_iter=2)
    write_npz(tmp_path / "three_processed.npz", processed[0][:3], counts=np.array(COUNTS, dtype=np.int32))
    given |= {"processed_data_file": str(tmp_path / "three_processed.npz"), "mini_batch_size": 1}
    assert opened(**given).options.data_size == 3
    for name, asked in (("--test-freq=1", {"test_freq": 1}), ("--inference-only", {"inference_only": True})):
        with pytest.raises(UsageError, match=f"{name} needs test samples, but the data set has none"):
            opened(**given, **asked)


def test_errors_name_the_wrong_file(processed, tmp_path):
    _, path = processed
    with pytest.raises(UsageError, match="--arch-mlp-bot starts with 4, but must start with 13"):
        opened(processed_data_file=str(path), arch_mlp_bot=(4, 2))
    np.savez(tmp_path / "other.npz", counts=np.array(COUNTS))
    with pytest.raises(RunError, match=r"other.npz: not a readable .npz file: there is no array y in it"):
        opened(processed_data_file=str(tmp_path / "other.npz"))
    (tmp_path / "broken.npz").write_bytes(b"PK not a zip file")
    with pytest.raises(RunError, match=r"broken.npz: not a readable .npz file: File is not a zip file"):
        opened(processed_data_file=str(tmp_path / "broken.npz"))
    (tmp_path / "kaggle_processed_train.bin").write_bytes(bytes(161))
    with pytest.raises(RunError, match=r"train.bin: 161 bytes are not a whole number of rows of 160"):
        opened(processed_data_file=str(path), mlperf_bin_loader=True)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"counts": np.array(COUNTS[1:])}, "array counts: expected 26 whole numbers of at least 1"),
        ({"counts": np.array([0, *COUNTS[1:]])}, "array counts: expected 26 whole numbers of at least 1"),
        ({"counts": np.array(COUNTS, dtype=float)}, "array counts: expected 26 whole numbers of at least 1"),
        ({"X_int": np.zeros((1, 13))}, r"shapes \(\(59,\), \(1, 13\), \(59, 26\)\)"),
        ({"y": np.zeros(())}, r"array y has shape \(\); expected \(n,\)"),
        ({"X_cat": np.array([{}])}, "arrays of Python objects are not read"),
    ],
)
def test_arrays_of_a_wrong_form_are_refused(arrays, message, tmp_path):
    rows, path = random_rows(59), tmp_path / "kaggle_processed.npz"
    right = {"X_cat": rows[:, 14:], "X_int": rows[:, 1:14], "y": rows[:, 0], "counts": np.array(COUNTS)}
    np.savez(path, **(right | arrays))
    with pytest.raises(RunError, match=f"kaggle_processed.npz: not a readable .npz file: .*{message}"):
        list(opened(processed_data_file=str(path)).training_data())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_npz_file_is_read_or_named(data):
    rows = random_rows(59)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kaggle_processed.npz")
        write_npz(path, rows, counts=np.array(COUNTS, dtype=np.int32))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 0]))])
        with contextlib.suppress(RunError, UsageError):
            list(opened(processed_data_file=str(path)).training_data())


def test_flags_that_differ_from_those_of_a_folder_without_text_are_named(tmp_path):
    pytest.importorskip("polars", reason="preprocessing needs polars: pip install -r requirements-data.txt")
    text, folder = str(tmp_path / "train.txt"), str(tmp_path / "train_processed")
    generate(text, 100)
    size = opened(raw_data_file=text, max_ind_range=100).options.data_size
    (tmp_path / "train.txt").unlink()
    both = {"processed_data_file": folder, "raw_data_file": text}
    for there in ({"processed_data_file": folder}, {"raw_data_file": text}, both):
        assert opened(**there, max_ind_range=100).options.data_size == size
        with pytest.raises(RunError) as refusal:
            opened(**there, max_ind_range=7, data_set="terabyte", data_sub_sample_rate=0.5)
        assert str(refusal.value).startswith(
            f"{folder} is stale: it was made with --data-set=kaggle, not terabyte; --max-ind-range=100, not 7; "
            "--data-sub-sample-rate=0.0, not 0.5. Delete it"
        )


def test_the_optimal_auc_is_that_of_the_true_probabilities():
    rng = np.random.default_rng(0)
    values = rng.integers(0, criteo_generator.SIGNAL_VALUES, (400_000, 4))
    probability = criteo_generator.click_probability(values)
    assert roc_auc_score(rng.random(400_000) < probability, probability) == pytest.approx(optimal_auc(), abs=0.003)


def test_the_optimal_auc_of_bags_is_that_of_the_true_probabilities():
    rng = np.random.default_rng(0)
    bags, dense = rng.integers(0, 8, (3, 400_000, 2)), rng.integers(0, 8, 400_000)
    probability = criteo_generator.click_probability_of_bags(bags, dense)
    auc = roc_auc_score(rng.random(400_000) < probability, probability)
    assert auc == pytest.approx(optimal_auc(multi_hot=True), abs=0.003)


@pytest.mark.parametrize(
    "model",
    [
        {"arch_interaction_op": "cat", "learning_rate": 0.05},
        {"arch_interaction_op": "dcn", "dcn_low_rank_dim": 8, "learning_rate": 0.01, "multi_hot_sizes": (3, 1) * 13},
    ],
    ids=["one-hot", "DLRM-dcnv2, multi-hot"],
)
def test_training_finds_the_planted_signal(model, tmp_path):
    pytest.importorskip("polars", reason="preprocessing needs polars: pip install -r requirements-data.txt")
    generate(str(tmp_path / "train.txt"), 70_000)
    check_auc_after_training(optimal_auc(), raw_data_file=str(tmp_path / "train.txt"), **model)


def test_training_finds_the_signal_in_bags(tmp_path):
    criteo_generator.generate_bags(str(tmp_path / "bags"), 70_000)
    model = {"arch_interaction_op": "dcn", "dcn_low_rank_dim": 8, "learning_rate": 0.01}
    tables = {"arch_embedding_size": criteo_generator.CARDINALITIES}
    check_auc_after_training(optimal_auc(True), processed_data_file=str(tmp_path / "bags"), **model, **tables)


def check_auc_after_training(optimum: float, **given) -> None:
    """Trains for an epoch. The test AUC comes close to that of the model which made the data."""
    from dlrm_s_pytorch import Trainer

    data_set = opened(
        data_randomize="total", device="cpu", arch_sparse_feature_size=8, arch_mlp_bot=(13, 32, 8),
        arch_mlp_top=(32, 1), mini_batch_size=128, optimizer="adagrad", print_freq=1000, nepochs=1, **given,
    )  # fmt: skip
    trainer = Trainer(data_set, select_backend(data_set.options))

    def test_auc() -> float:
        return trainer.evaluator.evaluate(trainer.test_data.batches()).auc

    before = test_auc()
    trainer.run()
    assert before < 0.62
    assert optimum - 0.05 < test_auc() < optimum + 0.03
