"""Stored bags: MLPerf's files of DLRM-dcnv2 and HugeCTR's give the batches that expansion while reading gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_criteo_data import COUNTS, opened, random_rows, write_npz

from dlrm.batch import Batch
from dlrm.data import bag_files, criteo_files, criteo_rows
from dlrm.errors import RunError, UsageError

SIZES = (3, 1, *[2] * 24)
DAY_SIZES = (9, 9, 9, 8, 8, 8, 8)  # of 59 samples, as the reference script divides them
FLAGS = {"arch_embedding_size": tuple(COUNTS), "mini_batch_size": 4, "test_mini_batch_size": 3}


@pytest.fixture
def expanded(tmp_path):
    """The 59 samples as bags that are drawn while they are read."""
    write_npz(tmp_path / "kaggle_processed.npz", random_rows(59), counts=np.array(COUNTS, dtype=np.int32))
    return opened(processed_data_file=str(tmp_path / "kaggle_processed.npz"), **FLAGS, multi_hot_sizes=SIZES)


def bags_of(rows: np.ndarray) -> list[np.ndarray]:
    """Returns the bags of each table, (rows, L), as the materialiser of MLPerf's program draws them."""
    generator, bags = np.random.RandomState(0), []
    for table, (count, size) in enumerate(zip(COUNTS, SIZES, strict=True)):
        others = generator.randint(0, count, (count, size - 1)).astype(np.int32)
        first = rows[:, 14 + table, None]
        bags.append(np.concatenate([first, others[first[:, 0]]], axis=1))
    return bags


def logarithms(rows: np.ndarray) -> np.ndarray:
    return torch.log(torch.from_numpy(rows[:, 1:14]).float() + 1).numpy()


@pytest.fixture
def mlperf_folder(tmp_path):
    folder, rows = tmp_path / "mlperf", random_rows(59)
    folder.mkdir()
    for day, end in enumerate(np.cumsum(DAY_SIZES)):
        part = rows[end - DAY_SIZES[day] : end]
        np.save(folder / f"day_{day}_labels.npy", part[:, :1])
        np.save(folder / f"day_{day}_dense.npy", logarithms(part))
        np.save(folder / f"day_{day}_sparse.npy", part[:, 14:].astype(np.int64 if day == 6 else np.int32))
        bags = {str(table): bags for table, bags in enumerate(bags_of(part))}
        np.savez(folder / f"day_{day}_sparse_multi_hot.npz", **bags)
    return folder


@pytest.fixture
def hugectr_folder(tmp_path):
    folder, rows = tmp_path / "hugectr", random_rows(59)
    folder.mkdir()
    content = np.concatenate([rows[:, :1], logarithms(rows).view(np.int32), *bags_of(rows)], axis=1).astype("<i4")
    content[:51].tofile(folder / "train_data.bin")
    content[51:55].tofile(folder / "val_data.bin")
    return folder


def assert_same(batches, expected) -> None:
    for batch, other in zip(batches, expected, strict=True):
        assert isinstance(batch, Batch)
        for name in ("dense", "offsets", "target"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name
        assert all(map(torch.equal, batch.indices, other.indices))


@pytest.mark.parametrize("data_randomize", ["none", "total"])
@pytest.mark.parametrize("multi_hot_sizes", [(1,), SIZES])
def test_mlperfs_files_have_the_bags_that_expansion_draws(mlperf_folder, expanded, multi_hot_sizes, data_randomize):
    given = FLAGS | {"multi_hot_sizes": multi_hot_sizes, "data_randomize": data_randomize, "num_workers": 2}
    stored = opened(processed_data_file=str(mlperf_folder), **given)
    assert stored.options.lookups_per_bag == SIZES
    in_order = opened(processed_data_file=expanded.options.processed_data_file, **given | {"multi_hot_sizes": SIZES})
    assert_same(stored.training_data(), in_order.training_data())
    assert_same(stored.test_data(), expanded.test_data())


def test_mlperfs_lookups_without_bags_are_expanded_as_all_others(mlperf_folder, expanded):
    for day in range(7):
        (mlperf_folder / f"day_{day}_sparse_multi_hot.npz").unlink()
    stored = opened(processed_data_file=str(mlperf_folder), **FLAGS, multi_hot_sizes=SIZES)
    assert_same(stored.training_data(), expanded.training_data())
    assert_same(stored.test_data(), expanded.test_data())


def test_hugectrs_rows_have_the_bags_that_expansion_draws(hugectr_folder, expanded):
    stored = opened(processed_data_file=str(hugectr_folder), **FLAGS, multi_hot_sizes=SIZES)
    assert_same(stored.training_data(), expanded.training_data())
    assert_same(stored.test_data(), expanded.test_data())


@pytest.mark.parametrize(("folder", "name"), [("mlperf_folder", "day_3_dense.npy"), ("hugectr_folder", "val_data.bin")])
def test_ranks_compare_the_sizes_of_the_files(folder, name, request):
    folder = request.getfixturevalue(folder)
    stored = opened(processed_data_file=str(folder), **FLAGS, multi_hot_sizes=SIZES)
    before = stored.fingerprint()
    with (folder / name).open("ab") as file:
        file.write(bytes(4))
    assert stored.fingerprint() != before


def test_ids_are_capped(mlperf_folder):
    stored = opened(processed_data_file=str(mlperf_folder), **FLAGS, max_ind_range=31)
    assert stored.options.arch_embedding_size == tuple(min(count, 31) for count in COUNTS)
    assert max(int(rows.max()) for batch in stored.training_data() for rows in batch.indices) == 30


def test_a_member_is_not_copied_into_memory(mlperf_folder):
    stored = opened(processed_data_file=str(mlperf_folder), **FLAGS)
    for day in stored._stored.splits["train"]._days:
        assert all(isinstance(bags, np.memmap) for bags in day._bags)


@pytest.mark.parametrize("kind", ["mlperf", "hugectr"])
def test_random_reads_are_announced_where_memory_has_no_room(kind, request, monkeypatch):
    monkeypatch.setattr(criteo_files, "free_memory", lambda: 0)
    announced = []
    for module in (bag_files, criteo_rows):
        monkeypatch.setattr(module, "expect_random_reads", lambda array: announced.append(array.dtype.name))
    given = FLAGS | {"data_randomize": "total", "multi_hot_sizes": SIZES}
    opened(processed_data_file=str(request.getfixturevalue(f"{kind}_folder")), **given).training_data()
    assert announced == (["int32"] if kind == "hugectr" else ["int32", "float32", *["int32"] * 26] * 6)


def damage(name: str, change):
    """Returns a function that puts other arrays in the place of those in a file of MLPerf's."""

    def apply(folder) -> None:
        path = folder / name
        if path.suffix == ".npy":
            np.save(path, change(np.load(path)))
        else:
            np.savez(path, **change(dict(np.load(path))))

    return apply


def compress(folder) -> None:
    path = folder / "day_2_sparse_multi_hot.npz"
    np.savez_compressed(path, **np.load(path))


def cut_off(folder) -> None:
    path = folder / "day_2_dense.npy"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "day_5_labels.npy").unlink(), r"day_5_labels\.npy is missing"),
        (lambda folder: (folder / "day_1_sparse_multi_hot.npz").unlink(), r"day_1_sparse_multi_hot\.npz is missing"),
        (compress, r"day_2_sparse_multi_hot\.npz, member 0: not readable: it is compressed; write it by numpy\.savez"),
        (cut_off, r"day_2_dense\.npy: not readable"),
        (damage("day_3_dense.npy", lambda a: a[:, :12]),
         r"day_3_dense\.npy: float32 \(8, 12\); expected float32 \(rows, 13\)"),
        (damage("day_3_labels.npy", lambda a: a[1:]),
         r"day_3_labels\.npy: int32 \(7, 1\); expected int32 \(8, 1\)"),
        (damage("day_4_sparse_multi_hot.npz", lambda a: a | {"7": a["7"].astype(float)}),
         r"day_4_sparse_multi_hot\.npz, member 7: float64 \(8, 2\); expected int32 \(8, lookups per bag\)"),
        (damage("day_4_sparse_multi_hot.npz", lambda a: {k: v for k, v in a.items() if k != "25"}),
         r"day_4_sparse_multi_hot\.npz, member 25: not readable: there is no array 25 in it"),
        (damage("day_4_sparse_multi_hot.npz", lambda a: a | {"3": a["3"][:, :1]}),
         r"day_4_.*: bags of 3-1-2-1-2-.* in one day, but 3-1-2-2-2-.* in .*day_0_"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(mlperf_folder, change, message):
    change(mlperf_folder)
    with pytest.raises(RunError, match=message):
        opened(processed_data_file=str(mlperf_folder), **FLAGS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("day_3_labels.npy", 2, r"day_3_\*, row 6: the label is 2; expected 0 or 1"),
        ("day_3_dense.npy", np.nan, r"day_3_\*, row 6: dense feature 1 is nan; expected a finite number"),
    ],
)
def test_a_number_that_is_not_possible_is_named(mlperf_folder, name, value, message):
    array = np.load(mlperf_folder / name)
    array[5, 0] = value
    np.save(mlperf_folder / name, array)
    with pytest.raises(RunError, match=message):
        list(opened(processed_data_file=str(mlperf_folder), **FLAGS, num_workers=0).training_data())


def test_flags_that_do_not_fit_are_refused(mlperf_folder, hugectr_folder):
    def refused(folder, **given) -> str:
        with pytest.raises(UsageError) as error:
            opened(processed_data_file=str(folder), **FLAGS | given)
        return str(error.value)

    assert "--arch-embedding-size: give the rows of each of the 26 tables" in refused(
        mlperf_folder, arch_embedding_size=(4, 3, 2)
    )
    assert "have bags of 3-1-2-2" in refused(mlperf_folder, multi_hot_sizes=(2,))
    assert "not a whole number of rows of 160 bytes" in refused(hugectr_folder)
    (hugectr_folder / "val_data.bin").unlink()
    assert "has no val_data.bin or test_data.bin" in refused(hugectr_folder, multi_hot_sizes=SIZES)
    assert "--mlperf-bin-loader" in refused(mlperf_folder, mlperf_bin_loader=True)
