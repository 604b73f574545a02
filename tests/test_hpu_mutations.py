"""Errors that a Gaudi would punish, put into the source one by one: the checks of `test_hpu.py` notice each of them."""

from __future__ import annotations

import contextlib
import inspect
import operator
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import pytest
from hpu_emulator.process import shared_gaudi
from test_hpu import CHECKS, SHAPES, Observation, check_the_step_is_a_replay

ADAGRAD, GRAPHS = " --optimizer=adagrad", " --hpu-graphs"
PIPELINE, TRAINER, GAUDI = "dlrm.pipeline", "dlrm_s_pytorch", "dlrm_habana_kernels"
STATIC, INTERACTION = "dlrm.kernels.static_embedding", "dlrm.kernels.interaction"


@dataclass(frozen=True)
class Mutation:
    """A text in the source of a function, and another text in its place."""

    module: str
    function: str  # such as "Trainer.update"
    old: str
    new: str
    mode: str = "eager"
    flags: str = ""
    device: str = "Gaudi2"

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        """Compiles the function anew in its module."""
        module = import_module(self.module)
        *owners, name = self.function.split(".")
        owner = operator.attrgetter(*owners)(module) if owners else module
        wrapped = inspect.getattr_static(owner, name)
        function = inspect.unwrap(getattr(wrapped, "__func__", wrapped))
        source = textwrap.dedent(inspect.getsource(function))
        if source.count(self.old) != 1:
            raise ValueError(f"{self.function} has no {self.old!r}")
        names = dict(vars(module)) | {"__class__": owner}
        exec("from __future__ import annotations\n" + source.replace(self.old, self.new), names)
        patch.setattr(owner, name, names[name])


MUTATIONS = {
    "a mark waits for the device": Mutation(
        GAUDI, "HpuBackend.mark_step", "mark_step()", "mark_step(sync=True)", "lazy"
    ),
    "two marks per step": Mutation(
        GAUDI, "HpuBackend.mark_step", "self._htcore.mark_step()", "[self._htcore.mark_step() for _ in '12']", "lazy"
    ),
    "no mark": Mutation(GAUDI, "HpuBackend.mark_step", "if self._lazy:", "if not self._lazy:", "lazy"),
    "an event before the mark": Mutation(
        "dlrm.devices.backend", "Backend.end_step", "self.mark_step()", "self.timestamp(); self.mark_step()", "lazy"
    ),
    "an event per phase": Mutation(
        "dlrm.output.report", "StepClock.lap", "self._backend.times_phases", "True"
    ),
    "an event per phase in lazy mode": Mutation(
        "dlrm.output.report", "StepClock.lap", "self._backend.times_phases", "True", "lazy"
    ),
    "metrics in a graph of their own": Mutation(
        TRAINER, "Trainer.train_step", "self.progress.step += 1", "self.progress.step += 1; self.backend.mark_step()",
        "lazy",
    ),
    "an int64 sum on a Gaudi 3": Mutation(
        TRAINER, "Metrics.add", "sum(dtype=torch.int32)", "sum()", device="Gaudi3"
    ),
    "the loss is read in each step": Mutation(TRAINER, "Metrics.add", "len(target))", "len(target) * loss.item())"),
    "a condition on a loss": Mutation(
        TRAINER, "Trainer.update", "self.dense_optimizer.zero_grad()", "loss > 9 or self.dense_optimizer.zero_grad()"
    ),
    "the loss keeps its graph": Mutation(
        TRAINER, "Trainer.update", "return ",
        "self.kept = [*vars(self).get('kept', []), loss * 1]; return "
    ),
    "the rate is copied by itself": Mutation(
        GAUDI, "HpuBackend.set_learning_rate", "= on_device", "= torch.tensor([exact]).to('hpu')"
    ),
    "a rate that is a number": Mutation(
        STATIC, "StaticOptimizer.update", 'self.param_groups[0]["lr"] *', 'self.param_groups[0]["lr"].item() *'
    ),
    "an addition of duplicates": Mutation(
        STATIC, "StaticOptimizer.update", "index_copy_(0, places, rows[:-1] - step)", "index_add_(0, places, -step)"
    ),
    "an update by a mask": Mutation(
        STATIC, "StaticOptimizer.update", "index_copy_(0, places, rows[:-1] - step)",
        "index_copy_(0, places[places >= 0], rows[:-1] - step)",
    ),
    "unique rows on the device": Mutation(
        STATIC, "StaticEmbeddingBags.read", "return ", "lookups.unique_rows.unique(); return "
    ),
    "indexing in place of an embedding": Mutation(
        STATIC, "StaticEmbeddingBags.pool", "functional.embedding(lookups.positions, rows)", "rows[lookups.positions]"
    ),
    "torch's own embedding bag": Mutation(
        STATIC, "StaticEmbeddingBags.read", "return ",
        "functional.embedding_bag(lookups.unique_rows[:2, None], self.stacked); return ",
    ),
    "a read of the whole stack": Mutation(
        STATIC, "StaticEmbeddingBags.read", "self.stacked.index_select", "self.stacked.cpu().to('hpu').index_select"
    ),
    "plain indexing of columns": Mutation(
        INTERACTION, "NativeDotInteraction.forward", "SelectColumns.apply(products, self.pairs, self.places)",
        "products[:, self.pairs]",
    ),
    "blocking copies of a batch": Mutation(
        PIPELINE, "BatchMemory.copy_", "other.ints, non_blocking=True", "other.ints, non_blocking=False"
    ),
    "a batch that is not pinned": Mutation(GAUDI, "HpuBackend.host_memory", "self._pin", ""),
    "a batch in the middle of pinned memory": Mutation(
        PIPELINE, "BatchMemory.copy_", "ints.copy_(other.ints, ", "ints[1:].copy_(other.ints[1:], "
    ),
    "a batch that is copied twice": Mutation(
        PIPELINE, "BatchPipeline._to_device", "memory.copy_(self._host[turn])",
        "memory.copy_(self._host[turn]); memory.copy_(self._host[turn])",
    ),
    "an event for the copies": Mutation(
        PIPELINE, "BatchPipeline._to_device", "memory.copy_(", "self._backend.timestamp(); memory.copy_("
    ),
    "new buffers for each batch": Mutation(
        PIPELINE, "BatchPipeline._to_device", "memory.copy_(",
        "import copy; self._kept = memory; memory = copy.deepcopy(memory)\n    memory.copy_(",
    ),
    "a copy that waits for the step": Mutation(
        PIPELINE, "BatchPipeline._to_device", "turn % len(self._device)", "0"
    ),
    "a wait inside an event": Mutation(
        GAUDI, "HpuBackend.wait_for", "while not moment.query():", "if moment.synchronize():"
    ),
    "a recording that is not replayed": Mutation(
        GAUDI, "RecordedStep.__call__", "if self._calls <= self.warm_up:", "if True:", "lazy", GRAPHS
    ),
    "a recording on a stream of its own": Mutation(
        GAUDI, "RecordedStep.__call__", ", stream=torch.hpu.default_stream()", "", "lazy", GRAPHS
    ),
    "a mark in a recording": Mutation(
        TRAINER, "Trainer.update", "loss.backward()", "loss.backward(); self.backend.mark_step()", "lazy", GRAPHS
    ),
    "an event in a recording": Mutation(
        TRAINER, "Trainer.update", "loss.backward()", "loss.backward(); self.backend.timestamp()", "lazy", GRAPHS
    ),
    "bags of two lookups": Mutation(
        GAUDI, "HpexEmbeddingBags.read", "SUM_BAGS)", "2)", "lazy", ADAGRAD
    ),
    "a count that is not on the device": Mutation(
        GAUDI, "HpexAdagrad.update", "table.unique_count\n", "table.unique_count.cpu()\n", "lazy", ADAGRAD
    ),
}  # fmt: skip


def observe(mutation: Mutation | None, mode: str, flags: str) -> None:
    with contextlib.ExitStack() as stack:
        if mutation:
            mutation.apply(stack.enter_context(pytest.MonkeyPatch.context()))
        run = Observation(mode, SHAPES["dot"] + flags, warm_up=3)
    for check in (*CHECKS, *[check_the_step_is_a_replay] * (GRAPHS in flags)):
        check(run)


def on_device(mutation: Mutation, function: Callable, *arguments) -> None:
    shared_gaudi(mutation.mode, HPU_EMULATOR_DEVICE=mutation.device).run(function, *arguments)


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_an_error_is_noticed(mutation):
    with pytest.raises((AssertionError, RuntimeError)):
        on_device(mutation, observe, mutation, mutation.mode, mutation.flags)


@pytest.mark.parametrize(
    "mutation",
    {(m.mode, m.flags, m.device): m for m in MUTATIONS.values()}.values(),
    ids=lambda m: f"{m.mode}{m.flags}",
)
def test_without_an_error_nothing_is_noticed(mutation):
    on_device(mutation, observe, None, mutation.mode, mutation.flags)
