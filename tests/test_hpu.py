"""The trainer on an emulated Gaudi: it gives the results of the CPU, and does nothing that a real Gaudi is slow at."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hpu_emulator import log
from hpu_emulator.process import environment, on_gaudi, shared_gaudi

from dlrm.data.data_set import open_data_set
from dlrm.kernels.lookups import Sizes
from dlrm.kernels.static_embedding import StaticEmbeddingBags
from dlrm.options import OptionParser, Options
from dlrm.output.report import StepClock
from dlrm.pipeline import BatchMemory, BatchPipeline
from dlrm_habana_kernels import HpuBackend
from dlrm_s_pytorch import Metrics, Trainer, main, select_backend

MODES = ("eager", "lazy", "compile")
SHAPES = {
    "dot": "--mini-batch-size=8 --arch-embedding-size=300-20-1 --num-indices-per-lookup=5",
    "lookups per table": "--mini-batch-size=8 --arch-embedding-size=300-20-9-50 --num-indices-per-lookup=5-5-1-9",
    "cat, one table": "--mini-batch-size=16 --arch-interaction-op=cat --arch-embedding-size=5000 "
    "--arch-sparse-feature-size=8 --arch-mlp-bot=13-8 --num-indices-per-lookup=38",
    "dot and itself, fixed lookups, wbce": "--mini-batch-size=5 --arch-interaction-itself --num-indices-per-lookup=3 "
    "--num-indices-per-lookup-fixed --loss-function=wbce --loss-weights=0.3-1.7 --round-targets",
    "cross layers": "--mini-batch-size=8 --arch-embedding-size=300-20 --num-indices-per-lookup=5 "
    "--arch-interaction-op=dcn --dcn-num-layers=2 --dcn-low-rank-dim=3",
    "one lookup, mse, clamped": "--mini-batch-size=8 --num-indices-per-lookup=1 --loss-function=mse "
    "--loss-threshold=0.1",
}  # fmt: skip
OPTIMIZERS = ("sgd", "adagrad")
SCHEDULE = "--lr-num-warmup-steps=9 --lr-decay-start-step=15 --lr-num-decay-steps=30"
STRICT = {"copies": "checked", "PT_HPU_PLACE_ON_CPU": "none"}


def train(flags: str) -> tuple[list[float], str]:
    """Runs the trainer in this process. Returns the losses that it printed, and all of its output."""
    output = io.StringIO()
    output.reconfigure = lambda **settings: None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(flags.split())
    assert status == 0, output.getvalue()
    return [float(loss) for loss in re.findall(r"it, loss ([\d.]+)", output.getvalue())], output.getvalue()


@functools.cache
def cpu_losses(flags: str) -> list[float]:
    return train(f"{flags} --device=cpu")[0]


# ---------------------------------------------------------------------------------------------------------------------
# The results of the CPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("data_type", ["fp32", "bf16"])
@on_gaudi(*MODES, **STRICT)
def test_losses_equal_the_cpus(mode, shape, optimizer, data_type):
    flags = f"{SHAPES[shape]} --num-batches=50 --optimizer={optimizer} --learning-rate=0.01"
    losses, output = train(f"{flags} --data_type={data_type} --device=hpu --mode={mode}")
    expected = cpu_losses(flags)
    assert "Using HPU..." in output
    if data_type == "fp32":
        np.testing.assert_allclose(losses, expected, rtol=0, atol=2e-6)
    else:  # a bfloat16 has 8 bits, and rounding errors of one step add to those of the steps before
        difference = np.abs(np.subtract(losses, expected))
        assert 0 < difference.mean() < 5e-3
        assert difference.max() < 5e-2


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "rwsadagrad"])
@on_gaudi(*MODES, **STRICT)
def test_schedules_tests_and_checkpoints_equal_the_cpus(mode, optimizer):
    """The run on the device ends after half of its iterations, and a second run goes on from its checkpoint."""
    flags = (
        f"{SHAPES['dot']} --num-batches=20 --optimizer={optimizer} {SCHEDULE} --round-targets --test-freq=6 "
        "--test-mini-batch-size=7 "
    )
    expected, output = train(flags + "--device=cpu --nepochs=2")
    scores = re.findall(r"Testing at .*", output)
    with tempfile.TemporaryDirectory() as folder:
        run = f"{flags} --device=hpu --mode={mode} --save-model={folder}/m.pt --resume"
        first, second = train(run), train(run + " --nepochs=2")
    np.testing.assert_allclose(first[0] + second[0], expected, rtol=0, atol=2e-6)
    assert [line[:40] for line in re.findall(r"Testing at .*", first[1] + second[1])] == [line[:40] for line in scores]


@pytest.mark.parametrize("optimizer", ["adagrad", "rwsadagrad"])
@pytest.mark.parametrize("eps", ["1e-10", "0.01"])
@on_gaudi(*MODES, **STRICT)
def test_adagrads_settings_have_the_same_effect_as_on_the_cpu(mode, eps, optimizer):
    flags = f"{SHAPES['dot']} --num-batches=20 --mode={mode} --optimizer={optimizer} --device="
    settings = f" --optimizer-eps={eps} --adagrad-initial-accumulator=0.05"
    expected = train(flags + "cpu" + settings)[0]
    np.testing.assert_allclose(train(flags + "hpu" + settings)[0], expected, rtol=0, atol=2e-6)
    assert not np.allclose(train(flags + "cpu")[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "rwsadagrad"])
@pytest.mark.parametrize("data_type", ["fp32", "bf16"])
@on_gaudi("lazy", **STRICT)
def test_a_recorded_step_gives_the_same_losses(optimizer, data_type):
    """In bf16, too: only Adagrad does other work, because it is the plugin's when nothing is recorded."""
    flags = (
        f"{SHAPES['dot']} --num-batches=20 --optimizer={optimizer} --data_type={data_type} {SCHEDULE} --test-freq=6 "
        "--device=hpu --mode=lazy"
    )
    losses, output = train(flags + " --hpu-graphs")
    expected, expected_output = train(flags)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=2e-6)
    assert re.findall(r"Testing at .*", output) == re.findall(r"Testing at .*", expected_output)


@pytest.mark.parametrize("data_type", ["fp32", "bf16"])
@on_gaudi("lazy", **STRICT)
def test_native_operators_give_the_same_losses_as_the_plugins_kernels(data_type):
    flags = f"{SHAPES['dot']} --num-batches=20 --optimizer=adagrad --data_type={data_type} --device=hpu --mode=lazy "
    flags += "--learning-rate=0.1 --hpu-kernels="
    found = {}
    for kernels in ("plugin", "auto", "native"):
        with log.trace() as trace:
            found[kernels] = train(flags + kernels)[0]
        assert ("hpex::fused_adagrad" in trace.ops) == ("hpex::embedding_bag_sum_fwd" in trace.ops)
        assert ("hpex::fused_adagrad" in trace.ops) == (kernels != "native")
    assert found["auto"] == found["plugin"]
    np.testing.assert_allclose(found["native"], found["plugin"], rtol=0, atol=2e-6 if data_type == "fp32" else 5e-3)


@on_gaudi("lazy", copies="late")
def test_the_plugins_preprocessing_gives_the_same_losses_as_our_own():
    flags = SHAPES["dot"] + " --device=hpu --mode=lazy --num-batches=20 --optimizer=adagrad --lookup-preprocessing="
    assert train(flags + "plugin")[0] == train(flags + "own")[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@on_gaudi(*MODES, copies="late")
def test_late_copies_read_the_right_batch(mode, optimizer):
    flags = f"{SHAPES['dot']} --num-batches=40 --optimizer={optimizer} --print-freq=40 "
    late, cpu = (train(flags + f"--device={device} --mode={mode}")[0] for device in ("hpu", "cpu"))
    np.testing.assert_allclose(late, cpu, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dim", "rows"), [(8, "below 256 bytes"), (64, "of 256 bytes or more")])
@on_gaudi("eager", "lazy")
def test_the_report_compares_with_the_peaks_of_the_card(mode, dim, rows):
    flags = f"--arch-sparse-feature-size={dim} --arch-mlp-bot=4-{dim} --mode={mode} --print-time --num-batches=5 "
    with tempfile.TemporaryDirectory() as folder:
        _, output = train(f"{flags} --data_type=bf16 --report={folder}/r.json")
        report = json.loads(Path(folder, "r.json").read_text())
        seconds = report["ms_per_iteration"]["median"] / 1000
    assert rows in re.search("embeddings .*", output)[0]
    assert "% of the peak in bf16" in output
    assert report["row_bytes"] == 4 * dim
    flop = 1e9 * report["gflop_per_iteration"] / seconds
    assert report["percent_of_peak"]["products"] == pytest.approx(100 * flop / 432e12)
    speed = report["embedding_gb_per_second"] or report["embedding_bytes_per_iteration"] / seconds / 1e9
    assert report["percent_of_peak"]["embeddings"] == pytest.approx(100 * speed / 2460)
    assert "of the peak in" not in train(flags)[1]  # that of fp32 is not known


@on_gaudi(*MODES)
def test_phases_are_timed_only_if_asked_for(mode):
    phases = {}
    for flag in ("", " --time-phases"):
        with tempfile.TemporaryDirectory() as folder:
            _, output = train(f"{TINY} --device=hpu --mode={mode} --report={folder}/r.json{flag}")
            phases[flag] = set(json.loads(Path(folder, "r.json").read_text())["phase_ms"])
    assert "--time-phases does nothing" in output if mode == "lazy" else "--time-phases slows each step down" in output
    assert phases[""] == {"other"}
    assert ("backward" in phases[" --time-phases"]) == (mode != "lazy")


@on_gaudi("eager", HPU_EMULATOR_EVENTS="40")
def test_events_are_given_back_however_rarely_lines_are_printed(mode):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepClock, "max_unread", 20)
        Observation(mode, "--mini-batch-size=8", iterations=90)
        patch.setattr(StepClock, "max_unread", 50)
        with pytest.raises(RuntimeError, match="Max No of Timer Events"):
            Observation(mode, "--mini-batch-size=8", iterations=90)


@on_gaudi("eager")
def test_the_time_per_iteration_is_that_from_the_first_event_to_the_last():
    """On a Gaudi, the times between neighbouring events add up to more than that. Pauses are left out."""
    options = Options(**OptionParser(prog="test").parse_given(["--device=hpu"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hpu, "LONGEST_QUEUE_MS", 1e6)
        backend = select_backend(options)
        clock = StepClock(backend)
        for max_unread in (3, 100):
            clock.max_unread = max_unread
            clock.start()
            for _ in range(10):
                clock.end_iteration(backend.end_step())
            assert 1e5 <= clock.settle() < 1.5e5
        clock.start()
        clock.end_iteration(backend.end_step())
        backend.synchronize()
        clock.end_pause()
        for _ in range(9):
            clock.end_iteration(backend.end_step())
        assert 2e5 <= clock.settle() < 3e5  # two stretches
    assert len(clock.iteration_ms) == 30
    assert min(clock.iteration_ms) >= 1e6


@on_gaudi(*MODES)
def test_inference_and_auto_device(mode):
    _, output = train(
        f"{SHAPES['dot']} --mode={mode} --num-batches=3 --inference-only --optimizer=adagrad --print-time"
    )
    assert "Using HPU..." in output
    assert "Finished inference it 3/3" in output
    assert "GAUDI2" in output


# ---------------------------------------------------------------------------------------------------------------------
# No work that a Gaudi is slow at
# ---------------------------------------------------------------------------------------------------------------------


class Observation:
    """A run of the training loop that prints once, at its end, and a record of the work that it gave the device."""

    def __init__(self, mode: str, flags: str, iterations: int = 9, warm_up: int = 2):
        gc.collect()  # gives back the memory of an earlier run
        flags += f" --device=hpu --mode={mode} --num-batches={iterations} --print-freq={iterations}"
        options = Options(**OptionParser(prog="test").parse_given(flags.split()))
        trainer = Trainer(open_data_set(options), select_backend(options))
        step = trainer.train_step
        self.memory, self.counters_at_start = [], []  # one entry per iteration

        def marked_step(batch):
            log.mark("iteration")
            self.memory.append(log.counters()["memory"])
            self.counters_at_start.append(log.counters())
            return step(batch)

        trainer.train_step = marked_step
        with log.trace() as self.trace, contextlib.redirect_stdout(io.StringIO()):
            trainer.run()
        moments = [state["sum"] for state in trainer.sparse_optimizer.state.values()]
        memories = trainer.pipeline._device
        inputs = [tensor for memory in memories for tensor in (memory.floats, memory.ints)]
        self.persistent = [*trainer.model.parameters(), *trainer.model.buffers(), *moments, *inputs]
        self.batches_on_device, self.input_bytes = len(memories), memories[0].nbytes
        self.mode, self.options, self.warm_up = mode, options, warm_up

    def iterations(self) -> list[list[log.Record]]:
        """Returns the records of each iteration between the warm-up and the last iteration, which prints.

        Leaves out the waits of the host's thread for copies, which may happen at any moment.
        """
        parts = self.trace.split("iteration")[self.warm_up + 1 : -1]
        work = [[record for record in part if record.op != "wait for event"] for part in parts]
        return [log.without_temporary_addresses(records, self.persistent) for records in work]

    def growth(self, counter: str) -> set[int]:
        """Returns by how much a counter grew per iteration after the warm-up: one number if always the same."""
        values = [counters[counter] for counters in self.counters_at_start[self.warm_up :]]
        return {after - before for before, after in itertools.pairwise(values)}


def check_every_iteration_is_the_same(run: Observation) -> None:
    """Each one reads the memory of the batch before the last one, and the others do not matter."""
    iterations = run.iterations()
    assert len(iterations[0]) > (10 if run.options.hpu_graphs else 20)
    for before, after in zip(iterations, iterations[run.batches_on_device :], strict=False):
        assert after == before


def check_only_printing_syncs(run: Observation) -> None:
    assert run.growth("d2h_syncs") == {0}
    assert run.trace.counters["d2h_syncs"] <= 2  # loss and accuracy


def check_nothing_runs_on_the_host(run: Observation) -> None:
    assert run.trace.cpu_fallbacks == []


def check_only_inputs_are_copied(run: Observation) -> None:
    """Two copies bring a batch and its learning rate. Only in a recording are they of memory that the last step reads,
    and wait for it."""
    assert run.growth("h2d_bytes") == {run.input_bytes}
    assert run.growth("h2d_copies") == {2}
    assert run.growth("h2d_blocking_copies") == {0}
    assert run.growth("h2d_waits") == {2 if run.options.hpu_graphs else 0}
    assert run.growth("drains") == {0 if run.mode == "lazy" else 3}  # by the copies and the event, side by side


def check_memory_is_constant(run: Observation) -> None:
    assert len(set(run.memory[run.warm_up :])) == 1


def check_marks_of_steps(run: Observation) -> None:
    """In lazy mode there is one after the optimizers, and one before them by FusedAdagrad, if that is the optimizer."""
    is_native = run.options.hpu_graphs or run.options.hpu_kernels == "native"
    fused_adagrad = run.options.optimizer == "adagrad" and not is_native
    assert run.growth("mark_steps") == {{"eager": 0, "compile": 0, "lazy": 1 + fused_adagrad}[run.mode]}


def check_events(run: Observation) -> None:
    """There is one per iteration, at its end: before the next batch is copied, and in lazy mode after the mark."""
    assert run.growth("events") == {1}
    for records in run.iterations():
        ops = [record.op for record in records]
        work, after = ops[: ops.index("event")], ops[ops.index("event") + 1 :]
        assert set(after) == {"aten::copy_"}
        assert "aten::isfinite" in work or "aten::abs" in work  # of the metrics, which come last
        assert run.mode != "lazy" or work[-1] == "mark_step"


def check_no_thread_is_kept_from_recording_an_event(run: Observation) -> None:
    assert run.trace.counters["synchronizations"] > run.trace.counters["locking_waits"] == 0


def check_no_gradient_is_scattered(run: Observation) -> None:
    """An index_put that adds sorts its indices on a Gaudi; the backward passes of embedding and select need none."""
    assert not [op for op in run.trace.ops if "index_put" in op]


def check_the_step_is_a_replay(run: Observation) -> None:
    for records in run.iterations():
        assert records[0].op == "replay"
        assert [record.op for record in records].count("replay") == 1


CHECKS = (
    check_every_iteration_is_the_same,
    check_only_printing_syncs,
    check_nothing_runs_on_the_host,
    check_only_inputs_are_copied,
    check_memory_is_constant,
    check_marks_of_steps,
    check_events,
    check_no_thread_is_kept_from_recording_an_event,
    check_no_gradient_is_scattered,
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("data_type", ["fp32", "bf16"])
@on_gaudi(*MODES, **STRICT)
def test_no_work_that_a_gaudi_is_slow_at(mode, shape, optimizer, data_type):
    run = Observation(mode, f"{SHAPES[shape]} --optimizer={optimizer} --data_type={data_type}")
    assert ("compile" in run.trace.ops) == (mode == "compile")
    for check in CHECKS:
        check(run)


@on_gaudi("lazy", **STRICT)
def test_native_operators_in_lazy_mode_do_no_work_that_a_gaudi_is_slow_at():
    run = Observation("lazy", f"{SHAPES['dot']} --optimizer=adagrad --hpu-kernels=native")
    for check in CHECKS:
        check(run)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "rwsadagrad"])
@on_gaudi("lazy", **STRICT)
def test_a_recorded_step_is_only_replayed(shape, optimizer):
    run = Observation("lazy", f"{SHAPES[shape]} --optimizer={optimizer} --hpu-graphs", warm_up=3)  # the recording, too
    for check in (*CHECKS, check_the_step_is_a_replay):
        check(run)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "rwsadagrad"])
@on_gaudi(*MODES)
def test_a_changing_learning_rate_costs_nothing(mode, optimizer):
    run = Observation(mode, f"{SHAPES['dot']} --optimizer={optimizer} --lr-num-warmup-steps=99")
    for check in CHECKS:
        check(run)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@on_gaudi(*MODES)
def test_memory_is_constant_over_many_iterations(mode, optimizer):
    check_memory_is_constant(Observation(mode, f"{SHAPES['dot']} --optimizer={optimizer}", iterations=200))


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 1), ("adagrad", 2)])
@on_gaudi(*MODES)
def test_only_weights_and_moments_are_of_table_size(mode, optimizer, copies):
    rows, dim = 200_000, 8
    flags = f"--arch-embedding-size={rows} --arch-sparse-feature-size={dim} --arch-mlp-bot=4-{dim} --mini-batch-size=2"
    gc.collect()
    torch.hpu.reset_peak_memory_stats()
    before, table = torch.hpu.memory_allocated(), 4 * rows * dim
    run = Observation(mode, f"{flags} --optimizer={optimizer}")
    assert copies * table <= run.trace.counters["peak_memory"] - before < (copies + 0.1) * table


# ---------------------------------------------------------------------------------------------------------------------
# The checks themselves: the trainer is broken on purpose, and they must notice it
# ---------------------------------------------------------------------------------------------------------------------


def read_each_loss(patch):
    add = Metrics.add
    patch.setattr(Metrics, "add", lambda self, loss, *rest: (loss.item(), add(self, loss, *rest)))


def let_a_shape_depend_on_the_batch(patch):
    """Selects a number of rows that changes. The number comes from the host, so that it costs no sync."""

    def read(self, lookups):
        count = int(torch.randint(1, len(lookups.unique_rows), ()))
        self.stacked.index_select(0, lookups.unique_rows[:count])
        return self.stacked.index_select(0, lookups.unique_rows)

    patch.setattr(StaticEmbeddingBags, "read", read)


def use_an_operator_without_a_kernel(patch):
    pool = StaticEmbeddingBags.pool

    def pool_after_index_add(self, rows, lookups):
        places = lookups.unique_rows.long()
        torch.zeros_like(self.stacked).index_add_(0, places, rows.detach())
        return pool(self, rows, lookups)

    patch.setattr(StaticEmbeddingBags, "pool", pool_after_index_add)


def leave_an_operand_on_the_host(patch):
    pool = StaticEmbeddingBags.pool
    patch.setattr(StaticEmbeddingBags, "pool", lambda self, *a: pool(self, *a) + torch.zeros(8, 3, 2))


def copy_something_else(patch):
    step = HpuBackend.mark_step
    patch.setattr(HpuBackend, "mark_step", lambda self: (torch.zeros(3).to("hpu"), step(self)))


def keep_all_losses(patch):
    add, kept = Metrics.add, []
    patch.setattr(Metrics, "add", lambda self, loss, *rest: (kept.append(loss * 1), add(self, loss, *rest)))


def mark_twice(patch):
    from habana_frameworks.torch.core import mark_step

    step = HpuBackend.mark_step
    patch.setattr(HpuBackend, "mark_step", lambda self: (mark_step(), step(self)))


def forget_to_wait_for_copies(patch):
    patch.setattr(HpuBackend, "wait_for", lambda self, moment: None)


def use_new_buffers_each_time(patch):
    to_device = BatchPipeline._to_device

    def to_new_buffers(self, turn):
        sizes = Sizes((4, 3, 2), 8, [10] * 3, 4)
        memory = BatchMemory(sizes, StaticEmbeddingBags.lookups_type, self._backend.device_memory)
        self._device = [memory] * len(self._device)
        return to_device(self, turn)

    patch.setattr(BatchPipeline, "_to_device", to_new_buffers)


def keep_one_batch_on_the_device(patch):
    patch.setattr(HpuBackend, "num_batches_on_device", lambda self, num_bytes: 1)


def copy_the_learning_rate_by_itself(patch):
    def copy(self, optimizer, exact, on_device):
        for group in optimizer.param_groups:
            group["lr"].copy_(torch.tensor([exact]))

    patch.setattr(HpuBackend, "set_learning_rate", copy)


def time_the_phases(patch):
    patch.setattr(HpuBackend, "times_phases", property(lambda self: True, lambda self, value: None), raising=False)


def record_an_event_for_the_copy(patch):
    to_device = BatchPipeline._to_device
    patch.setattr(BatchPipeline, "_to_device", lambda self, turn: (to_device(self, turn), self._backend.timestamp())[0])


def end_the_step_before_the_metrics(patch):
    step = Trainer.train_step
    patch.setattr(Trainer, "train_step", lambda self, batch: (step(self, batch), self.backend.mark_step())[0])


MUTATIONS = [
    *((time_the_phases, mode, check_events) for mode in ("eager", "lazy")),
    *((record_an_event_for_the_copy, mode, check_events) for mode in ("eager", "lazy")),
    (end_the_step_before_the_metrics, "lazy", check_marks_of_steps),
    (read_each_loss, "eager", check_only_printing_syncs),
    (let_a_shape_depend_on_the_batch, "eager", check_every_iteration_is_the_same),
    (use_an_operator_without_a_kernel, "eager", check_nothing_runs_on_the_host),
    (copy_something_else, "eager", check_only_inputs_are_copied),
    (keep_one_batch_on_the_device, "eager", check_only_inputs_are_copied),
    *(
        (copy_the_learning_rate_by_itself, "eager", check)
        for check in (check_only_printing_syncs, check_only_inputs_are_copied)
    ),
    (keep_all_losses, "eager", check_memory_is_constant),
    (mark_twice, "lazy", check_marks_of_steps),
    (use_new_buffers_each_time, "eager", check_every_iteration_is_the_same),
]


def observe_mutated(mutate, mode: str, check) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        run = Observation(mode, "--mini-batch-size=8")
    with pytest.raises(AssertionError):
        check(run)


@pytest.mark.parametrize(("mutate", "mode", "check"), MUTATIONS, ids=lambda value: getattr(value, "__name__", value))
def test_the_checks_notice_what_is_broken_on_purpose(mutate, mode, check):
    shared_gaudi(mode).run(observe_mutated, mutate, mode, check)


@pytest.mark.parametrize(
    ("mutate", "message"),
    [(leave_an_operand_on_the_host, "device"), (forget_to_wait_for_copies, "overwritten")],
)
@on_gaudi("eager", copies="checked")
def test_the_emulator_refuses_what_is_broken_on_purpose(mutate, message):
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        with pytest.raises(RuntimeError, match=message):
            Observation("eager", "--mini-batch-size=8", iterations=20)


def forget_to_replay(patch):
    patch.setattr(torch.hpu.HPUGraph, "replay", lambda self: None)


def replay_twice(patch):
    replay = torch.hpu.HPUGraph.replay
    patch.setattr(torch.hpu.HPUGraph, "replay", lambda self: (replay(self), replay(self)))


def replace_the_tensor_of_the_learning_rate(patch):
    def set_new_tensor(self, optimizer, exact, on_device):
        for group in optimizer.param_groups:
            group["lr"] = torch.full((1,), exact, device="hpu")

    patch.setattr(HpuBackend, "set_learning_rate", set_new_tensor)


@pytest.mark.parametrize(
    "mutate",
    [forget_to_replay, replay_twice, replace_the_tensor_of_the_learning_rate, use_new_buffers_each_time],
)
@on_gaudi("lazy")
def test_a_recorded_step_that_is_broken_on_purpose_gives_other_losses(mutate):
    flags = f"--mini-batch-size=8 --num-batches=12 --learning-rate=0.5 {SCHEDULE} --device=hpu --mode=lazy"
    expected, _ = train(flags)
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        assert np.allclose(train(flags)[0], expected, rtol=0, atol=2e-6)
        losses, _ = train(f"{flags} --hpu-graphs")
    np.testing.assert_allclose(losses[:3], expected[:3], rtol=0, atol=2e-6)
    assert not np.allclose(losses, expected, rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Programs, environment, messages
# ---------------------------------------------------------------------------------------------------------------------

TINY = "--mini-batch-size=4 --num-batches=3 --print-time"


def program(name: str, flags: str, **settings) -> subprocess.CompletedProcess:
    """Runs a program of the repository on an emulated Gaudi."""
    mode = settings.pop("mode", None)  # if it is not in the environment, the program must set it there
    command = [sys.executable, str(ROOT / name), *flags.split()]
    return subprocess.run(
        command, env=environment(mode, **settings), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("name", "mode", "release"),
    [
        ("dlrm_s_pytorch.py", "eager", "1.19"),
        ("dlrm_s_pytorch.py", "lazy", "1.23"),
        ("dlrm_s_pytorch.py", "compile", "1.19"),
        ("demo_dlrm.py", "lazy", "1.23"),
    ],
)
def test_programs_choose_the_mode_whatever_the_releases_default(name, mode, release):
    result = program(name, f"{TINY} --mode={mode} --optimizer=adagrad", release=release)
    assert result.returncode == 0, result.stderr
    assert "Using HPU..." in result.stdout
    assert f"{mode}, fp32" in result.stdout
    assert f"habana-torch-plugin {release}" in result.stdout


def test_the_fp32_and_bf16_lists_reach_the_plugin(tmp_path):
    """With a list of bf16 ops that names no op of the model, --hmp gives exactly the losses of fp32."""
    (tmp_path / "none.txt").write_text("nothing\n")
    fp32, _ = shared_gaudi("eager").run(train, f"{TINY} --device=hpu")
    default_list, own_list = "--hmp", f"--hmp --hmp-bf16={tmp_path / 'none.txt'}"
    outputs = [program("demo_dlrm.py", f"{TINY} --device=hpu {flags}").stdout for flags in (default_list, own_list)]
    bf16, nothing_lowered = ([float(loss) for loss in re.findall(r"it, loss ([\d.]+)", output)] for output in outputs)
    assert nothing_lowered == fp32 != bf16


def test_a_plugin_that_is_too_old_is_named_in_one_line():
    result = program("demo_dlrm.py", f"{TINY} --device=hpu", release="1.15")
    assert result.returncode == 2
    assert "habana-torch-plugin 1.15.0 is too old; 1.19 or newer is needed" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def refused(flags: str) -> str:
    """Runs the trainer in this process with flags that it must refuse. Returns the one line of its error."""
    errors, output = io.StringIO(), io.StringIO()
    output.reconfigure = lambda **settings: None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        assert main(flags.split()) == 2
    [line] = errors.getvalue().splitlines()
    return line


@on_gaudi("eager", HPU_EMULATOR_DEVICES="0")
def test_without_a_device_auto_takes_the_cpu():
    _, output = train(TINY)
    assert "No Gaudi here (habana-torch-plugin finds no device): running on the CPU." in output
    assert "habana-torch-plugin finds no device; use Intel's" in refused(f"{TINY} --device=hpu")


@pytest.mark.parametrize("flags", ["--lr-num-warmup-steps=9", "--optimizer=adagrad"])
@on_gaudi("eager", HPU_EMULATOR_PINNING="0")
def test_memory_that_cannot_be_pinned_is_used_as_it_is(mode, flags):
    losses, output = train(f"{TINY} {flags} --device=hpu")
    assert "as memory can't be pinned (there is no allocator of pinned memory for hpu)" in output
    assert losses == train(f"{TINY} {flags} --device=cpu")[0]


@on_gaudi("eager")
def test_a_torch_that_pins_for_a_named_device_only_is_understood(mode):
    pin = torch.Tensor.pin_memory

    def pin_for_a_named_device(tensor, device=None):
        if device is None:
            raise RuntimeError("no CUDA")
        return pin(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", pin_for_a_named_device)
        check_only_inputs_are_copied(Observation(mode, "--mini-batch-size=8"))


@on_gaudi("eager", HPU_EMULATOR_MEMORY="1000000")
def test_a_second_batch_on_the_device_must_fit_easily(mode):
    assert Observation(mode, "--mini-batch-size=8").batches_on_device == 2
    assert Observation(mode, "--mini-batch-size=200").batches_on_device == 1


@on_gaudi("eager", HPU_EMULATOR_MEMORY="1000000")
def test_tables_larger_than_the_device_are_refused():
    assert "but hpu has 0.0 GiB free" in refused(f"{TINY} --device=hpu --arch-embedding-size=1000000")


@on_gaudi("eager")
def test_a_mode_that_the_plugin_was_not_loaded_for_is_refused():
    assert "--mode=lazy needs PT_HPU_LAZY_MODE=1 before torch is imported" in refused("--device=hpu --mode=lazy")


@on_gaudi("lazy")
def test_graphs_that_cannot_be_recorded_are_refused():
    assert "--hpu-graphs needs --mode=lazy, not eager" in refused("--device=hpu --hpu-graphs")
    assert "--hpu-graphs works on a Gaudi alone" in refused("--device=cpu --mode=lazy --hpu-graphs")
    assert "--hpu-graphs works on one device" in refused("--device=hpu --mode=lazy --hpu-graphs --world_size=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.hpu, "HPUGraph")
        assert "1.23.0 has no torch.hpu.HPUGraph" in refused("--device=hpu --mode=lazy --hpu-graphs")


@on_gaudi("lazy")
def test_kernels_that_the_plugin_does_not_have_are_refused():
    flags = "--device=hpu --mode=lazy --hpu-kernels=plugin "
    assert "--hpu-kernels=plugin: the plugin has no kernels for --optimizer=sgd; use adagrad" in refused(flags)
    adagrad = flags + "--optimizer=adagrad "
    assert "an eps of 1e-10 alone; leave --optimizer-eps out, or" in refused(adagrad + "--optimizer-eps=1e-8")
    assert "can't be recorded; leave --hpu-graphs out, or" in refused(adagrad + "--hpu-graphs")


@on_gaudi("eager")
def test_the_plugins_kernels_are_refused_outside_of_lazy_mode():
    assert "refuse to run in --mode=eager; use --mode=lazy, or" in refused("--device=hpu --hpu-kernels=plugin")


@on_gaudi("lazy")
def test_lazy_passes_are_set_as_by_the_habana_fork():
    from habana_frameworks.torch.utils import debug

    train(TINY + " --device=hpu --mode=lazy --optimizer=adagrad")
    assert debug.passes == {
        "fuse_t_mm_optimization": True,
        "eliminate_common_subexpression": False,
        "constant_pooling": False,
    }
