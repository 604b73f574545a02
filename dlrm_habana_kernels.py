"""The Gaudi: the plugin's embedding bag, host preprocessing and Adagrads, the back end that uses them, recorded steps.

Everything here needs habana-torch-plugin, 1.19 or newer, and imports it where it is used. What each of the plugin's
kernels computes is said in plain torch in `dlrm/kernels/ops.py`:

    hpex.kernels.EmbeddingBag.forward       `embedding_bag_sum_reference`, for one table
    hpex.kernels.EmbeddingBag.backward      `row_gradients`, the sum of each row's gradients
    hpex.kernels.EmbeddingBagPreproc        `coalesce_lookups_reference`, for one table, on the host
    hpex.optimizers.SparseAdagrad           `sparse_adagrad_reference`, from gradients that are summed already
    hpex.optimizers.FusedAdagrad            `dense_adagrad_reference`, without shadows

The plugin's kernels run in lazy mode alone. They are functions that autograd and autocast do not know. A count on the
device says how much of a tensor is valid; what lies behind that is undefined.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dlrm.devices.accelerator import AcceleratorBackend
from dlrm.devices.backend import Peaks
from dlrm.errors import UsageError
from dlrm.kernels.dense import DenseLayer
from dlrm.kernels.embedding import EmbeddingBags, SparseAdagrad
from dlrm.kernels.lookups import PreparedLookups, check_lookups
from dlrm.options import Options, gaudi_environment

OLDEST_PLUGIN = (1, 19)

# ---------------------------------------------------------------------------------------------------------------------
# The plugin's kernels
# ---------------------------------------------------------------------------------------------------------------------

HPEX_EPS = 1e-10  # of hpex.optimizers.SparseAdagrad, which takes no other
SUM_BAGS = 1  # kernel_mode of EmbeddingBag: bags of any length


class HpexEmbeddingBags(EmbeddingBags):
    """Embedding bags by `hpex.kernels.EmbeddingBag`, one call per table."""

    def read(self, lookups: PreparedLookups) -> Tensor:
        """Returns the sum over each bag of the rows that it looks up, (B, T, D)."""
        from habana_frameworks.torch.hpex.kernels import EmbeddingBag

        tables = zip(self.weights, lookups.by_table(), strict=True)
        return torch.stack([EmbeddingBag.forward(weight, *table[:3], SUM_BAGS) for weight, table in tables], dim=1)


class HpexAdagrad(SparseAdagrad):
    """Adagrad by `hpex.optimizers.SparseAdagrad`, whose eps is `HPEX_EPS`."""

    def update(self, rows: Tensor, lookups: PreparedLookups) -> None:
        """`rows`: (B, T, D); `EmbeddingBag.backward` sums their gradient for each row of a table."""
        from habana_frameworks.torch.hpex.kernels import EmbeddingBag
        from habana_frameworks.torch.hpex.optimizers import SparseAdagrad

        for t, table in enumerate(lookups.by_table()):
            by_row = rows.new_empty(len(table.unique_indices), rows.shape[2])
            by_bag = rows.grad[:, t].contiguous()
            groups = table.output_rows, table.output_row_offsets, table.valid_count_bwd
            EmbeddingBag.backward(by_row, by_bag, *groups, SUM_BAGS)
            unique = table.unique_indices, self.param_groups[0]["lr"], table.unique_count
            SparseAdagrad.forward(by_row, self.embeddings.weights[t], self.moments[t], *unique)


def coalesce_lookups_by_plugin(
    indices: Sequence[Tensor], offsets: Tensor, table_rows: Sequence[int], max_lookups: Sequence[int], *prepared: Tensor
) -> None:
    """Does the work of `dlrm::coalesce_lookups` by `hpex.kernels.EmbeddingBagPreproc`, on one core of the host."""
    from habana_frameworks.torch.hpex.kernels import EmbeddingBagPreproc

    for t, into in enumerate(PreparedLookups(max_lookups, *prepared).by_table()):
        rows, starts = indices[t], offsets[t]
        check_lookups(t, rows, starts, table_rows[t], max_lookups[t])
        into.indices_fwd[: len(rows)] = rows
        into.offsets[:] = starts
        # The last argument decides by how many bits it sorts: by fewer than the table needs, rows would occur twice.
        grouped = EmbeddingBagPreproc.forward(rows.int(), starts.int(), table_rows[t])
        into.unique_count[:], into.unique_indices[: len(rows)], into.output_rows[: len(rows)] = grouped[:3]
        into.output_row_offsets[: len(rows) + 1] = grouped[3]
        into.valid_count_fwd[:] = torch.tensor([len(starts), len(rows)])
        into.valid_count_bwd[:] = torch.tensor([int(grouped[0]) + 1, len(rows)])


# ---------------------------------------------------------------------------------------------------------------------
# The back end
# ---------------------------------------------------------------------------------------------------------------------

# Of the high-bandwidth memory (HBM) and of the matrix engines (MME), by the name that the plugin has for the card.
# Source: R. Kaplan, "Intel Gaudi 3 AI Accelerator", Hot Chips 2024, whose table compares the generations. It has no
# peaks of fp32 products. The first Gaudi's HBM is said to have 1 TB/s elsewhere.
PEAKS = {"GAUDI": Peaks(0.9e12, 60e12), "GAUDI2": Peaks(2.46e12, 432e12), "GAUDI3": Peaks(3.67e12, 1835e12)}


SECONDS_BETWEEN_QUERIES = 5e-5  # a small part of a step


class HpuBackend(AcceleratorBackend):
    """A Gaudi.

    Tables are read and updated by native operators of static shapes, as torch's own embedding bag and `index_add_`
    would silently run on the host. In lazy mode, which Intel's documentation calls a legacy fallback, Adagrad runs on
    the plugin's kernels, if `--hpu-kernels` lets it (`uses_plugin_kernels`).
    """

    wide_dtype = torch.float32
    process_group = "hccl"
    collectives_time_out = False

    def __init__(self, options: Options):
        """Raises UsageError, saying what to do, if there is no Gaudi that can run these options."""
        check_gaudi(options)
        super().__init__(torch.device("hpu"), options)
        import habana_frameworks.torch.core as htcore

        self._htcore, self._lazy, self._records = htcore, options.mode == "lazy", options.hpu_graphs
        self.times_phases = options.time_phases and not self._lazy
        self._pin, self._why_not_pinned = find_pinning()
        self._uses_kernels = uses_plugin_kernels(options)
        if self._uses_kernels:
            self.embedding_bags, self.sparse_optimizers = HpexEmbeddingBags, {"adagrad": HpexAdagrad}
        if options.lookup_preprocessing == "plugin":
            self.coalesce_lookups = coalesce_lookups_by_plugin
        if self._lazy:
            set_lazy_passes(options.optimizer)

    def notes(self, options: Options) -> list[str]:
        notes = []
        if options.hmp_opt_level != "O1" or options.hmp_verbose:
            notes.append("--hmp-opt-level and --hmp-verbose do nothing: torch.autocast took the place of hmp.")
        if self._why_not_pinned:
            notes.append(f"Batches reach the card more slowly, as memory can't be pinned ({self._why_not_pinned}).")
        if self.times_phases:
            notes.append("--time-phases slows each step down: the host waits at the end of each phase.")
        elif options.time_phases:
            notes.append("--time-phases does nothing in lazy mode, in which work starts at the end of a step.")
        return notes

    @property
    def name(self) -> str:
        return torch.hpu.get_device_name()

    @property
    def peaks(self) -> Peaks | None:
        """What the card can do at most (`PEAKS`), or None for a card of another name."""
        return PEAKS.get(self.name.upper())

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, backend="hpu_backend", dynamic=False) if self.mode == "compile" else function

    def dense_optimizer(self, layers: Sequence[DenseLayer], options: Options) -> torch.optim.Optimizer:
        if not self._uses_kernels:
            return super().dense_optimizer(layers, options)
        from habana_frameworks.torch.hpex.optimizers import FusedAdagrad

        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        return FusedAdagrad(parameters, lr=options.learning_rate, **options.optimizer_settings)

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, exact: float, on_device: Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr_t" if "lr_t" in group else "lr"] = on_device  # FusedAdagrad reads lr_t, and no other

    def replace_step_by_recorded(self, step: Callable) -> Callable:
        return RecordedStep(step) if self._records else step

    def mark_step(self) -> None:
        if self._lazy:
            self._htcore.mark_step()

    def synchronize(self) -> None:
        self.mark_step()
        self.wait_for(self.timestamp())  # lets other threads of Python run meanwhile, which the next line does not
        torch.hpu.synchronize()

    def timestamp(self):
        """Records an event. The host waits for its own pipeline meanwhile in eager and compile mode; in lazy mode, this
        ends the graph that it has gathered (`HPUEvent::record` in HPUEvent.cpp of the plugin's 1.19 source)."""
        event = torch.hpu.Event(enable_timing=True)
        event.record()
        return event

    def wait_for(self, moment) -> None:
        """Asks until the moment has come: `synchronize` would keep all threads from recording an event meanwhile
        (`synchronize_event` and `record_event` in device.cpp of the plugin's 1.19 source share a mutex)."""
        while not moment.query():
            time.sleep(SECONDS_BETWEEN_QUERIES)

    def elapsed_ms(self, start, end) -> float:
        return start.elapsed_time(end)

    def host_memory(self, count: int, dtype: torch.dtype) -> Tensor:
        return self._pin(torch.zeros(count, dtype=dtype))

    def num_batches_on_device(self, num_bytes: int) -> int:
        """Returns 2, so that a copy need not wait for the step before, which reads other memory: the card's
        DMA waits for all readers of its target (`copy_data_to_device` in device.cpp of the plugin's 1.19 source).

        Returns 1 for a step that is recorded, with the addresses that it reads, or if a second batch would take more
        than a hundredth of the free memory.
        """
        return 1 if self._records or 100 * num_bytes > self.memory_limit() else 2

    def memory_limit(self) -> int:
        return torch.hpu.mem_get_info()[0]

    def memory_in_use(self) -> tuple[int, int]:
        return torch.hpu.memory_allocated(), torch.hpu.max_memory_allocated()

    def prepare_collectives(self) -> None:
        import habana_frameworks.torch.distributed.hccl  # noqa: F401 - registers hccl

    def metrics(self) -> dict[str, dict]:
        """Returns counts of compilations and of operators that ran on the host.

        The plugin counts no waits, and no marks but those that the program asks for (metrics.py, and `StepMarkerBind`
        in hpu_lazy_tensors.cpp of its 1.19 source).
        """
        from habana_frameworks.torch.hpu.metrics import metric_global

        return {name: dict(metric_global(name).stats()) for name in ("graph_compilation", "cpu_fallback")}


def uses_plugin_kernels(options: Options) -> bool:
    """Says whether the plugin's kernels update tables and MLPs. Raises UsageError if they cannot, but
    `--hpu-kernels=plugin` asks for them."""
    obstacle = ""
    if options.mode != "lazy":
        obstacle = f"the plugin's kernels refuse to run in --mode={options.mode}; use --mode=lazy"
    elif options.hpu_graphs:  # dense Adagrad begins with the mark of a step, which would cut a recording in two
        obstacle = "the plugin's kernels can't be recorded; leave --hpu-graphs out"
    elif options.optimizer != "adagrad":  # the plugin's source calls its sparse SGD wrong
        obstacle = f"the plugin has no kernels for --optimizer={options.optimizer}; use adagrad"
    elif options.optimizer_eps != HPEX_EPS:
        obstacle = f"the plugin's kernels have an eps of {HPEX_EPS:g} alone; leave --optimizer-eps out"
    if obstacle and options.hpu_kernels == "plugin":
        raise UsageError(f"--hpu-kernels=plugin: {obstacle}, or use --hpu-kernels=native")
    return not obstacle and options.hpu_kernels != "native"


def find_pinning() -> tuple[Callable[[Tensor], Tensor], str]:
    """Returns a function that brings a tensor of the host into pinned memory, and an empty text.

    Whether `pin_memory` does so for a Gaudi depends on the build of torch; the plugin's own tests name the device.
    Where neither works, the function returns the tensor itself, and the text says why.
    """
    for pin in (Tensor.pin_memory, lambda tensor: tensor.pin_memory("hpu")):
        try:
            pin(torch.zeros(1))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        else:
            return pin, ""
    return lambda tensor: tensor, reason


def set_lazy_passes(optimizer: str) -> None:
    """Switches the passes of lazy mode as the Habana fork does. The switches are private by now, and may go."""
    from habana_frameworks.torch.utils import debug

    passes = {"fuse_t_mm_optimization": True}
    if optimizer == "adagrad":
        passes |= {"eliminate_common_subexpression": False, "constant_pooling": False}
    for name, wanted in passes.items():
        getattr(debug, f"_enable_{name}", lambda flag: None)(wanted)


class RecordedStep:
    """A step whose work a Gaudi records once, in lazy mode, and then does again on the same tensors."""

    warm_up = 2  # calls in which graphs are compiled

    def __init__(self, step: Callable):
        self._step, self._calls = step, 0
        self._graph, self._results = torch.hpu.HPUGraph(), None

    def __call__(self, *arguments):
        self._calls += 1
        if self._calls <= self.warm_up:
            return self._step(*arguments)
        if self._results is None:
            # On a stream of its own, a recording misses what the backward pass does on another thread. The plugin's own
            # `make_graphed_callables` takes the default stream, too.
            with torch.hpu.graph(self._graph, stream=torch.hpu.default_stream()):
                self._results = self._step(*arguments)  # is done as well, unlike in a CUDA graph
        else:
            self._graph.replay()
        return self._results


# ---------------------------------------------------------------------------------------------------------------------
# Is there a Gaudi?
# ---------------------------------------------------------------------------------------------------------------------


def why_no_gaudi() -> str:
    """Returns what keeps a Gaudi from being used; an empty text where nothing does."""
    if importlib.util.find_spec("habana_frameworks") is None:
        return "habana-torch-plugin is not installed"
    import habana_frameworks.torch.core  # noqa: F401 - brings torch.hpu

    return "" if torch.hpu.is_available() else "habana-torch-plugin finds no device"


def check_gaudi(options: Options) -> None:
    """Raises UsageError, saying what to do, if there is no Gaudi, or its plugin is too old or in the other mode."""
    if reason := why_no_gaudi():
        raise UsageError(
            f"--device=hpu: {reason}; use Intel's Gaudi container or installer, see what hl-smi prints and whether "
            "HABANA_VISIBLE_DEVICES is set, or use --device=cpu"
        )
    release = importlib.metadata.version("habana-torch-plugin")
    if tuple(map(int, release.split(".")[:2])) < OLDEST_PLUGIN:
        oldest = ".".join(map(str, OLDEST_PLUGIN))
        raise UsageError(f"--device=hpu: habana-torch-plugin {release} is too old; {oldest} or newer is needed")
    from habana_frameworks.torch.utils.internal import is_lazy

    if is_lazy() != (options.mode == "lazy"):
        needed = gaudi_environment(options)["PT_HPU_LAZY_MODE"]
        raise UsageError(
            f"--mode={options.mode} needs PT_HPU_LAZY_MODE={needed} before torch is imported; start demo_dlrm.py or "
            "dlrm_s_pytorch.py as a program"
        )
    if options.hpu_graphs and not hasattr(torch.hpu, "HPUGraph"):
        raise UsageError(f"--hpu-graphs: habana-torch-plugin {release} has no torch.hpu.HPUGraph; leave the flag out")
