"""Every source of data has all members of the protocols `Data` and `DataSet`, with the meaning that they give them."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_criteo_data import COUNTS, random_rows, write_npz
from test_trace import EXAMPLE

from dlrm.batch import Batch, Share, batch_sizes, joined
from dlrm.data.data_set import Data, DataSet, open_data_set
from dlrm.options import Options


@pytest.fixture(params=["random", "trace", "criteo", "multi-hot"])
def options(request, tmp_path) -> Options:
    """Flags of each source, with 12 batches of 4 training samples, and a last test batch that is smaller than 5."""
    given = {"mini_batch_size": 4, "num_batches": 12, "test_mini_batch_size": 5}
    lookups = {"arch_embedding_size": (7, 5, 9), "num_indices_per_lookup": (3, 1, 2)}
    if request.param == "random":
        return Options(**given | lookups)
    if request.param == "trace":
        EXAMPLE.write(tmp_path / "dist.log")
        return Options(**given | lookups, data_generation="synthetic", data_trace_file=str(tmp_path / "dist.log"))
    path = tmp_path / "kaggle_processed.npz"
    write_npz(path, random_rows(80), counts=np.array(COUNTS, dtype=np.int32))
    given |= {"data_generation": "dataset", "arch_mlp_bot": (13, 2), "processed_data_file": str(path)}
    return Options(**given, multi_hot_sizes=(3, 1, *[2] * 24) if request.param == "multi-hot" else (1,))


@pytest.fixture
def data_set(options) -> DataSet:
    return open_data_set(options)


@pytest.fixture(params=["training", "test"])
def data(request, data_set) -> Data:
    return data_set.training_data() if request.param == "training" else data_set.test_data()


def methods_of(protocol: type) -> dict[str, Callable]:
    """Returns the methods that a protocol declares, by name."""
    return {name: member for name, member in vars(protocol).items()
            if inspect.isfunction(member) and member.__module__ == protocol.__module__}  # fmt: skip


def assert_has_members(source: object, protocol: type) -> None:
    for name, hint in typing.get_type_hints(protocol).items():
        assert isinstance(getattr(source, name), typing.get_origin(hint) or hint), name
    for name, method in methods_of(protocol).items():
        own_method = getattr(type(source), name)
        assert inspect.signature(own_method).parameters == inspect.signature(method).parameters, name


def test_the_checked_methods_are_those_of_the_protocols():
    assert methods_of(Data).keys() == {"__len__", "__iter__", "batches", "whole_bags"}
    assert methods_of(DataSet).keys() == {"training_data", "test_data", "weight_generator", "fingerprint"}


def test_a_source_has_all_members(data_set, data):
    assert_has_members(data_set, DataSet)
    assert_has_members(data, Data)


def test_options_have_the_sizes_of_the_data(data_set, data):
    assert data.table_rows == data_set.options.arch_embedding_size
    assert data.num_dense_features == data_set.options.arch_mlp_bot[0]
    assert tuple(data.max_lookups_per_bag) == data_set.options.lookups_per_bag
    assert data_set.training_data().samples == data_set.options.samples_per_epoch


def test_a_fingerprint_follows_from_the_flags(data_set, options):
    fingerprint = data_set.fingerprint()
    assert fingerprint == open_data_set(options).fingerprint()
    assert all(isinstance(text, str) for text in [*fingerprint, *fingerprint.values()])


def test_sizes_are_those_of_the_batches(data_set, data):
    batches = list(data)
    assert len(batches) == len(data) == math.ceil(data.samples / data.batch_size)
    assert [len(batch) for batch in batches] == list(batch_sizes(data.samples, data.batch_size))
    for batch in batches:
        size, tables = len(batch), len(data.table_rows)
        assert (batch.dense.shape, batch.target.shape) == ((size, data.num_dense_features), (size, 1))
        assert (len(batch.indices), batch.offsets.shape, batch.bags) == (tables, (tables, size + 1), size)
        assert (batch.dense.dtype, batch.target.dtype, batch.offsets.dtype) == (torch.float, torch.float, torch.int64)
        assert (batch.offsets[:, 0] == 0).all()
        assert batch.offsets[:, -1].tolist() == [len(indices) for indices in batch.indices]
        assert batch.offsets.diff().min() >= 1
        assert (batch.offsets.diff().amax(1) <= torch.tensor(data.max_lookups_per_bag)).all()
        for indices, rows in zip(batch.indices, data.table_rows, strict=True):
            assert 0 <= indices.min() <= indices.max() < rows
            assert indices.dtype in (torch.int32, torch.int64)
    only_full_batches = data.samples == len(data) * data.batch_size
    assert only_full_batches == (data.batch_size == data_set.options.mini_batch_size)


def assert_equal(batches: list[Batch], expected: list[Batch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        for name in ("dense", "offsets", "target"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name
        for indices, other_indices in zip(batch.indices, other.indices, strict=True):
            assert torch.equal(indices, other_indices)


def test_epochs_repeat(data):
    assert_equal(list(data), list(data))


@pytest.mark.parametrize("first", [0, 1, 7, 100])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_batches_begin_anywhere_and_are_joined(data, first, width):
    assert_equal(list(data.batches(first, width)), list(joined(list(data)[first:], width)))


@pytest.mark.parametrize("samples", [slice(0, 2), slice(2, 9), slice(9, 9)])
@pytest.mark.parametrize(("first", "width"), [(0, 1), (1, 2), (0, 5)])
def test_a_share_has_its_samples_and_the_lookups_in_its_tables(data, samples, first, width):
    share = Share(samples, [0, 2])
    expected = [expected_share(batch, share, data.is_stored_by_sample) for batch in data.batches(first, width)]
    complete = data.whole_bags(share.tables)
    assert_equal([complete(batch) for batch in data.batches(first, width, share)], expected)


def expected_share(batch: Batch, share: Share, is_stored_by_sample: bool) -> Batch:
    """Returns the part of a whole batch that `Data.batches` gives for a share."""
    own_samples = range(len(batch))[share.samples]
    bags = own_samples if is_stored_by_sample else range(len(batch))
    lookups = [batch.offsets[table, [bags.start, bags.stop]].tolist() for table in share.tables]
    return Batch(
        dense=batch.dense[own_samples.start : own_samples.stop],
        indices=[batch.indices[table][begin:end] for table, (begin, end) in zip(share.tables, lookups, strict=True)],
        offsets=batch.offsets[share.tables, bags.start : bags.stop + 1] - torch.tensor(lookups)[:, :1],
        target=batch.target[own_samples.start : own_samples.stop],
    )
