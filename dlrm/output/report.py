"""How long a run took, where the time went, and how far that is from what the work needs."""

from __future__ import annotations

import json
import math
import platform
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

import numpy as np

from dlrm.kernels.gemm import count_by_onednn
from dlrm.options import Options
from dlrm.system.files import written_whole

PHASES = ("wait", "forward", "backward", "optimizer")  # a lap may name a part, as in "forward: lookup"
END = "other"  # what is left of an iteration after its last phase
BETWEEN = "between iterations"  # counted nowhere


class StepClock:
    """Takes the time of each iteration and of the phases in it.

    Time stamps are the device's own, and are read only in `settle`, after the device has been waited for: timing an
    iteration does not delay the next one.
    """

    def __init__(self, backend, on_lap: Callable[[str], None] = lambda phase: None):
        """`on_lap` is called with the name of each phase, where it ends."""
        self._backend, self._on_lap = backend, on_lap
        self._stamps = []  # (phase that ended here, time stamp)
        self.iteration_ms: list[float] = []
        self.phase_ms: dict[str, list[float]] = defaultdict(list)

    def start(self) -> None:
        """The first iteration, or the first after `settle`, begins here."""
        self._on_lap(BETWEEN)
        self._stamps = [("", self._backend.timestamp())]

    def lap(self, phase: str) -> None:
        """The named phase ends here, and the next one begins."""
        self._on_lap(phase)
        if self._backend.times_phases or phase == END:
            self._stamps.append((phase, self._backend.timestamp()))

    def end_iteration(self) -> None:
        self.lap(END)

    def end_pause(self) -> None:
        """What was done since the last iteration is no part of the next one."""
        self._stamps.append((BETWEEN, self._backend.timestamp()))

    def settle(self) -> float:
        """Waits for the device; returns the mean ms of the iterations since `start`. The clock stands until then."""
        self._backend.synchronize()
        known = len(self.iteration_ms)
        spent = defaultdict(float)
        for (_, begin), (phase, end) in pairwise(self._stamps):
            if phase == BETWEEN:
                continue
            spent[phase] += self._backend.elapsed_ms(begin, end)
            if phase == END:
                self.iteration_ms.append(sum(spent.values()))
                for name, milliseconds in spent.items():
                    self.phase_ms[name].append(milliseconds)
                spent.clear()
        return float(np.mean(self.iteration_ms[known:]))

    def mean_ms(self, prefix: str, warm_up: int) -> float:
        """Of the phases whose name begins so, over the iterations after warm-up."""
        return sum(float(np.mean(ms[warm_up:])) for phase, ms in self.phase_ms.items() if phase.startswith(prefix))


@dataclass
class RunReport:
    """Times in ms, sizes in bytes. Warm-up iterations count in none of the figures. Samples and FLOP are those of all
    ranks; times, memory and what is moved for embeddings are rank 0's."""

    ranks: int
    device: str
    device_name: str
    mode: str
    data_type: str
    kernels: str  # of the host: native, or reference and why
    products_by_onednn: str  # of the layers' matrix products; the others are torch's default
    versions: dict[str, str]
    loss: float  # as printed last
    warm_up_iterations: int
    iterations: int
    ms_per_iteration: dict[str, float]  # median, p95, min
    samples_per_second: float  # at the median
    gflop_per_iteration: float
    tflop_per_second: float  # at the median
    embedding_bytes_per_iteration: float
    embedding_gb_per_second: float | None  # while lookups and updates of tables run; None where that time is unknown
    phase_ms: dict[str, float]  # mean of each phase of an iteration; "wait" is for a batch that is not ready yet
    host_ms: dict[str, float]  # mean time of a batch on the host thread, which runs beside the iterations; of a data
    # set on several ranks, with the wait for the slowest of them
    embedding_ms: dict[str, float]  # mean of the parts of forward and optimizer that work on tables
    peak_memory: int
    options: dict

    def __str__(self) -> str:
        ms = self.ms_per_iteration
        total = sum(self.phase_ms.values())
        speed = "" if self.embedding_gb_per_second is None else f"{self.embedding_gb_per_second:.2f} GB/s "
        split = ", ".join(f"{phase} {100 * mean / total:.1f} %" for phase, mean in self.phase_ms.items())
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        device = f"{self.ranks} x {self.device}" if self.ranks > 1 else self.device
        return "\n".join([
            f"Report of {self.iterations} iterations after {self.warm_up_iterations} of warm-up",
            f"  time        median {ms['median']:.2f} ms/it, p95 {ms['p95']:.2f}, min {ms['min']:.2f}",
            f"  throughput  {self.samples_per_second:,.0f} samples/s",
            f"  compute     {self.tflop_per_second:.3f} TFLOP/s ({self.gflop_per_iteration:.2f} GFLOP/it)",
            f"  embeddings  {speed}({self.embedding_bytes_per_iteration / 1e6:.2f} MB/it)",
            f"  split       {split}",
            f"  beside it   data {self.host_ms['data']:.2f} ms/it, preprocess {self.host_ms['preprocess']:.2f} ms/it",
            f"  memory      {self.peak_memory / 2**30:.2f} GiB at most",
            f"  device      {device} ({self.device_name}), {self.mode}, {self.data_type}, {self.kernels} kernels",
            f"  products    {self.products_by_onednn} by oneDNN",
            f"  versions    {versions}",
        ])  # fmt: skip

    def write(self, path: str) -> None:
        """As JSON. RunError if it can't be written."""
        values = asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}
        with written_whole("--report", path) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n")


def make_report(options: Options, backend, ranks, model, clock: StepClock, pipeline, loss: float) -> RunReport:
    warm_up = min(10, len(clock.iteration_ms) // 4 + 1) if len(clock.iteration_ms) > 1 else 0
    times = np.array(clock.iteration_ms[warm_up:])
    median = float(np.median(times))
    flop = flop_per_iteration(model, options)
    traffic = embedding_bytes_per_iteration(
        options, ranks, pipeline.lookups / pipeline.batches, pipeline.unique_rows / pipeline.batches
    )
    phases = (*PHASES, END) if backend.times_phases else (END,)
    on_tables = {part: clock.mean_ms(part, warm_up) for part in ("forward: lookup", "optimizer: tables")}
    return RunReport(
        ranks=ranks.size,
        device=str(backend.device),
        device_name=backend.name,
        mode=backend.mode,
        data_type=backend.data_type,
        kernels=backend.kernels,
        products_by_onednn=count_by_onednn(layer.products for layer in model.dense_layers()),
        versions=package_versions(),
        loss=loss,
        warm_up_iterations=warm_up,
        iterations=len(times),
        ms_per_iteration={"median": median, "p95": float(np.percentile(times, 95)), "min": float(times.min())},
        samples_per_second=1000 * batch_size(options) / median,
        gflop_per_iteration=flop / 1e9,
        tflop_per_second=flop / median / 1e9,
        embedding_bytes_per_iteration=traffic,
        embedding_gb_per_second=traffic / sum(on_tables.values()) / 1e6 if backend.times_phases else None,
        phase_ms={phase: clock.mean_ms(phase, warm_up) for phase in phases},
        host_ms={
            "data": float(np.mean(pipeline.data_ms[warm_up:])),
            "preprocess": float(np.mean(pipeline.preprocess_ms[warm_up:])),
        },
        embedding_ms=on_tables,
        peak_memory=backend.memory_in_use()[1],
        options=asdict(options),
    )


def batch_size(options: Options) -> int:
    """Samples of what is timed: a step of the optimizers, or a batch of inference."""
    return options.test_batch_size if options.inference_only else options.samples_per_step


def flop_per_iteration(model, options: Options) -> float:
    """Floating-point operations of the model's matrix products, a multiplication and an addition counted as two.

    A layer of n inputs and m outputs takes 2·B·n·m forward, and as much again for the gradient of its weight and for
    that of its input; the very first layer's input needs none. The dot interaction of F = T + 1 features takes
    2·B·F²·D forward and twice that backward. Inference is the forward part.
    """
    layers = [layer.weight.numel() for layer in model.dense_layers()]
    forward = 2 * batch_size(options) * (sum(layers) + model.interaction.multiplications)
    first_layer = 2 * batch_size(options) * layers[0]
    return forward if options.inference_only else 3 * forward - first_layer


def embedding_bytes_per_iteration(options: Options, ranks, lookups: float, unique_rows: float) -> float:
    """Bytes of rows that must move for the pieces of tables on this rank, were each access one of main memory.

    Forward: a table row read for each lookup, a pooled row written for each bag. Backward: a gradient row read for each
    lookup. Update: weight, and with Adagrad moment, read and written for each unique row; row-wise moments are small.
    All are float32 but the tables' rows, which may be bfloat16.
    """
    in_table = 2 if options.table_data_type == "bf16" else 4  # bytes of a number
    bytes_a_column = lookups * in_table + batch_size(options) * len(ranks.held_pieces) * 4
    if not options.inference_only:
        bytes_a_column += lookups * 4 + unique_rows * 2 * in_table
    if not options.inference_only and options.optimizer == "adagrad":
        bytes_a_column += unique_rows * 2 * 4
    return options.embedding_dim * ranks.plan.width // ranks.plan.dim * bytes_a_column


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "habana-torch-plugin"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
