"""The report of a run: how long it took, which phases took that time, and how much the hardware did in it."""

from __future__ import annotations

import json
import math
import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from dlrm.devices.backend import Backend
from dlrm.distributed.ranks import Ranks
from dlrm.kernels.dense import DenseLayer
from dlrm.kernels.gemm import count_products
from dlrm.options import Options
from dlrm.pipeline import BatchPipeline
from dlrm.system.files import written_whole

PHASES = ("wait", "forward", "backward", "optimizer")  # a lap may name a part of one, such as "forward: lookup"
END = "other"  # the rest of an iteration, after its last phase
BETWEEN = "between iterations"  # left out of all times
# On a Gaudi 2, random gathers reach 64 % of the memory's rate with rows of at least so many bytes, and 15 % with
# shorter ones (arXiv:2501.00210).
LEAST_BYTES_OF_FAST_ROWS = 256


class StepClock:
    """Measures the time of each iteration and of the phases in it.

    An iteration of the clock is one optimizer step, or one batch of inference. The device takes the time stamps: one at
    the end of each iteration, and one at the end of each phase if the back end times phases. They are read after a wait
    for the device in `settle`, or when there are many and the first of them are long past, so that timing an iteration
    does not delay the next one.

    The mean time per iteration is that from the first stamp to the last one, not a sum over iterations and phases: on a
    Gaudi, the time between two events is the longest on any of its four queues, and such times do not add up.
    """

    max_unread = 4096  # time stamps; a Gaudi's plugin has a million events, of which a stamp takes four

    def __init__(self, backend: Backend, on_lap: Callable[[str], None] = lambda phase: None):
        """`on_lap` is called with the name of each phase when the phase ends."""
        self._backend, self._on_lap = backend, on_lap
        self._unread: list[tuple[str, Any]] = []  # (name of the phase that ends here, time stamp of the back end)
        self._first: Any = None  # stamp of the beginning, or of the end of the last pause
        self._ms = 0.0  # from the beginning to the last pause, without pauses
        self._num_before = 0  # iterations before the beginning
        self.iteration_ms: list[float] = []
        self.phase_ms: dict[str, list[float]] = defaultdict(list)

    def start(self) -> None:
        """Begins the first iteration, or the first one after `settle`."""
        self._on_lap(BETWEEN)
        self._ms, self._num_before = 0.0, len(self.iteration_ms)
        self._begin()

    def lap(self, phase: str) -> None:
        """Ends the phase of this name, and begins the next one."""
        self._on_lap(phase)
        if self._backend.times_phases:
            self._unread.append((phase, self._backend.timestamp()))

    def end_iteration(self, step_end: Any) -> None:
        """Ends an iteration, and begins the next one. `step_end` is what `Backend.end_step` returned for it."""
        self._on_lap(END)
        self._unread.append((END, step_end))
        if len(self._unread) > self.max_unread:
            self._read(self.max_unread // 2)

    def end_pause(self) -> None:
        """Leaves the time since the end of the last iteration out of the next one. Call `synchronize` first."""
        self._end()
        self._begin()

    def settle(self) -> float:
        """Waits for the device, and returns the mean ms of the iterations since `start`.

        The clock must be started again before the next iteration.
        """
        self._backend.synchronize()
        self._end()
        return self._ms / (len(self.iteration_ms) - self._num_before)

    def _begin(self) -> None:
        self._first = self._backend.timestamp()
        self._unread = [("", self._first)]

    def _end(self) -> None:
        """Reads all stamps, and adds the time from the first to the last."""
        self._read(len(self._unread))
        self._ms += self._backend.elapsed_ms(self._first, self._unread[-1][1])

    def _read(self, count: int) -> None:
        """Reads the iterations that end in the first `count` stamps."""
        ends = [number for number, (phase, _) in enumerate(self._unread[:count]) if phase == END]
        if not ends:
            return
        self._backend.wait_for(self._unread[ends[-1]][1])
        for first, last in pairwise([0, *ends]):
            stamps = self._unread[first : last + 1]
            self.iteration_ms.append(self._backend.elapsed_ms(stamps[0][1], stamps[-1][1]))
            ms_by_phase = defaultdict(float)
            for (_, begin), (phase, end) in pairwise(stamps):
                ms_by_phase[phase] += self._backend.elapsed_ms(begin, end)
            for phase, milliseconds in ms_by_phase.items():
                self.phase_ms[phase].append(milliseconds)
        del self._unread[: ends[-1]]

    def mean_ms(self, prefix: str, warm_up: int) -> float:
        """Returns the mean ms per iteration of the phases whose names begin with `prefix`.

        The first `warm_up` iterations are left out.
        """
        return sum(float(np.mean(ms[warm_up:])) for phase, ms in self.phase_ms.items() if phase.startswith(prefix))


@dataclass
class RunReport:
    """Results of a run, with times in ms and sizes in bytes.

    Times and speeds leave out the warm-up iterations. Samples and FLOP are those of all ranks. Times, memory and the
    bytes of embeddings are those of rank 0.
    """

    ranks: int
    device: str
    device_name: str
    mode: str
    data_type: str
    arithmetic: str  # `Backend.arithmetic`
    kernels: str  # on the host: "native", or "reference" with the reason
    products: dict[str, int]  # the layers' matrix products, counted by what computes them, as --gemm names it
    versions: dict[str, str]
    loss: float  # the one printed last
    warm_up_iterations: int
    iterations: int
    ms_per_iteration: dict[str, float]  # median, p95, min
    samples_per_second: float  # at the median
    gflop_per_iteration: float
    tflop_per_second: float  # at the median
    embedding_bytes_per_iteration: float
    embedding_gb_per_second: float | None  # while tables are read or updated; None where that time is unknown
    row_bytes: int  # bytes of a table row, or of the piece of a row that rank 0 holds
    # Percent of what the device can do at most, where that is known: "products", in bf16, and "embeddings", of the
    # memory's rate; the latter is over the whole iteration, and so a lower bound, where phases are not timed.
    percent_of_peak: dict[str, float]
    phase_ms: dict[str, float]  # mean per iteration; "wait" is the wait for a batch that is not ready yet
    # Mean per batch on the host thread, which runs beside the iterations. "data" includes the wait for the slowest
    # rank where several ranks read a data set.
    host_ms: dict[str, float]
    embedding_ms: dict[str, float]  # mean per iteration of the parts of forward and optimizer that work on tables
    peak_memory: int
    options: dict

    def __str__(self) -> str:
        ms = self.ms_per_iteration
        total_ms = sum(self.phase_ms.values())
        speed = "" if self.embedding_gb_per_second is None else f"{self.embedding_gb_per_second:.2f} GB/s "
        of_products = of_memory = ""
        if "products" in self.percent_of_peak:
            of_products = f", {self.percent_of_peak['products']:.1f} % of the peak in bf16"
        if "embeddings" in self.percent_of_peak:
            at_least = "at least " if self.embedding_gb_per_second is None else ""
            rows = "of 256 bytes or more" if self.row_bytes >= LEAST_BYTES_OF_FAST_ROWS else "below 256 bytes"
            of_memory = f", {at_least}{self.percent_of_peak['embeddings']:.1f} % of the memory's peak, rows {rows}"
        split = ", ".join(f"{phase} {100 * mean / total_ms:.1f} %" for phase, mean in self.phase_ms.items())
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        products = ", ".join(f"{count} {name}" for name, count in self.products.items() if count)
        device = f"{self.ranks} x {self.device}" if self.ranks > 1 else self.device
        return "\n".join([
            f"Report of {self.iterations} iterations after {self.warm_up_iterations} of warm-up",
            f"  time        median {ms['median']:.2f} ms/it, p95 {ms['p95']:.2f}, min {ms['min']:.2f}",
            f"  throughput  {self.samples_per_second:,.0f} samples/s",
            f"  compute     {self.tflop_per_second:.3f} TFLOP/s ({self.gflop_per_iteration:.2f} GFLOP/it){of_products}",
            f"  embeddings  {speed}({self.embedding_bytes_per_iteration / 1e6:.2f} MB/it){of_memory}",
            f"  split       {split}",
            f"  beside it   data {self.host_ms['data']:.2f} ms/it, preprocess {self.host_ms['preprocess']:.2f} ms/it",
            f"  memory      {self.peak_memory / 2**30:.2f} GiB at most",
            f"  device      {device} ({self.device_name}), {self.mode}, {self.arithmetic}, {self.kernels} kernels",
            f"  products    {products}",
            f"  versions    {versions}",
        ])  # fmt: skip

    def write(self, path: str) -> None:
        """Writes the report as JSON, with a loss of null if it is not finite. Raises RunError if that fails."""
        values = asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}
        with written_whole("--report", path) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n")


class Interaction(Protocol):
    """Attribute of an interaction of features that the report reads."""

    multiplications: int  # per sample, in the forward pass


class Model(Protocol):
    """Attributes of a model that the report reads."""

    interaction: Interaction

    def dense_layers(self) -> Sequence[DenseLayer]:
        """Returns the layers of all MLPs, the one on the dense features first."""


def make_report(
    options: Options,
    backend: Backend,
    ranks: Ranks,
    model: Model,
    clock: StepClock,
    pipeline: BatchPipeline,
    loss: float,
) -> RunReport:
    """Builds the report of a run that has ended, and whose last printed loss is `loss`."""
    num_iterations = len(clock.iteration_ms)
    warm_up = min(10, num_iterations // 4 + 1) if num_iterations > 1 else 0
    iteration_ms = np.array(clock.iteration_ms[warm_up:])
    median_ms = float(np.median(iteration_ms))
    flop = flop_per_iteration(model, options)
    embedding_bytes = embedding_bytes_per_iteration(
        options, ranks, pipeline.lookups / pipeline.batches, pipeline.unique_rows / pipeline.batches
    )
    phases = (*PHASES, END) if backend.times_phases else (END,)
    embedding_ms = {part: clock.mean_ms(part, warm_up) for part in ("forward: lookup", "optimizer: tables")}
    embedding_speed = embedding_bytes / sum(embedding_ms.values()) / 1e6 if backend.times_phases else None
    return RunReport(
        ranks=ranks.size,
        device=str(backend.device),
        device_name=backend.name,
        mode=backend.mode,
        data_type=backend.data_type,
        arithmetic=backend.arithmetic,
        kernels=backend.kernels,
        products=count_products(layer.products for layer in model.dense_layers()),
        versions=package_versions(),
        loss=loss,
        warm_up_iterations=warm_up,
        iterations=len(iteration_ms),
        ms_per_iteration={
            "median": median_ms,
            "p95": float(np.percentile(iteration_ms, 95)),
            "min": float(iteration_ms.min()),
        },
        samples_per_second=1000 * batch_size(options) / median_ms,
        gflop_per_iteration=flop / 1e9,
        tflop_per_second=flop / median_ms / 1e9,
        embedding_bytes_per_iteration=embedding_bytes,
        embedding_gb_per_second=embedding_speed,
        row_bytes=bytes_per_table_weight(options) * columns_of_piece(options, ranks),
        percent_of_peak=percent_of_peak(
            backend,
            flop / ranks.size / median_ms * 1e3,
            embedding_speed * 1e9 if embedding_speed else embedding_bytes / median_ms * 1e3,
        ),
        phase_ms={phase: clock.mean_ms(phase, warm_up) for phase in phases},
        host_ms={
            "data": float(np.mean(pipeline.data_ms[warm_up:])),
            "preprocess": float(np.mean(pipeline.preprocess_ms[warm_up:])),
        },
        embedding_ms=embedding_ms,
        peak_memory=backend.memory_in_use()[1],
        options=asdict(options),
    )


def batch_size(options: Options) -> int:
    """Returns the samples per iteration of the clock, on all ranks: per optimizer step, or per batch of inference."""
    return options.test_batch_size if options.inference_only else options.samples_per_step


def flop_per_iteration(model: Model, options: Options) -> float:
    """Returns the floating-point operations that the matrix products of an iteration take, on all ranks.

    A multiplication and an addition count as two. B is the number of samples, F = T + 1 the number of features for T
    tables, and D the embedding dimension. A layer of n inputs and m outputs takes 2·B·n·m in the forward pass, and as
    much for the gradient of its weight and for that of its input. The very first layer needs no gradient of its input.
    A cross layer of low rank is two such layers. The dot interaction takes 2·B·F²·D in the forward pass, and twice as
    much in the backward pass. Inference has the forward pass only.
    """
    weights_per_layer = [layer.weight.numel() for layer in model.dense_layers()]
    forward = 2 * batch_size(options) * (sum(weights_per_layer) + model.interaction.multiplications)
    # Without a bottom MLP, the first layer is the top MLP's, whose input depends on the tables.
    gradient_of_first_input = 2 * batch_size(options) * weights_per_layer[0] if len(options.arch_mlp_bot) > 1 else 0
    return forward if options.inference_only else 3 * forward - gradient_of_first_input


def embedding_bytes_per_iteration(options: Options, ranks: Ranks, lookups: float, unique_rows: float) -> float:
    """Returns the bytes of rows that one iteration moves for this rank's pieces of tables.

    `lookups` and `unique_rows` are means per iteration over these pieces. Every access counts as one of main memory:

        forward     reads a table row per lookup, writes a pooled output per bag
        backward    reads a gradient row per lookup
        optimizer   reads and writes, per unique row, the weights and Adagrad's moments

    Row-wise moments are too small to count. All numbers are float32, except that tables may be bfloat16.
    """
    bytes_per_weight = bytes_per_table_weight(options)
    bags = batch_size(options) * len(ranks.held_pieces)
    bytes_per_column = lookups * bytes_per_weight + bags * 4
    if not options.inference_only:
        bytes_per_column += lookups * 4 + unique_rows * 2 * bytes_per_weight
    if not options.inference_only and options.optimizer == "adagrad":
        bytes_per_column += unique_rows * 2 * 4
    return columns_of_piece(options, ranks) * bytes_per_column


def bytes_per_table_weight(options: Options) -> int:
    return 2 if options.table_data_type == "bf16" else 4


def columns_of_piece(options: Options, ranks: Ranks) -> int:
    """Returns how many numbers of a table row are in the piece that a rank holds."""
    return options.embedding_dim * ranks.plan.width // ranks.plan.dim


def percent_of_peak(backend: Backend, flop_per_second: float, bytes_per_second: float) -> dict[str, float]:
    """Returns what `RunReport.percent_of_peak` holds, for one device. Peaks of fp32 products are not known."""
    if backend.peaks is None:
        return {}
    percent = {"embeddings": 100 * bytes_per_second / backend.peaks.bytes_per_second}
    if backend.data_type == "bf16":
        percent["products"] = 100 * flop_per_second / backend.peaks.bf16_flop_per_second
    return percent


def package_versions() -> dict[str, str]:
    """Returns the versions of Python, torch, numpy and, if it is installed, the Gaudi plugin."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "habana-torch-plugin"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
