"""The C++ kernels against the plain-torch references, and against torch.nn and torch.optim, which know neither."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

from dlrm.errors import UsageError
from dlrm.kernels import native
from dlrm.kernels import ops as kernels
from dlrm.kernels.lookups import PreparedLookups, Sizes
from dlrm.kernels.ops import rounding_seeds

ROOT = Path(__file__).parent.parent
DIMENSIONS = (1, 2, 3, 16, 17, 64, 128, 130)
ops = torch.ops.dlrm

pytestmark = pytest.mark.skipif(native.load_kernels() != "native", reason="the C++ kernels can't be built here")
quick = settings(max_examples=60, deadline=None)


@pytest.fixture
def threads():
    """Sets the number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Lookups
# ---------------------------------------------------------------------------------------------------------------------


def raw_lookups(bags_of_tables, dtype=torch.int64, offsets_dtype=torch.int64):
    """Lists of rows for each bag of each table -> (indices, offsets), as a `Batch` has them."""
    indices = [torch.tensor([row for bag in bags for row in bag], dtype=dtype) for bags in bags_of_tables]
    starts = [torch.tensor([0, *map(len, bags)]).cumsum(0) for bags in bags_of_tables]
    return indices, torch.stack(starts).to(offsets_dtype)


@st.composite
def lookups(draw):
    """(indices, offsets, table rows): any number of empty bags, repeated rows, first and last rows."""
    table_rows = draw(st.lists(st.sampled_from([1, 2, 7, 300, 5000, 3_000_000]), min_size=1, max_size=4))
    batch_size = draw(st.integers(1, 9))
    bags = [
        [
            draw(st.lists(st.sampled_from([0, rows - 1]) | st.integers(0, rows - 1), max_size=6))
            for _ in range(batch_size)
        ]
        for rows in table_rows
    ]
    types = st.sampled_from([torch.int32, torch.int64])
    return *raw_lookups(bags, draw(types), draw(types)), table_rows


def random_lookups(table_rows, batch_size, lookups_per_bag, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2 * lookups_per_bag + 1, (len(table_rows), batch_size), generator=generator)
    offsets = nn.functional.pad(lengths.cumsum(1), (1, 0))
    sizes = lengths.sum(1).tolist()
    return (
        [torch.randint(rows, (size,), generator=generator) for rows, size in zip(table_rows, sizes, strict=True)],
        offsets,
        list(table_rows),
    )


def room_for(indices, offsets, room=0):
    return prepared_of(-7, offsets.shape[1] - 1, [len(rows) + room + table for table, rows in enumerate(indices)])


def prepared_of(value, batch_size, rooms):
    """Returns lookups full of `value`, with rooms that need not be multiples of the batch size."""
    sizes = SimpleNamespace(batch_size=batch_size, max_lookups=rooms)
    tensors = [torch.full(shape, value, dtype=torch.int32) for shape in PreparedLookups.shapes(sizes)]
    return PreparedLookups.of(sizes, tensors)


def coalesced(coalesce, indices, offsets, table_rows, room=2):
    prepared = room_for(indices, offsets, room)
    coalesce(indices, offsets, table_rows, prepared.max_lookups, *prepared.fields())
    return prepared


def assert_same_lookups(ours, reference):
    """Equal in all that counts; what lies beyond the counts is free."""
    for name in ("offsets", "valid_count_fwd", "valid_count_bwd", "unique_count"):
        assert torch.equal(getattr(ours, name), getattr(reference, name)), name
    for t, (our_table, table) in enumerate(zip(ours.by_table(), reference.by_table(), strict=True)):
        unique, nnz = int(table.unique_count), int(table.valid_count_fwd[1])
        for name, size in (("indices_fwd", nnz), ("unique_indices", unique), ("output_rows", nnz),
                           ("output_row_offsets", unique + 1)):  # fmt: skip
            assert torch.equal(getattr(our_table, name)[:size], getattr(table, name)[:size]), (name, t)


@given(lookups())
@quick
def test_coalesces_as_the_reference(raw):
    assert_same_lookups(coalesced(ops.coalesce_lookups, *raw), coalesced(kernels.coalesce_lookups_reference, *raw))


@pytest.mark.parametrize("rows", [1, 3, 2048, 2049, 3_000_000, 2**31 - 1])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_threads_sort_a_large_table_together(rows, number, threads):
    threads(number)
    raw = random_lookups([rows, 5], batch_size=3000, lookups_per_bag=40)  # 120,000 lookups
    assert_same_lookups(coalesced(ops.coalesce_lookups, *raw), coalesced(kernels.coalesce_lookups_reference, *raw))


def test_threads_may_coalesce_at_once():
    raws = [random_lookups([3_000_000, 7, 100], batch_size=500, lookups_per_bag=9, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda raw: coalesced(ops.coalesce_lookups, *raw), raws))
    for raw, result in zip(raws, results, strict=True):
        assert_same_lookups(result, coalesced(kernels.coalesce_lookups_reference, *raw))


def test_lookups_of_no_bag():
    raw = [torch.empty(0, dtype=torch.int64)], torch.zeros(1, 1, dtype=torch.int64), [4]
    assert_same_lookups(coalesced(ops.coalesce_lookups, *raw), coalesced(kernels.coalesce_lookups_reference, *raw))


@given(lookups())
@quick
def test_pads_as_the_reference(raw):
    indices, offsets, table_rows = raw
    table_rows = small(table_rows)
    indices = [rows % size for rows, size in zip(indices, table_rows, strict=True)]
    longest = [max([0, *lengths]) + table for table, lengths in enumerate(offsets.diff().tolist())]
    prepared = PreparedLookups.allocate(Sizes(table_rows, offsets.shape[1] - 1, longest, 0))
    ops.coalesce_lookups(indices, offsets, table_rows, prepared.max_lookups, *prepared.fields())
    results = []
    for pad in (ops.pad_lookups, kernels.pad_lookups_reference):
        room = sum(prepared.max_lookups)
        padded = [torch.full((size,), -7, dtype=torch.int32) for size in (room + 1, room)]
        pad(prepared.offsets, *prepared.grouped(), table_rows, *padded)
        results.append(padded)
    for ours, reference in zip(*results, strict=True):
        assert torch.equal(ours, reference)


GOOD = [[0, 1], [], [2]]


@pytest.mark.parametrize(
    ("rows", "offsets", "room"),
    [
        ([0, 1, 2], [0, 2, 2, 3], -1),
        ([0, 1, 2], [1, 2, 2, 3], 0),
        ([0, 1, 2], [0, 2, 1, 3], 0),
        ([0, 1, 2], [0, 2, 2, 2], 0),
        ([0, 1, 2], [0, 2, 2, 4], 0),
        ([0, 1, 5], [0, 2, 2, 3], 0),
        ([0, -1, 2], [0, 2, 2, 3], 0),
        ([2**40, 1, 2], [0, 0, 2, 3], 0),
        ([-(2**63), 1, 2], [0, 0, 2, 3], 0),
        ([], [0, 0, 0, 1], 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("table", [0, 1])
def test_refuses_as_the_reference(rows, offsets, room, table):
    indices, good_offsets = raw_lookups([GOOD, GOOD])
    indices[table] = torch.tensor(rows, dtype=torch.int64)
    good_offsets[table] = torch.tensor(offsets)
    raised = []
    for coalesce in (ops.coalesce_lookups, kernels.coalesce_lookups_reference):
        rooms = [3 + min(room, 0)] * 2
        prepared = prepared_of(0, 3, rooms).fields()
        with pytest.raises((ValueError, IndexError)) as error:
            coalesce(indices, good_offsets, [3, 3], rooms, *prepared)
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


# ---------------------------------------------------------------------------------------------------------------------
# Random data: what is drawn is tested in test_data.py
# ---------------------------------------------------------------------------------------------------------------------


def draw_arguments(tables):
    """For `dlrm::draw_random_batch`: 4 samples, of which the second and the third are wanted, and 3 tables."""
    generator = torch.cat([torch.arange(624) * 2654435761 % 2**32, torch.tensor([624, 0, 0])])
    traces = [torch.tensor([7, 8, 9, 0, 0]) for _ in range(3)]
    distances = [torch.tensor([[0.0, 2.0, 3.0], [0.5, 0.7, 1.0]], dtype=torch.float64)] * 3
    lookups = [2, 3, 1]
    room = 4 * sum(lookups[table] for table in tables)
    room = torch.zeros(room, dtype=torch.int64), torch.zeros(len(tables), 5, dtype=torch.int64)
    drawn = 1, tables, torch.zeros(2, 5), *room, torch.zeros(2, 1)
    return generator, [10, 10, 10], lookups, False, "trace", [0.0], traces, distances, *drawn


def test_traces_of_tables_that_are_not_wanted_stay_where_they_are():
    arguments = draw_arguments([0, 2])
    ops.draw_random_batch(*arguments)
    assert [trace[-1].item() > 0 for trace in arguments[6]] == [True, False, True]


@pytest.mark.parametrize("tables", [[0, 1, 2], [2], []])
def test_opcheck_of_random_data(tables):
    opcheck(ops.draw_random_batch, draw_arguments(tables))


# ---------------------------------------------------------------------------------------------------------------------
# Embedding bags and sparse optimizers
# ---------------------------------------------------------------------------------------------------------------------


def tables(table_rows, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=generator).to(dtype) for rows in table_rows]


def small(rows):
    """The table sizes of `lookups`, small enough to hold; their lookups must be taken modulo these."""
    return [min(size, 300) for size in rows]


def prepare(raw):
    indices, offsets, table_rows = raw
    table_rows = small(table_rows)
    indices = [index % rows for index, rows in zip(indices, table_rows, strict=True)]
    return coalesced(kernels.coalesce_lookups_reference, indices, offsets, table_rows), table_rows


@given(lookups(), st.sampled_from(DIMENSIONS), st.sampled_from([torch.float32, torch.bfloat16]))
@quick
def test_pools_as_the_reference(raw, dim, dtype):
    prepared, table_rows = prepare(raw)
    weights = tables(table_rows, dim, dtype)
    pooled = ops.embedding_bag_sum(weights, *prepared.bagged())
    reference = kernels.embedding_bag_sum_reference(weights, *prepared.bagged())
    assert pooled.dtype == torch.float32
    assert pooled.is_contiguous()
    torch.testing.assert_close(pooled, reference)


@given(lookups(), st.sampled_from(DIMENSIONS), st.sampled_from(["sgd", "adagrad", "rowwise"]),
       st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
@quick
def test_updates_as_the_reference(raw, dim, rule, gradient_dtype):
    prepared, table_rows = prepare(raw)
    gradient = torch.randn(prepared.offsets.shape[1] - 1, len(table_rows), dim).to(gradient_dtype)
    ours, reference = (run_update(side, rule, table_rows, dim, gradient, prepared) for side in ("ops", "reference"))
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def run_update(side, rule, table_rows, dim, gradient, prepared, dtype=torch.float32, seeds=None, lr=0.125):
    """Weights and moments after one update."""
    weights = tables(table_rows, dim, dtype)
    if rule == "sgd":
        update = ops.sparse_sgd_ if side == "ops" else kernels.sparse_sgd_reference
        update(weights, gradient, *prepared.grouped(), lr, seeds)
        return weights
    moments = [torch.full((rows, dim) if rule == "adagrad" else (rows,), 0.1) for rows in table_rows]
    update = {
        ("ops", "adagrad"): ops.sparse_adagrad_,
        ("ops", "rowwise"): ops.sparse_rowwise_adagrad_,
        ("reference", "adagrad"): kernels.sparse_adagrad_reference,
        ("reference", "rowwise"): kernels.sparse_rowwise_adagrad_reference,
    }[side, rule]
    update(weights, moments, gradient, *prepared.grouped(), lr, 1e-8, seeds)
    return weights + moments


@pytest.mark.parametrize("seeds", [None, [0, 12345], [-3, 2**40 + 1]])
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_bf16_tables_round_as_the_reference(seeds, dim):
    prepared, table_rows = prepare(random_lookups([50, 300], batch_size=64, lookups_per_bag=2))
    gradient = torch.randint(-64, 64, (64, 2, dim)).float() / 64  # sums and products are exact, so bits must agree
    ours = run_update("ops", "sgd", table_rows, dim, gradient, prepared, torch.bfloat16, seeds)
    assert_equal(ours, run_update("reference", "sgd", table_rows, dim, gradient, prepared, torch.bfloat16, seeds))


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_no_number():
    step = 2.0**-11  # an eighth of the distance from 1 to the bfloat16 before it
    prepared, _ = prepare(([torch.arange(300)], torch.arange(301)[None], [300]))
    weights = [torch.ones(300, 128, dtype=torch.bfloat16)]
    weights[0][0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    for update in range(10):
        ops.sparse_sgd_(weights, torch.ones(300, 1, 128), *prepared.grouped(), step, rounding_seeds(update, [0], [0]))
    assert weights[0][0, :3].tolist()[1:] == [float("inf"), float("-inf")]
    assert weights[0][0, 0].isnan()
    assert weights[0][1:].float().mean().item() == pytest.approx(1 - 10 * step, abs=2e-4)


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_threads(rule, dtype, threads):
    raw = random_lookups([1, 40, 300], batch_size=128, lookups_per_bag=20)
    gradient = torch.randn(128, 3, 17)
    results = []
    for number in (1, 2, 3):
        threads(number)
        prepared, table_rows = prepare(raw)
        pooled = ops.embedding_bag_sum(tables(table_rows, 17, dtype), *prepared.bagged())
        results.append([pooled, *run_update("ops", rule, table_rows, 17, gradient, prepared, dtype, [5, 6, 7])])
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def assert_equal(some, others):
    assert all(map(torch.equal, some, others))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_trains_as_torch_does(rule, dim):
    """20 steps of nn.EmbeddingBag(sparse=True) and torch.optim, which have no code in common with ours."""
    table_rows = [1, 20, 300]
    settings = {"freeze": False, "mode": "sum", "sparse": True, "include_last_offset": True}
    bags = [nn.EmbeddingBag.from_pretrained(weight, **settings) for weight in tables(table_rows, dim)]
    parameters = [bag.weight for bag in bags]
    optimizer = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[rule](parameters, lr=0.05)
    weights, moments = tables(table_rows, dim), [torch.zeros(rows, dim) for rows in table_rows]
    for step in range(20):
        indices, offsets, _ = random_lookups(table_rows, batch_size=33, lookups_per_bag=3, seed=step)
        expected = torch.stack([bag(*raw) for bag, *raw in zip(bags, indices, offsets, strict=True)], 1)
        prepared = coalesced(ops.coalesce_lookups, indices, offsets, table_rows)
        pooled = ops.embedding_bag_sum(weights, *prepared.bagged())
        torch.testing.assert_close(pooled, expected.detach(), rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        expected.square().sum().backward()
        optimizer.step()
        if rule == "sgd":
            ops.sparse_sgd_(weights, 2 * expected.detach(), *prepared.grouped(), 0.05)
        else:
            ops.sparse_adagrad_(weights, moments, 2 * expected.detach(), *prepared.grouped(), 0.05, 1e-10)
    torch.testing.assert_close(weights, [parameter.detach() for parameter in parameters], rtol=1e-3, atol=1e-3)


def test_opcheck():
    prepared, table_rows = prepare(random_lookups([5, 40], batch_size=8, lookups_per_bag=2))
    weights, moments = tables(table_rows, 16), [torch.zeros(rows, 16) for rows in table_rows]
    gradient = torch.randn(8, 2, 16)
    opcheck(ops.embedding_bag_sum, (weights, *prepared.bagged()))
    in_bf16 = [weight.bfloat16() for weight in weights]
    opcheck(ops.embedding_bag_sum, (in_bf16, *prepared.bagged()))
    opcheck(ops.sparse_sgd_, (weights, gradient, *prepared.grouped(), 0.1))
    opcheck(ops.sparse_adagrad_, (weights, moments, gradient, *prepared.grouped(), 0.1, 1e-8))
    opcheck(ops.sparse_rowwise_adagrad_, (weights, [torch.zeros(rows) for rows in table_rows], gradient,
                                          *prepared.grouped(), 0.1, 1e-8))  # fmt: skip
    opcheck(ops.advise_huge_pages, (weights[0],))
    indices, offsets, table_rows = random_lookups([5, 40], batch_size=8, lookups_per_bag=2)
    buffers = room_for(indices, offsets)
    zeros = [torch.zeros_like(field) for field in buffers.fields()]
    opcheck(ops.coalesce_lookups, (indices, offsets, table_rows, buffers.max_lookups, *zeros))


def test_differentiates_by_a_table():
    indices, offsets, table_rows = random_lookups([5, 40], batch_size=8, lookups_per_bag=2)
    prepared = coalesced(ops.coalesce_lookups, indices, offsets, table_rows)
    weights = [weight.requires_grad_() for weight in tables(table_rows, 3)]
    pooled = ops.embedding_bag_sum(weights, *prepared.bagged())
    expected = torch.stack(list(map(kernels.sum_bags, weights, indices, offsets)), 1)
    gradients = [torch.autograd.grad(sums.square().sum(), weights) for sums in (pooled, expected)]
    torch.testing.assert_close(*gradients)


def test_huge_pages_leave_the_numbers():
    table = torch.arange(3 << 20, dtype=torch.float32)
    ops.advise_huge_pages(table)
    assert torch.equal(table, torch.arange(3 << 20, dtype=torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# The build
# ---------------------------------------------------------------------------------------------------------------------

LOAD = """
import pathlib, sys
from dlrm.kernels import native
native.SOURCES = pathlib.Path(sys.argv[1])
print(native.load_kernels())
"""
SOURCES = {"quick.cpp": "int quick;", "slow.cpp": "#include <torch/library.h>\nint slow;"}  # built in seconds


@pytest.fixture
def start_loading(tmp_path_factory):
    """Starts a process that loads kernels of other sources: `start_loading(cache folder, VARIABLE=value, ...)`."""
    sources = tmp_path_factory.mktemp("csrc")
    for name, text in SOURCES.items():
        (sources / name).write_text(text)

    def start(cache, **environment):
        environment = {**os.environ, "DLRM_CACHE": str(cache), "DLRM_CXXFLAGS": "-O0", **environment}
        command = [sys.executable, "-c", LOAD, str(sources)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    return start


def test_two_processes_build_once(tmp_path, start_loading):
    both = [start_loading(tmp_path, DLRM_NATIVE="1") for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [out for out, _ in outputs] == ["native\n"] * 2
    assert "".join(err for _, err in outputs) == "Building the C++ kernels (once, about a minute on two cores)...\n"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".sha256", ".so"]
    assert start_loading(tmp_path, DLRM_NATIVE="1").communicate() == ("native\n", "")


def test_a_killed_build_is_no_hindrance(tmp_path, start_loading):
    killed = start_loading(tmp_path)
    while not list(tmp_path.glob("*.parts/*.o")) and killed.poll() is None:
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert start_loading(tmp_path).communicate()[0] == "native\n"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".sha256", ".so"]


@pytest.mark.parametrize("damage", ["half", "flipped", "writable", "no checksum"])
def test_a_library_that_cannot_be_trusted_is_built_anew(tmp_path, start_loading, damage):
    start_loading(tmp_path).communicate()
    (library,) = tmp_path.glob("*.so")
    content = library.read_bytes()
    if damage == "half":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "writable":
        library.chmod(0o666)
    else:
        library.with_suffix(".sha256").unlink()
    out, err = start_loading(tmp_path).communicate()
    assert (out, err.count("\n")) == ("native\n", 1)
    assert err.startswith("Building the C++ kernels")
    assert start_loading(tmp_path).communicate() == ("native\n", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_the_folder_of_another_user_is_not_used(tmp_path, start_loading):
    start_loading(tmp_path).communicate()
    os.chown(tmp_path, 12345, 12345)
    check_not_kept(start_loading(tmp_path), f"{tmp_path} belongs to another user")


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, start_loading):
    tmp_path.chmod(0o777)
    check_not_kept(start_loading(tmp_path), f"other users can write to {tmp_path}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        ("~nosuchuser/x", "~nosuchuser/x: "),
        ("loop/x", "Too many levels of symbolic links"),
        ("file/x", "Not a directory"),
    ],
)
def test_a_folder_that_cannot_be_made_is_not_used(tmp_path, start_loading, cache, reason):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    check_not_kept(start_loading(cache if cache[0] == "~" else tmp_path / cache), reason)


def check_not_kept(process: subprocess.Popen, reason: str) -> None:
    """Asserts that a process builds kernels for itself alone, and says why."""
    out, err = process.communicate()
    assert out == "native\n"
    why, building = err.splitlines()
    assert why.startswith("The C++ kernels are not kept, only built for this run: ")
    assert reason in why
    assert building.startswith("Building the C++ kernels")


def test_the_folder_is_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("DLRM_CACHE", str(tmp_path / "a" / "b"))
    assert native.cache_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("variable", ["CXX", "DLRM_CXXFLAGS"])
def test_unbalanced_quotes_are_named(variable, monkeypatch):
    monkeypatch.setenv(variable, "g++ 'x")
    with pytest.raises(UsageError, match=f"^{variable}=g\\+\\+ 'x: No closing quotation$"):
        native.find_tools()


def test_native_0_builds_nothing(tmp_path, start_loading):
    assert start_loading(tmp_path, DLRM_NATIVE="0").communicate() == ("reference (DLRM_NATIVE=0)\n", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiler", ["/nonexistent", "false"])
def test_without_a_compiler_says_so_in_a_line_and_falls_back(tmp_path, start_loading, compiler):
    out, err = start_loading(tmp_path, CXX=compiler).communicate()
    assert out.startswith("reference (")
    assert err.count("\n") == 1
    assert err.startswith("No C++ kernels, so the slower plain torch does their work: ")
    process = start_loading(tmp_path, CXX=compiler, DLRM_NATIVE="1")
    assert "RunError: DLRM_NATIVE=1, but no C++ kernels: " in process.communicate()[1]
    assert process.returncode


def test_plain_torch_passes_the_tests_of_the_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_kernels.py"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"DLRM_NATIVE": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
