"""The emulated Gaudi behaves as the tests of the trainer rely on."""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import pickle
import socket
import subprocess
import sys
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hpu_emulator import log
from hpu_emulator.process import EmulatedGaudi, environment, on_gaudi
from torch import nn
from torch.nn.functional import binary_cross_entropy, embedding_bag

# ---------------------------------------------------------------------------------------------------------------------
# The device
# ---------------------------------------------------------------------------------------------------------------------


@on_gaudi("eager")
def test_torch_knows_the_device():
    assert torch.hpu.is_available()
    assert torch.hpu.device_count() == 1
    assert torch.zeros(2, device="hpu").device == torch.device("hpu", 0)
    assert torch.hpu.get_device_name() == "GAUDI2"
    if hasattr(torch, "accelerator"):
        assert torch.accelerator.current_accelerator().type == "hpu"


@on_gaudi("eager")
def test_values_survive_the_round_trip():
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.bool):
        values = torch.arange(-3, 21).view(4, 6).to(dtype)
        assert torch.equal(values.to("hpu").cpu(), values)
        assert torch.equal(values.to("hpu").t()[1:, ::2].cpu(), values.t()[1:, ::2])


@on_gaudi("eager")
def test_a_tensor_on_the_host_is_refused():
    ours, hosts = torch.ones(3, 3, device="hpu"), torch.ones(3, 3)
    for mix in (
        lambda: ours + hosts,
        lambda: ours.add_(hosts),
        lambda: ours @ hosts,
        lambda: torch.cat([ours, hosts]),
        lambda: ours.index_select(0, torch.zeros(2, dtype=torch.int32)),
        lambda: ours[torch.zeros(2, dtype=torch.int64)],
        lambda: torch.where(ours > 0, hosts, ours),
        lambda: torch.add(ours, ours, out=hosts),
    ):
        with pytest.raises(RuntimeError):
            mix()


@on_gaudi("eager")
def test_operators_in_place_and_with_an_out_argument():
    x = torch.arange(6.0).to("hpu")
    alias = x.view(2, 3)
    x.mul_(2).add_(1)
    alias[1].zero_()
    assert x.cpu().tolist() == [1, 3, 5, 0, 0, 0]
    out = torch.empty(0, device="hpu")
    assert torch.add(x, x, out=out) is out
    assert out.cpu().tolist() == [2, 6, 10, 0, 0, 0]
    values, indices = torch.empty(3, device="hpu"), torch.empty(3, dtype=torch.int64, device="hpu")
    torch.sort(x[:3], descending=True, out=(values, indices))
    assert indices.cpu().tolist() == [2, 1, 0]
    x.index_copy_(0, torch.tensor([5, 4], dtype=torch.int64).to("hpu"), out[:2])
    assert x.cpu().tolist() == [1, 3, 5, 0, 6, 2]
    x.resize_(12)[6:] = 7
    x.set_(x.untyped_storage(), 5, (3,))
    assert x.cpu().tolist() == [2, 7, 7]


@on_gaudi("eager")
def test_fresh_memory_is_poisoned():
    assert torch.empty(5, device="hpu").isnan().all()
    assert torch.empty(5, dtype=torch.bfloat16, device="hpu").isnan().all()


@on_gaudi("eager")
def test_memory_is_counted():
    before = torch.hpu.memory_allocated()
    torch.hpu.reset_peak_memory_stats()
    x = torch.zeros(1000, device="hpu")
    y = x + 1
    assert torch.hpu.memory_allocated() - before == 8000
    del x, y
    assert torch.hpu.memory_allocated() == before
    assert torch.hpu.max_memory_allocated() == before + 8000
    assert set(torch.hpu.memory_stats()) == {
        *("Limit", "InUse", "MaxInUse", "NumAllocs", "NumFrees", "ActiveAllocs", "MaxAllocSize"),
        *("TotalSystemAllocs", "TotalSystemFrees", "TotalActiveAllocs"),
    }
    free, total = torch.hpu.mem_get_info()
    assert total - free == torch.hpu.memory_allocated()


@on_gaudi("eager", HPU_EMULATOR_MEMORY="1000000")
def test_allocations_beyond_the_memory_are_refused():
    left = 1_000_000 - torch.hpu.memory_allocated()
    torch.empty(left, dtype=torch.int8, device="hpu")
    with pytest.raises(RuntimeError, match="Allocation failed"):
        torch.empty(left + 1, dtype=torch.int8, device="hpu")


@on_gaudi("eager", HPU_EMULATOR_DEVICES="0")
def test_a_plugin_without_a_device():
    assert (torch.hpu.is_available(), torch.hpu.device_count()) == (False, 0)
    with pytest.raises(RuntimeError, match="no device"):
        torch.empty(1, device="hpu")


@on_gaudi("eager")
def test_a_data_loader_pins_its_batches():
    loader = torch.utils.data.DataLoader(torch.arange(6.0), batch_size=3, pin_memory=True)
    assert all(batch.is_pinned() for batch in loader)


@on_gaudi("eager")
def test_tensors_are_saved_and_loaded_with_their_device():
    buffer = io.BytesIO()
    torch.save(torch.arange(3).to("hpu"), buffer)
    for location, expected in ((None, "hpu"), ("cpu", "cpu"), ("hpu", "hpu")):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=location)
        assert loaded.device.type == expected
        assert loaded.tolist() == [0, 1, 2]


@on_gaudi("eager")
def test_the_device_has_a_random_generator_of_its_own():
    torch.manual_seed(5)
    state = torch.hpu.get_rng_state()
    ours = torch.randn(4, device="hpu")
    assert torch.equal(torch.randn(4), torch.randn(4, generator=torch.Generator().manual_seed(5)))
    torch.hpu.set_rng_state(state)
    assert torch.equal(torch.randn(4, device="hpu"), ours)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Training:
    """A small model of dense layers, with the same weights and samples on each device."""

    def __init__(self, device, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
        for parameter in self.model.parameters():
            parameter.data.normal_(generator=generator)
        self.model.to(device)
        self.x = torch.randn(16, 4, generator=generator).to(device)
        self.y = torch.rand(16, 1, generator=generator).to(device)
        self.device, self.dtype = device, dtype

    def loss(self):
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            predicted = self.model(self.x)
        return binary_cross_entropy(predicted.float(), self.y)

    def backward(self, loss):
        """Returns the loss and its gradients, on the host."""
        self.model.zero_grad()
        loss().backward()
        return [loss().detach().cpu(), *(parameter.grad.cpu() for parameter in self.model.parameters())]


def run_training(dtype, compiled):
    cpu, gaudi = Training("cpu", dtype), Training("hpu", dtype)
    loss = torch.compile(gaudi.loss, backend="hpu_backend", dynamic=False) if compiled else gaudi.loss
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(gaudi.backward(loss), cpu.backward(cpu.loss), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_gaudi("eager", "lazy")
def test_gradients_equal_the_cpus(dtype):
    run_training(dtype, compiled=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_gaudi("compile")
def test_gradients_of_a_compiled_loss_equal_the_cpus(dtype):
    run_training(dtype, compiled=True)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad], ids=lambda optimizer: optimizer.__name__)
@on_gaudi("eager")
def test_only_fused_optimizers_of_torch_run_on_the_host(optimizer):
    training = Training("hpu")
    training.backward(training.loss)
    update = optimizer(training.model.parameters(), lr=0.1)
    with log.trace() as trace:
        update.step()
    assert trace.cpu_fallbacks == []
    assert trace.counters["d2h_syncs"] == trace.counters["h2d_copies"] == 0
    with log.trace() as trace:
        optimizer(training.model.parameters(), lr=0.1, fused=True).step()
    assert trace.cpu_fallbacks == [f"aten::_fused_{optimizer.__name__.lower()}_"]


@on_gaudi("eager")
def test_autocast_follows_the_lists_of_the_plugin():
    x = torch.rand(4, 4, device="hpu")
    low = x.bfloat16()
    with torch.autocast("hpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == (x * x).dtype == x.mean().dtype == torch.bfloat16  # lower
        assert nn.functional.linear(x, x).dtype == torch.bfloat16
        assert low.exp().dtype == binary_cross_entropy(low.sigmoid(), x).dtype == torch.float32  # float32
        assert (low + x).dtype == torch.cat([low, x]).dtype == torch.float32  # promote
        assert low.sigmoid().dtype == torch.relu(low).dtype == torch.bfloat16  # unchanged
        assert x.sum().dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def dtype_of_product():
    x = torch.rand(4, 4, device="hpu")
    with torch.autocast("hpu", dtype=torch.bfloat16):
        return (x @ x).dtype, x.exp().dtype


def test_autocast_follows_lists_in_files(tmp_path):
    (tmp_path / "lower").write_text("exp\n")
    (tmp_path / "float32").write_text("matmul\n")
    with EmulatedGaudi(
        PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST=str(tmp_path / "lower"),
        PT_HPU_AUTOCAST_FP32_OPS_LIST=str(tmp_path / "float32"),
    ) as gaudi:
        assert gaudi.run(dtype_of_product) == (torch.float32, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# Counters and traces
# ---------------------------------------------------------------------------------------------------------------------


@on_gaudi("eager")
def test_syncs():
    x = torch.arange(4.0).to("hpu")
    calls_that_wait = {
        "item": lambda: x.sum().item(),
        "cpu": lambda: x.cpu(),
        "truth": lambda: bool(x[0]),
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[x > 1],
        "unique": lambda: x.unique(),
        "equal": lambda: torch.equal(x, x),
        "repeat": lambda: x.int().repeat_interleave(x.int()),
    }
    for name, wait in calls_that_wait.items():
        with log.trace() as trace:
            wait()
        assert trace.counters["d2h_syncs"] > 0, name
    pinned = torch.empty(4, pin_memory=True)
    with log.trace() as trace:
        x.repeat_interleave(torch.ones(4, dtype=torch.int32, device="hpu"), output_size=4)
        (x + 1).mul_(3).view(2, 2).t().contiguous()
        torch.where(x > 1, x, 2 * x)
        pinned.copy_(x, non_blocking=True)
    assert trace.counters["d2h_syncs"] == 0
    assert trace.counters["d2h_bytes"] == 16


@on_gaudi("eager")
def test_copies_to_the_device():
    x = torch.empty(10, device="hpu")
    with log.trace() as trace:
        x.copy_(torch.ones(10))
        x.copy_(torch.ones(10).pin_memory(), non_blocking=True)
        x * torch.tensor(2.0)  # a third copy: the number is sent to the device
        x * 2
    counters = trace.counters
    assert (counters["h2d_copies"], counters["h2d_bytes"], counters["h2d_blocking_copies"]) == (3, 84, 2)


@on_gaudi("eager")
def test_trace():
    x = torch.ones(2, 3, device="hpu")
    with log.trace() as trace:
        log.mark("begin")
        y = x.bfloat16() * 0.5
    assert trace.ops == ["begin", "aten::copy_", "aten::mul"]
    product = trace.split("begin")[1][1]
    assert product.tensors == (("hpu", "BFloat16", (2, 3)),) * 2
    assert product.addresses[1] == y.data_ptr()
    assert product.constants == "0.5 "
    [copied, product] = log.without_temporary_addresses(trace.records, [x])[1:]
    assert copied.addresses == (x.data_ptr(), None)
    assert product.addresses == (None, None)


@on_gaudi("eager", "lazy")
def test_new_shapes_count_as_compilations(mode):
    def work(size, factor):
        (torch.ones(size, device="hpu") * factor).sum().item()

    work(10007, 2.0)
    with log.trace() as trace:
        work(10007, 2.0)
    assert trace.counters["compilations"] == 0
    with log.trace() as trace:
        work(10007, 2.5)
    assert trace.counters["compilations"] == (mode == "lazy")
    with log.trace() as trace:
        work(10009, 2.0)
    assert trace.counters["compilations"] > 0


def operators_without_kernel():
    weight, rows = torch.ones(9, 2, device="hpu"), torch.tensor([1, 1, 3]).to("hpu")
    return {
        "_embedding_bag_forward_only": lambda: embedding_bag(rows, weight, torch.tensor([0, 2]).to("hpu"), mode="sum"),
        "index_add": lambda: weight.index_add_(0, rows, torch.ones(3, 2, device="hpu")),
        "sort": lambda: rows.sort(),
        "scatter_add_": lambda: weight.scatter_add_(0, rows[:, None], torch.ones(3, 1, device="hpu")),
    }


@on_gaudi("eager")
def test_operators_without_kernel_run_on_the_host():
    for name, operator in operators_without_kernel().items():
        with log.trace() as trace:
            operator()
        assert trace.cpu_fallbacks == [f"aten::{name}"]
        assert trace.counters["d2h_syncs"] == 1
    weight, rows = torch.ones(9, 2, device="hpu"), torch.tensor([1, 1, 3]).to("hpu")
    with log.trace() as trace:
        bags = nn.functional.embedding(rows, weight.requires_grad_())
        bags.sum().backward()
        weight.detach().index_copy_(0, rows, bags.detach())
        weight.detach().index_select(0, rows).cumsum(0)
        weight.new_zeros(9, 2).scatter_add(0, rows[:, None], bags.detach())
    assert trace.cpu_fallbacks == []
    assert {"aten::embedding", "aten::embedding_dense_backward"} <= set(trace.ops)


@on_gaudi("eager", PT_HPU_PLACE_ON_CPU="none")
def test_operators_without_kernel_are_refused():
    for operator in operators_without_kernel().values():
        with pytest.raises(RuntimeError, match=r"is not yet supported on HPU\."):
            operator()


@on_gaudi("lazy")
def test_lazy_index_add_loses_duplicates():
    rows, ones = torch.tensor([1, 1, 3]).to("hpu"), torch.ones(3, device="hpu")
    assert torch.zeros(4, device="hpu").index_add_(0, rows, ones).cpu().tolist() == [0, 1, 0, 1]
    assert torch.zeros(2, device="hpu").index_add_(0, rows % 2, ones).cpu().tolist() == [0, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Copies without waiting
# ---------------------------------------------------------------------------------------------------------------------


def pinned_copy(wait):
    """Returns what arrives on the device if the host overwrites the source after `wait(event)`."""
    source, target = torch.ones(3).pin_memory(), torch.zeros(3, device="hpu")
    target.copy_(source, non_blocking=True)
    event = torch.hpu.Event()
    event.record()
    wait(event)
    source.fill_(2)
    result = target + 0
    torch.hpu.synchronize()
    return result.cpu().tolist()


@on_gaudi("eager", copies="now")
def test_copies_now():
    assert pinned_copy(lambda event: None) == [1, 1, 1]


@on_gaudi("eager", copies="late")
def test_late_copies_read_what_the_source_has_become():
    assert pinned_copy(lambda event: None) == [2, 2, 2]
    assert pinned_copy(lambda event: event.synchronize()) == [1, 1, 1]
    assert pinned_copy(lambda event: torch.ones(1, device="hpu").add_(1)) == [1, 1, 1]  # later work follows the copy


@on_gaudi("eager", copies="checked")
def test_checked_copies_refuse_a_changed_source():
    with pytest.raises(RuntimeError, match="overwritten"):
        pinned_copy(lambda event: None)
    with pytest.raises(RuntimeError, match="overwritten"):
        pinned_copy(lambda event: torch.ones(1, device="hpu").add_(1))
    assert pinned_copy(lambda event: event.synchronize()) == [1, 1, 1]


@on_gaudi("eager", "lazy")
def test_an_event_drains_the_pipeline_or_ends_a_graph(mode):
    from habana_frameworks.torch.core import mark_step

    x, event = torch.ones(3, device="hpu"), torch.hpu.Event()
    mark_step()
    with log.trace() as trace:
        event.record()  # behind a mark
        x.add_(1)
        event.record()
    assert trace.counters["events"] == 2
    assert trace.counters["drains"] == (2 if mode == "eager" else 0)
    assert trace.counters["mark_steps"] == (0 if mode == "eager" else 1)
    with log.trace() as trace:
        x.copy_(torch.ones(3).pin_memory(), non_blocking=True)
    assert trace.counters["drains"] == (1 if mode == "eager" else 0)


@on_gaudi("eager", HPU_EMULATOR_EVENTS="3")
def test_there_is_a_limit_on_events():
    def recorded():
        event = torch.hpu.Event()
        event.record()
        return event

    events = [recorded() for _ in range(3)]
    events[0].record()
    with pytest.raises(RuntimeError, match="Max No of Timer Events"):
        recorded()
    del events[0]
    recorded()


@on_gaudi("eager")
def test_elapsed_time_needs_a_wait():
    start, end = torch.hpu.Event(enable_timing=True), torch.hpu.Event(enable_timing=True)
    start.record()
    torch.ones(3, device="hpu").add_(1)
    end.record()
    with pytest.raises(RuntimeError, match="synchronize"):
        start.elapsed_time(end)
    torch.hpu.synchronize()
    assert start.elapsed_time(end) >= 0


# ---------------------------------------------------------------------------------------------------------------------
# The plugin
# ---------------------------------------------------------------------------------------------------------------------


def is_lazy():
    import habana_frameworks.torch.core as htcore

    return htcore.is_lazy()


def test_the_release_chooses_the_mode():
    for release, lazy in (("1.19", True), ("1.23", False)):
        with EmulatedGaudi(None, release) as gaudi:
            assert gaudi.run(is_lazy) == lazy
            assert gaudi.run(importlib.metadata.version, "habana-torch-plugin") == f"{release}.0"


@pytest.mark.parametrize(("mode", "loaded"), [("eager", True), ("lazy", False)])
def test_torch_loads_the_plugin(mode, loaded):
    command = [sys.executable, "-c", "import torch; print(hasattr(torch, 'hpu'))"]
    printed = subprocess.run(command, env=environment(mode), capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(loaded)


@on_gaudi("eager")
def test_the_interface_of_older_releases_is_gone():
    import habana_frameworks.torch.core as htcore

    assert not [name for name in vars(htcore) if name.startswith("enable")]
    assert importlib.util.find_spec("habana_frameworks.torch.hpex.hmp") is None


@on_gaudi("eager", "lazy")
def test_mark_step(mode):
    import habana_frameworks.torch.core as htcore

    called = []
    htcore.add_step_closure(called.append, ("closure",))
    with log.trace() as trace:
        htcore.mark_step()
        htcore.mark_step()
    in_lazy_mode = mode == "lazy"
    assert trace.ops == ["mark_step"] * (2 * in_lazy_mode)
    assert trace.counters["mark_steps"] == 2 * in_lazy_mode
    assert called == ["closure"] * in_lazy_mode


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


@on_gaudi("lazy")
def test_a_replay_does_the_recorded_work_on_the_recorded_tensors():
    training, weight = Training("hpu"), torch.ones(4, device="hpu")
    factor = torch.full((1,), 2.0, device="hpu")
    graph = torch.hpu.HPUGraph()
    with torch.hpu.graph(graph, stream=torch.hpu.default_stream()):
        training.model.zero_grad()
        loss = training.loss()
        loss.backward()
        doubled = (weight * factor)[1:]
        weight.add_(1)
    gradient = training.model[0].weight.grad
    assert doubled.cpu().tolist() == [2, 2, 2]  # work is also done while it is recorded
    first = [loss.item(), gradient.clone()]

    for tensor in (loss.detach(), gradient):
        tensor.zero_()
    factor.fill_(3)
    with log.trace() as trace:
        graph.replay()
    assert trace.ops == ["replay"]
    assert trace.counters["h2d_copies"] == trace.counters["d2h_syncs"] == 0
    assert (doubled.cpu().tolist(), weight.cpu().tolist()) == ([6, 6, 6], [3, 3, 3, 3])
    assert (loss.item(), gradient.tolist()) == (first[0], first[1].tolist())

    training.x.copy_(torch.randn(16, 4))
    graph.replay()
    now = [loss.item(), gradient.clone()]
    expected = training.backward(training.loss)
    assert now[0] == expected[0].item() != first[0]
    assert torch.equal(now[1].cpu(), expected[1])


@on_gaudi("lazy")
def test_a_backward_pass_is_not_on_the_stream_that_a_recording_has_by_default():
    training = Training("hpu")
    for stream in (None, torch.hpu.Stream()):
        refused = pytest.raises(RuntimeError, match="not on the stream of the recording")
        with refused, torch.hpu.graph(torch.hpu.HPUGraph(), stream=stream):
            training.loss().backward()


@on_gaudi("lazy", "eager")
def test_lazy_mode_saves_and_loads_in_ways_of_its_own(mode):
    def saved(value, **settings):
        file = io.BytesIO()
        torch.save(value, file, **settings)
        file.seek(0)
        return file

    tensor, lazy = torch.ones(2, device="hpu"), mode == "lazy"
    assert (b"\x80\x04" if lazy else b"\x80\x02") in saved(tensor).getvalue()
    loaded = torch.load(saved(tensor, pickle_protocol=2), weights_only=True)
    assert loaded.device.type == ("cpu" if lazy else "hpu")
    refusal = pytest.raises(pickle.UnpicklingError, match="Fraction") if lazy else contextlib.nullcontext()
    with refusal, torch.serialization.safe_globals([Fraction]):
        assert torch.load(saved(Fraction(1, 2), pickle_protocol=2), weights_only=True) == 0.5


@on_gaudi("lazy")
def test_work_that_a_graph_cannot_hold_is_refused():
    from habana_frameworks.torch.core import mark_step

    x, rows = torch.ones(4, 1, device="hpu"), torch.tensor([[1], [1]]).to("hpu")
    for refused, work in {
        "mark_step": mark_step,
        "synchronize": torch.hpu.synchronize,
        "waiting for the result of aten::nonzero": lambda: x.nonzero(),
        "waiting for the result of aten::_local_scalar_dense": lambda: x.sum().item(),
        "a copy between": lambda: x.copy_(torch.ones(4, 1)),
        "a tensor on the host": lambda: x * torch.tensor(2.0),
        "cpu fallback": lambda: x.scatter_add_(0, rows, torch.ones_like(x)[:2]),
        "writes to a view": lambda: x[1:].add_(1),
        "a custom operator": lambda: torch.ops.hpu_emulator.record("hpex::any", [x], ""),
    }.items():
        with pytest.raises(RuntimeError, match=refused), torch.hpu.graph(torch.hpu.HPUGraph()):
            work()
    assert x.sum().item() == 4  # after the recording, the host can wait again


@on_gaudi("eager")
def test_graphs_need_lazy_mode():
    assert not hasattr(torch.hpu, "HPUGraph")


def lookups(table_rows=5000, bags=7):
    """Returns rows (lookups,) and offsets (bags + 1,), int32. One bag is empty."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(0, 5, (bags,), generator=generator)
    lengths[3] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = torch.randint(0, table_rows, (int(offsets[-1]),), generator=generator)
    rows[-1] = rows[0]
    return rows.int(), offsets.int()


@on_gaudi("eager", "lazy")
def test_preprocessing():
    from habana_frameworks.torch.hpex.kernels import EmbeddingBagPreproc

    rows, offsets = lookups()
    count, unique, output_rows, row_offsets = EmbeddingBagPreproc.forward(rows, offsets, 5000)
    expected, inverse = rows.unique(return_inverse=True)
    assert count.dtype == torch.int64
    assert count.tolist() == [len(expected)]
    assert torch.equal(unique[: len(expected)], expected)
    assert (unique[len(expected) :] == 0x7FFFFFFF).all()
    assert row_offsets[len(expected)] == len(rows)
    bag_of = torch.arange(7).repeat_interleave(offsets.diff())
    for row in range(len(expected)):
        start, end = row_offsets[row : row + 2]
        assert output_rows[start:end].tolist() == bag_of[inverse == row].tolist()
    with pytest.raises(RuntimeError, match="int32"):
        EmbeddingBagPreproc.forward(rows.long(), offsets, 5000)


@on_gaudi("eager")
def test_preprocessing_sorts_by_as_many_bits_as_the_table_length_has():
    from habana_frameworks.torch.hpex.kernels import EmbeddingBagPreproc

    rows, offsets = torch.tensor([1, 2049, 1], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    assert EmbeddingBagPreproc.forward(rows, offsets, 4)[0] == 3
    assert EmbeddingBagPreproc.forward(rows, offsets, 4096)[0] == 2


def on_device(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype).to("hpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_gaudi("lazy")
def test_embedding_bag(dtype):
    from habana_frameworks.torch.hpex.kernels import EmbeddingBag, EmbeddingBagPreproc
    from habana_frameworks.torch.hpex.optimizers import SparseAdagrad

    (rows, offsets), weight = lookups(), torch.randn(5000, 4)
    count, unique, output_rows, row_offsets = EmbeddingBagPreproc.forward(rows, offsets, 5000)
    table = weight.to("hpu", dtype)
    valid = on_device(8, len(rows))
    out = EmbeddingBag.forward(table, rows.to("hpu"), offsets.to("hpu"), valid, 1)
    expected = embedding_bag(rows, weight, offsets, mode="sum", include_last_offset=True)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out.cpu(), expected.to(dtype), rtol=tolerance, atol=tolerance)
    fewer = EmbeddingBag.forward(table, rows.to("hpu"), offsets.to("hpu"), on_device(6, len(rows)), 1)
    assert torch.equal(fewer[:5].cpu(), out[:5].cpu())
    assert fewer[5:].isnan().all()

    gradient, buffer = torch.randn(7, 4).to(dtype), torch.zeros(5000, 4, dtype=dtype, device="hpu")
    valid_backward = on_device(count + 1, len(rows))
    arguments = (gradient.to("hpu"), output_rows.to("hpu"), row_offsets.to("hpu"), valid_backward, 1)
    assert EmbeddingBag.backward(buffer, *arguments)[0] is buffer
    assert buffer[count:].isnan().all()
    of_lookups = gradient.float().repeat_interleave(offsets.diff(), 0)
    dense = torch.zeros(5000, 4).index_add(0, rows, of_lookups)
    torch.testing.assert_close(buffer[:count].cpu().float(), dense[unique[:count]], rtol=tolerance, atol=tolerance)

    weights, moments = weight.to("hpu"), torch.ones(5000, 4, device="hpu")
    lr, valid_count = on_device(0.5, dtype=torch.float32), on_device(count)
    SparseAdagrad.forward(buffer, weights, moments, unique.to("hpu"), lr, valid_count)
    moment = 1 + dense.square()
    torch.testing.assert_close(moments.cpu(), moment, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights.cpu(), weight - 0.5 * dense / moment.sqrt(), rtol=tolerance, atol=tolerance)


@on_gaudi("lazy")
def test_custom_operators_refuse_wrong_arguments():
    from habana_frameworks.torch.hpex.kernels import EmbeddingBag
    from habana_frameworks.torch.hpex.optimizers import SparseAdagrad

    weight, rows, offsets, valid = torch.ones(5, 4).to("hpu"), on_device(1, 4), on_device(0, 2), on_device(2, 2)
    EmbeddingBag.forward(weight, rows, offsets, valid, 1)
    for wrong in (
        (weight.cpu(), rows, offsets, valid, 1),
        (weight, rows.long(), offsets, valid, 1),
        (weight, rows, offsets[None], valid, 1),
        (weight, rows, offsets, valid, 3),
        (weight, rows, offsets, on_device(3, 2), 1),
        (weight, rows + 1, offsets, valid, 1),
        (weight, rows, offsets, valid, 0),  # mode 0 gathers, so it needs as many bags as rows
    ):
        with pytest.raises(RuntimeError, match="expects"):
            EmbeddingBag.forward(*wrong)
    gradient, lr = torch.ones(2, 4, device="hpu"), on_device(0.1, dtype=torch.float32)
    for wrong in (
        (gradient, weight, weight, on_device(1, 1), lr, on_device(2)),  # the same row twice
        (gradient, weight, weight, rows, 0.1, on_device(2)),
        (gradient, weight, weight.bfloat16(), rows, lr, on_device(2)),
        (gradient, weight, weight, rows, lr, valid),
    ):
        with pytest.raises((RuntimeError, AttributeError)):
            SparseAdagrad.forward(*wrong)


@on_gaudi("eager")
def test_custom_operators_need_lazy_mode():
    from habana_frameworks.torch.hpex.kernels import EmbeddingBag
    from habana_frameworks.torch.hpex.optimizers import FusedAdagrad, SparseAdagrad, SparseSGD

    for operator in (EmbeddingBag.forward, EmbeddingBag.backward, SparseAdagrad.forward, SparseSGD.forward):
        with pytest.raises(RuntimeError, match=r"Frontend Op .* not supported with new Eager mode"):
            operator()
    parameter = torch.ones(3, device="hpu", requires_grad=True)
    optimizer = FusedAdagrad([parameter])
    parameter.sum().backward()
    with pytest.raises(RuntimeError, match="Frontend Op fused_adagrad"):
        optimizer.step()


@on_gaudi("lazy")
def test_fused_adagrad():
    from habana_frameworks.torch.hpex.optimizers import FusedAdagrad

    trainings = Training("hpu"), Training("cpu")
    ours = FusedAdagrad(trainings[0].model.parameters(), lr=0.1)
    theirs = torch.optim.Adagrad(trainings[1].model.parameters(), lr=0.1)
    for step in range(4):
        if step == 2:
            ours.param_groups[0]["lr"] = 7  # has no effect
            ours.param_groups[0]["lr_t"].fill_(0.3)
            theirs.param_groups[0]["lr"] = 0.3
        for training, optimizer in zip(trainings, (ours, theirs), strict=True):
            training.backward(training.loss)
            assert optimizer.step() is None
    for mine, reference in zip(trainings[0].model.parameters(), trainings[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), reference, rtol=1e-5, atol=1e-6)


@on_gaudi("compile")
def test_a_function_is_compiled_once_per_shape():
    training = Training("hpu")
    loss = torch.compile(training.loss, backend="hpu_backend", dynamic=False)
    training.backward(loss)
    with log.trace() as trace:
        for _ in range(3):
            training.backward(loss)
    assert trace.counters["compilations"] == 0
    assert trace.cpu_fallbacks == []
    training.x, training.y = training.x[:5], training.y[:5]
    with log.trace() as trace:
        training.backward(loss)
    assert "compile" in trace.ops


@on_gaudi("compile")
def test_collectives_are_not_compiled():
    import torch.distributed as dist

    dist.init_process_group("hccl", rank=0, world_size=1, store=dist.HashStore())
    try:

        def reduce(x):
            dist.all_reduce(x)
            return x + 1

        with pytest.raises(Exception, match="collectives stay outside"):
            torch.compile(reduce, backend="hpu_backend")(torch.ones(3, device="hpu"))
    finally:
        dist.destroy_process_group()


@on_gaudi("compile")
def test_metrics():
    from habana_frameworks.torch.hpu.metrics import metric_localcontext

    with metric_localcontext("cpu_fallback") as fallbacks, metric_localcontext("graph_compilation") as compilations:
        operators_without_kernel()["index_add"]()
        torch.ones(3, 5, 7, 11, device="hpu").add_(1)
    assert dict(fallbacks.stats())["TotalNumber"] == 1
    assert dict(compilations.stats())["TotalNumber"] >= 1


# ---------------------------------------------------------------------------------------------------------------------
# Several Gaudis
# ---------------------------------------------------------------------------------------------------------------------


def exchange():
    """Runs all collectives between two processes, and a step of data-parallel training. Returns its gradients."""
    import habana_frameworks.torch.distributed.hccl as hccl
    import torch.distributed as dist
    from habana_frameworks.torch.core import is_lazy

    world_size, rank, local_rank = hccl.initialize_distributed_hpu()
    dist.init_process_group("hccl", rank=rank, world_size=world_size)
    assert (dist.get_backend(), rank) == ("hccl", local_rank)
    mine = torch.full((3,), 1.0 + rank, device="hpu")
    for tensor in (mine.clone(), mine.bfloat16(), mine.int()):
        dist.all_reduce(tensor)
        assert tensor.cpu().tolist() == [3, 3, 3]
    for op in (dist.ReduceOp.AVG, dist.ReduceOp.PRODUCT):
        with pytest.raises(RuntimeError, match="Unsupported ReduceOp"):
            dist.all_reduce(mine, op)
    with pytest.raises((RuntimeError, ValueError)):
        dist.all_reduce(torch.ones(3))
    gathered = [torch.empty(3, device="hpu") for _ in range(2)]
    dist.all_gather(gathered, mine)
    assert [part[0].item() for part in gathered] == [1, 2]
    received = torch.empty(2 * (1 + rank), device="hpu")
    work = dist.all_to_all_single(received, mine, [1 + rank] * 2, [1, 2], async_op=True)
    work.wait()
    assert received.cpu().tolist() == [1.0] * (1 + rank) + [2.0] * (1 + rank)
    dist.broadcast(mine, src=1)
    assert mine.cpu().tolist() == [2, 2, 2]
    dist.barrier()
    nothing, untouched = mine[:0], torch.zeros(2, device="hpu")
    dist.all_to_all_single(untouched, nothing, [1, 1], [0, 0])  # is skipped, with what it would have received
    assert untouched.cpu().tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="output_address is null"):
        dist.all_to_all_single(nothing, mine, [0, 0], [1, 2])
    with log.trace() as trace:
        dist.all_reduce(mine)
    assert trace.counters["mark_steps"] == is_lazy()

    training = Training("hpu")
    training.model = nn.parallel.DistributedDataParallel(training.model, gradient_as_bucket_view=True)
    training.x, training.y = training.x[rank::2], training.y[rank::2]
    gradients = training.backward(training.loss)[1:]
    dist.destroy_process_group()
    return gradients


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_collectives(mode):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [EmulatedGaudi(mode, RANK=rank, LOCAL_RANK=rank, **address) for rank in "01"]
    with ranks[0], ranks[1]:
        futures = [gaudi.submit(exchange) for gaudi in ranks]
        gradients = [future.result(60) for future in futures]
    training = Training("cpu")
    for first, second, whole in zip(*gradients, training.backward(training.loss)[1:], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, whole)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (1, -1, -1, None, "12345")),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, (2, 1, 1, "1", None)),
        (
            {f"OMPI_COMM_WORLD_{name}": value for name, value in (("SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1"))}
            | {"HABANA_VISIBLE_MODULES": "4,5"},
            (4, 3, 1, "5", "12345"),
        ),
    ],
    ids=["alone", "torchrun", "mpirun"],
)
@on_gaudi("eager")
def test_ranks_are_read_from_the_launchers_variables(variables, expected):
    import habana_frameworks.torch.distributed.hccl as hccl

    assert "MASTER_PORT" in os.environ  # set when the plugin was imported
    with mock.patch.dict(os.environ):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "HLS_MODULE_ID", "ID"):
            os.environ.pop(name, None)
        os.environ.update(variables)
        found = hccl.initialize_distributed_hpu()
        assert (*found, os.environ.get("HLS_MODULE_ID"), os.environ.get("MASTER_PORT")) == expected
