"""Categories expanded to bags: the numbers of MLPerf's program, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from test_criteo_data import COUNTS, opened, random_rows, write_npz

from dlrm.batch import Batch
from dlrm.data import multi_hot
from dlrm.data.multi_hot import MultiHot
from dlrm.errors import UsageError

ROWS, SIZES = [1, 7, 300, 40], [3, 1, 100, 2]


def bags_of_rows(distribution: str) -> list[np.ndarray]:
    """Returns the bag of each row of each table, (rows, L), as the materialiser of MLPerf's program draws them."""
    generator, tables = np.random.RandomState(0), []
    for rows, size in zip(ROWS, SIZES, strict=True):
        if distribution == "uniform":
            others = generator.randint(0, rows, (rows, size - 1))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # most numbers are no int32; this holds on x86 alone
                others = generator.pareto(0.25, (rows, size - 1)).astype(np.int32) % rows
        tables.append(np.concatenate([np.arange(rows)[:, None], others], axis=1))
    return tables


@pytest.mark.parametrize("distribution", ["uniform", "pareto"])
@pytest.mark.parametrize("drawn_at_once", [1, 250, 2**22])
def test_bags_are_those_of_mlperfs_program(distribution, drawn_at_once, monkeypatch):
    monkeypatch.setattr(multi_hot, "DRAWN_AT_ONCE", drawn_at_once)
    bags = bags_of_rows(distribution)
    for tables in ([0, 1, 2, 3], [3], [1, 2], [1]):
        rows = [torch.randint(ROWS[table], (50,), dtype=torch.int32) for table in tables]
        one_hot = Batch(torch.zeros(50, 0), rows, torch.arange(51).repeat(len(tables), 1), torch.zeros(50, 1))
        found = MultiHot(ROWS, SIZES, distribution).for_tables(tables)(one_hot)
        for place, table in enumerate(tables):
            assert found.indices[place].dtype == torch.int32
            assert found.offsets[place].tolist() == [SIZES[table] * bag for bag in range(51)]
            np.testing.assert_array_equal(found.indices[place].view(50, -1), bags[table][rows[place].numpy()])


def test_only_rows_of_the_named_tables_are_kept(monkeypatch):
    """On several ranks, each has the rows of its own tables."""
    monkeypatch.setattr(multi_hot, "free_memory", lambda: 4 * (300 * 99 + 40))
    multi = MultiHot(ROWS, SIZES, "uniform")
    for _ in ("training", "test"):
        multi.for_tables([1, 2, 3])
    (kept,) = multi._kept.values()
    assert {table: rows.shape for table, rows in kept.items()} == {2: (300, 99), 3: (40, 1)}


def test_rows_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(multi_hot, "free_memory", lambda: 4 * 299)
    MultiHot([300], [1], "uniform").for_tables([0])
    with pytest.raises(UsageError, match=r"--multi-hot-sizes: .* only 0\.0 GiB are free; lower --max-ind-range"):
        MultiHot([300], [2], "uniform").for_tables([0])


def test_a_data_set_has_the_bags_of_its_categories(tmp_path):
    path = tmp_path / "kaggle_processed.npz"
    write_npz(path, random_rows(80), counts=np.array(COUNTS, dtype=np.int32))
    given = {"processed_data_file": str(path), "mini_batch_size": 8, "data_randomize": "none"}
    one_hot = next(iter(opened(**given).training_data()))
    data_set = opened(**given, multi_hot_sizes=(3,))
    bags = next(iter(data_set.training_data()))
    assert data_set.options.lookups_per_bag == (3,) * 26
    for table, rows in enumerate(one_hot.indices):
        assert bags.indices[table].view(8, 3)[:, 0].equal(rows)
        assert bags.offsets[table].tolist() == list(range(0, 25, 3))
        assert bags.indices[table].max() < COUNTS[table]


def test_one_number_or_one_per_table_is_asked_for(tmp_path):
    path = tmp_path / "kaggle_processed.npz"
    write_npz(path, random_rows(80), counts=np.array(COUNTS, dtype=np.int32))
    with pytest.raises(UsageError, match="--multi-hot-sizes has 3 numbers; give one for all tables, or 26"):
        opened(processed_data_file=str(path), multi_hot_sizes=(3, 2, 1))
