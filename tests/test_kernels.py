"""The lookup, embedding bag and sparse optimizer ops against torch.nn.EmbeddingBag, torch.optim and numpy."""

from __future__ import annotations

import time
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import nn

from dlrm.batch import Batch
from dlrm.data.random_data import RandomData
from dlrm.errors import RunError
from dlrm.kernels.embedding import EmbeddingBags, SparseAdagrad, SparseSGD
from dlrm.kernels.lookups import PreparedLookups, Sizes
from dlrm.kernels.static_embedding import StaticAdagrad, StaticEmbeddingBags, StaticLookups, StaticSGD
from dlrm.options import Options
from dlrm.pipeline import BatchPipeline
from dlrm_s_pytorch import select_backend

UNUSED = 0x7FFFFFFF  # fills the buffers before each op, so that an op that reads unused elements fails


@st.composite
def lookups(draw, max_tables: int = 3):
    """Draws the number of rows per table, and the bags per table, each bag a list of rows."""
    num_bags = draw(st.integers(1, 6))
    table_rows = draw(st.lists(st.sampled_from([1, 2, 3, 50, 5000]), min_size=1, max_size=max_tables))
    bags = [
        draw(st.lists(st.lists(st.integers(0, rows - 1) | st.sampled_from([0, rows - 1]), max_size=5),
                      min_size=num_bags, max_size=num_bags))
        for rows in table_rows
    ]  # fmt: skip
    return table_rows, bags


def raw(bags, dtype=torch.int64) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns the indices of each table, (lookups,), and the offsets, (T, B + 1)."""
    indices = [torch.tensor([row for bag in table for row in bag], dtype=dtype) for table in bags]
    offsets = np.array([np.cumsum([0, *map(len, table)]) for table in bags])
    return indices, torch.from_numpy(offsets).to(dtype)


def empty_buffers(table_rows, batch_size: int, lookups_per_bag: list[int]) -> PreparedLookups:
    buffers = PreparedLookups.allocate(Sizes(table_rows, batch_size, lookups_per_bag, 0))
    for tensor in buffers.fields():
        tensor.fill_(UNUSED)
    return buffers


def prepare(table_rows, bags, dtype=torch.int64) -> PreparedLookups:
    """Returns prepared lookups with more room than they need."""
    indices, offsets = raw(bags, dtype)
    into = empty_buffers(table_rows, len(bags[0]), room_per_bag(bags))
    torch.ops.dlrm.coalesce_lookups(indices, offsets, table_rows, into.max_lookups, *into.fields())
    return into


def room_per_bag(bags) -> list[int]:
    """Returns one lookup more per table than its longest bag has; and one more still for each second table."""
    return [1 + number % 2 + max(map(len, table)) for number, table in enumerate(bags)]


TWO_BAGS = ([4, 1], [[[3, 0, 3], [0]], [[], [0, 0]]])


# ---------------------------------------------------------------------------------------------------------------------
# coalesce_lookups
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(case=lookups())
@example(case=TWO_BAGS)
@settings(deadline=None, max_examples=60)
def test_prepared_lookups_are_the_lookups_sorted_by_row(dtype, case):
    table_rows, bags = case
    parts = prepare(table_rows, bags, dtype=dtype).by_table()
    for table, prepared in zip(bags, parts, strict=True):
        flat = [row for bag in table for row in bag]
        bag_of = np.repeat(np.arange(len(table)), [len(bag) for bag in table])
        order = np.argsort(flat, kind="stable")
        unique, counts = np.unique(np.array(flat, dtype=int), return_counts=True)
        num_lookups, num_unique = len(flat), len(unique)
        assert prepared.indices_fwd[:num_lookups].tolist() == flat
        assert prepared.offsets.tolist() == np.cumsum([0, *map(len, table)]).tolist()
        assert prepared.valid_count_fwd.tolist() == [len(table) + 1, num_lookups]
        assert prepared.unique_indices[:num_unique].tolist() == unique.tolist()
        assert prepared.output_rows[:num_lookups].tolist() == bag_of[order.astype(int)].tolist()
        assert prepared.output_row_offsets[: num_unique + 1].tolist() == np.cumsum([0, *counts]).tolist()
        assert prepared.valid_count_bwd.tolist() == [num_unique + 1, num_lookups]
        assert prepared.unique_count.tolist() == [num_unique]


@pytest.mark.parametrize(
    ("indices", "offsets", "error", "message"),
    [
        ([[0, 4]], [[0, 1, 2]], IndexError, "table 0, sample 1: lookup of row 4, but the table's rows are 0 to 3"),
        ([[-1, 0]], [[0, 1, 2]], IndexError, "table 0, sample 0: lookup of row -1"),
        ([[0], [1]], [[0, 1, 1], [0, 1, 1]], IndexError, "table 1, sample 0: lookup of row 1, but the table's rows"),
        ([[2, 2, 9]], [[0, 0, 3]], IndexError, "table 0, sample 1: lookup of row 9"),
        ([[0, 0]], [[0, 2, 1]], ValueError, "table 0, sample 1: offsets must not decrease, as from 2 to 1"),
        ([[0, 0]], [[0, 1, 3]], ValueError, "table 0, sample 1: offsets must end at the number of lookups, 2, not at"),
        ([[0, 0]], [[1, 1, 2]], ValueError, "table 0, sample 0: offsets must start at 0, not at 1"),
        ([[0] * 9], [[0, 1, 9]], ValueError, "table 0: 9 lookups, but there is room for 8"),
    ],
)
def test_bad_lookups_are_refused_with_table_and_sample(indices, offsets, error, message):
    table_rows = [4, 1][: len(indices)]
    into = empty_buffers(table_rows, 2, [4, 5][: len(indices)])
    with pytest.raises(error, match=message):
        torch.ops.dlrm.coalesce_lookups(
            list(map(torch.tensor, indices)), torch.tensor(offsets), table_rows, into.max_lookups, *into.fields()
        )


# ---------------------------------------------------------------------------------------------------------------------
# The embedding bag and its update
# ---------------------------------------------------------------------------------------------------------------------


def tables(table_rows, dim: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Returns random tables, (rows, dim) each."""
    generator = torch.Generator().manual_seed(len(table_rows) + dim)
    return [torch.randn(rows, dim, generator=generator, dtype=dtype) for rows in table_rows]


@pytest.mark.parametrize("dim", [1, 3, 16, 64, 130])
@given(case=lookups())
@example(case=TWO_BAGS)
@settings(deadline=None, max_examples=30)
def test_pooled_output_equals_embedding_bag(dim, case):
    table_rows, bags = case
    weights = tables(table_rows, dim)
    prepared = prepare(table_rows, bags)
    pooled = torch.ops.dlrm.embedding_bag_sum(weights, *prepared.bagged())
    indices, offsets = raw(bags)
    expected = [
        nn.functional.embedding_bag(i, w, o, mode="sum", include_last_offset=True)
        for i, w, o in zip(indices, weights, offsets, strict=True)
    ]
    torch.testing.assert_close(pooled, torch.stack(expected, dim=1))


ADAGRAD = {"eps": 0.1, "initial_accumulator_value": 0.5}  # which make a difference
OPTIMIZERS = {
    "adagrad": (EmbeddingBags, SparseAdagrad, torch.optim.Adagrad),
    "sgd": (EmbeddingBags, SparseSGD, torch.optim.SGD),
    "adagrad, static shapes": (StaticEmbeddingBags, StaticAdagrad, torch.optim.Adagrad),
    "sgd, static shapes": (StaticEmbeddingBags, StaticSGD, torch.optim.SGD),
    "adagrad, with settings": (
        EmbeddingBags, partial(SparseAdagrad, **ADAGRAD), partial(torch.optim.Adagrad, **ADAGRAD)
    ),
    "adagrad, static shapes, with settings": (
        StaticEmbeddingBags, partial(StaticAdagrad, **ADAGRAD), partial(torch.optim.Adagrad, **ADAGRAD)
    ),
}  # fmt: skip


def fill(lookups_type, table_rows, bags):
    """Returns lookups of that type, with more room than they need."""
    indices, offsets = raw(bags)
    batch = Batch(torch.empty(0), indices, offsets, torch.empty(0))
    sizes = Sizes(table_rows, len(bags[0]), room_per_bag(bags), 0)
    tensors = [torch.full(shape, UNUSED, dtype=torch.int32) for shape in lookups_type.shapes(sizes)]
    lookups = lookups_type.of(sizes, tensors)
    lookups.fill(batch, table_rows, torch.ops.dlrm.coalesce_lookups)
    return lookups


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dim", [2, 64, 130])
@given(case=lookups(), steps=st.integers(1, 4))
@example(case=TWO_BAGS, steps=3)
@settings(deadline=None, max_examples=25)
def test_updates_equal_embedding_bag_and_torch_optim(name, dim, case, steps):
    table_rows, bags = case
    embedding_bags, ours, theirs = OPTIMIZERS[name]
    weights = tables(table_rows, dim)
    model = embedding_bags(weight.clone() for weight in weights)
    optimizer = ours(model, lr=0.02)
    oracle = [nn.EmbeddingBag.from_pretrained(w.clone(), False, mode="sum", sparse=True, include_last_offset=True)
              for w in weights]  # fmt: skip
    oracle_optimizer = theirs([bag.weight for bag in oracle], lr=0.02)
    # Multiples of 1/4 add up exactly, in any order. Adagrad would turn a rounding error around zero into a whole step.
    factor = (torch.arange(len(bags[0]) * len(bags) * dim) % 7 - 3).reshape(len(bags[0]), len(bags), dim) / 4
    for step in range(steps):
        rotated_bags = [table[step % len(table) :] + table[: step % len(table)] for table in bags]
        lookups = fill(model.lookups_type, table_rows, rotated_bags)
        pooled = model.pool(model(lookups), lookups)
        (pooled * factor).sum().backward()
        optimizer.step(lookups)
        oracle_optimizer.zero_grad()
        indices, offsets = raw(rotated_bags)
        expected = torch.stack([bag(i, o) for bag, i, o in zip(oracle, indices, offsets, strict=True)], dim=1)
        (expected * factor).sum().backward()
        oracle_optimizer.step()
    for weight, bag in zip(model.weights, oracle, strict=True):
        torch.testing.assert_close(weight, bag.weight, atol=1e-5, rtol=2e-5)
        if isinstance(oracle_optimizer, torch.optim.Adagrad):
            torch.testing.assert_close(
                optimizer.state[weight]["sum"], oracle_optimizer.state[bag.weight]["sum"], atol=1e-5, rtol=2e-5
            )


def test_only_rows_that_were_looked_up_change():
    model = EmbeddingBags(tables([50], 4))
    before = model.weights[0].clone()
    optimizer = SparseAdagrad(model, lr=0.1)
    lookups = prepare([50], [[[3, 7], [7]]])
    model(lookups).sum().backward()
    optimizer.step(lookups)
    changed = (model.weights[0] != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [3, 7]


@given(case=lookups())
@example(case=TWO_BAGS)
@settings(deadline=None, max_examples=30)
def test_dense_gradients_of_the_tables_equal_embedding_bags(case):
    table_rows, bags = case
    weights, theirs = ([w.requires_grad_() for w in tables(table_rows, 3)] for _ in range(2))
    prepared = prepare(table_rows, bags)
    factor = torch.linspace(-1, 2, len(bags[0]) * len(bags) * 3).reshape(len(bags[0]), len(bags), 3)
    pooled = torch.ops.dlrm.embedding_bag_sum(weights, *prepared.bagged())
    ours = torch.autograd.grad((pooled * factor).sum(), weights)
    expected = torch.stack([
        nn.functional.embedding_bag(i, w, o, mode="sum", include_last_offset=True)
        for i, w, o in zip(raw(bags)[0], theirs, raw(bags)[1], strict=True)
    ], dim=1)  # fmt: skip
    for our, their in zip(ours, torch.autograd.grad((expected * factor).sum(), theirs), strict=True):
        torch.testing.assert_close(our, their)


def test_only_weights_and_moments_are_of_table_size():
    model = EmbeddingBags(tables([5000], 8))
    optimizer = SparseAdagrad(model, lr=0.1)
    lookups = prepare([5000], [[[1], [2]]])
    model(lookups).sum().backward()
    optimizer.step(lookups)
    assert model.weights[0].grad is None
    table_size = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.numel() >= 40000]
    assert len(table_size) == 1


def test_opcheck():
    prepared = prepare(*TWO_BAGS)
    weights, moments = tables(TWO_BAGS[0], 3), [torch.zeros(4, 3), torch.zeros(1, 3)]
    indices, offsets = raw(TWO_BAGS[1])
    grouped = prepared.grouped()
    gradient = torch.randn(2, 2, 3)
    differentiable = [weight.clone().requires_grad_() for weight in weights]
    check = torch.library.opcheck
    buffers = empty_buffers(TWO_BAGS[0], 2, [3, 4])
    check(torch.ops.dlrm.coalesce_lookups, (indices, offsets, TWO_BAGS[0], buffers.max_lookups, *buffers.fields()))
    check(torch.ops.dlrm.embedding_bag_sum, (differentiable, *prepared.bagged()))
    check(torch.ops.dlrm.sparse_adagrad_, (weights, moments, gradient, *grouped, 0.1, 1e-10))
    check(torch.ops.dlrm.sparse_sgd_, (weights, gradient, *grouped, 0.1))
    padded = StaticLookups.allocate(Sizes(TWO_BAGS[0], 2, room_per_bag(TWO_BAGS[1]), 0))
    tensors = padded.unique_rows, padded.positions
    check(torch.ops.dlrm.pad_lookups, (prepared.offsets, *grouped, TWO_BAGS[0], *tensors))


# ---------------------------------------------------------------------------------------------------------------------
# Batches on the device
# ---------------------------------------------------------------------------------------------------------------------


def test_prepared_batches_keep_shapes_and_addresses():
    options = Options(num_batches=5, mini_batch_size=4)
    pipeline = BatchPipeline(RandomData(options), select_backend(options))
    seen = set()
    for batch, prepared in zip(RandomData(options), pipeline.run(RandomData(options)), strict=True):
        tensors = prepared.dense, prepared.target, *prepared.lookups.fields()
        seen.add(tuple((tensor.data_ptr(), tensor.shape) for tensor in tensors))
        assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}
        assert torch.equal(prepared.dense, batch.dense)
        assert torch.equal(prepared.target, batch.target)
    assert len(seen) == 2  # two sets of buffers: one is filled while the other is in use
    assert pipeline.batches == 5


def test_a_lookup_outside_its_table_ends_the_run_with_table_and_sample():
    options = Options(arch_embedding_size=(3,), mini_batch_size=2, num_batches=1)
    batch = Batch(torch.zeros(2, 4), [torch.tensor([0, 3])], torch.tensor([[0, 1, 2]]), torch.zeros(2, 1))
    with pytest.raises(RunError, match="table 0, sample 1: lookup of row 3"):
        next(BatchPipeline(RandomData(options), select_backend(options)).run([batch]))


def test_a_batch_in_use_is_not_overwritten_by_the_one_being_prepared():
    """A slow consumer compares each prepared batch with its raw batch, long after the next one could be prepared."""
    options = Options(mini_batch_size=16, num_batches=300, arch_embedding_size=(1000, 7))
    data = RandomData(options)
    pipeline = BatchPipeline(data, select_backend(options))
    for number, (batch, prepared) in enumerate(zip(data, pipeline.run(data), strict=True)):
        if number % 10 == 0:
            time.sleep(0.002)
        for indices, table in zip(batch.indices, prepared.lookups.by_table(), strict=True):
            assert table.indices_fwd[: len(indices)].tolist() == indices.tolist()
            assert torch.equal(table.unique_indices[: table.unique_count], indices.unique())
        assert torch.equal(prepared.dense, batch.dense)


def test_the_next_batch_is_prepared_while_this_one_is_in_use():
    options = Options(mini_batch_size=4, num_batches=3)
    drawn = []
    batches = (drawn.append(batch) or batch for batch in RandomData(options))
    pipeline = BatchPipeline(RandomData(options), select_backend(options)).run(batches)
    next(pipeline)
    for _ in range(1000):
        if len(drawn) == 2:
            break
        time.sleep(0.005)
    assert len(drawn) == 2  # and no more: there are two sets of buffers
    assert len(list(pipeline)) == 2


def test_the_pipeline_leaves_the_number_of_threads_as_it_was():
    options = Options(num_batches=1)
    threads = torch.get_num_threads()
    list(BatchPipeline(RandomData(options), select_backend(options)).run(RandomData(options)))
    assert torch.get_num_threads() == threads
