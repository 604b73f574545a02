"""The kernels of the trainer: lookups prepared on the host, embedding bags, fused optimizers; a back end a device.

    dlrm::coalesce_lookups    raw lookups of a batch -> bounds-checked, grouped by row, in tensors of fixed size
    dlrm::embedding_bag_sum   all tables, all bags   -> (B, T, D)
    dlrm::sparse_adagrad_     gradient of that       -> the tables and their moments, in place
    dlrm::sparse_rowwise_adagrad_                       likewise, with one moment a row
    dlrm::sparse_sgd_         gradient of that       -> the tables, in place

Each op is a schema, a fake implementation that only knows shapes, and a reference implementation in plain torch, which
states what the op means and runs on any device that has no kernel of its own.

The tables are not autograd leaves; their pooled output is. The backward of a sum bag is itself a sum bag: row r of a
table receives the gradients of all bags that looked it up. So the gradient of the pooled output, (B, T, D), and the
lookups grouped by row are all that a sparse optimizer needs, and no gradient of table size ever exists.

B batch, T tables, D embedding dimension, N most lookups of a table in a batch, U rows that a table's lookups hit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.library import define, impl, register_autograd, register_fake
from torch.nn.functional import embedding_bag

from dlrm_data_pytorch import Batch, RandomData
from dlrm_options import Options, RunError, UsageError


def reference(op: str) -> Callable[[Callable], Callable]:
    """Registers a function as what `op` does on devices without a kernel of their own, and leaves it callable."""

    def register(function: Callable) -> Callable:
        impl(op, "default", function)
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------------
# The prepared lookup
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class PreparedLookups:
    """The lookups of a batch in T tables, as the device wants them. int32; sizes never change, only how much counts.

    The counts of `valid_count_fwd`, `valid_count_bwd` and `unique_count` are in the form that Gaudi's kernels take.
    """

    indices_fwd: Tensor  # (T, N) rows in the order of the lookups, then unused
    offsets: Tensor  # (T, B + 1) where each bag starts; the last entry is the number of lookups
    valid_count_fwd: Tensor  # (T, 2) [B + 1, lookups]
    unique_indices: Tensor  # (T, N) each row that occurs once, ascending, U of them
    output_rows: Tensor  # (T, N) for each lookup, grouped by row: its bag
    output_row_offsets: Tensor  # (T, N + 1) where each row's group starts; entry U is the number of lookups
    valid_count_bwd: Tensor  # (T, 2) [U + 1, lookups]
    unique_count: Tensor  # (T, 1) U

    def fields(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @staticmethod
    def shapes(num_tables: int, batch_size: int, max_lookups: int) -> list[tuple[int, int]]:
        """Of each field; `max_lookups` is N."""
        widths = (max_lookups, batch_size + 1, 2, max_lookups, max_lookups, max_lookups + 1, 2, 1)
        return [(num_tables, width) for width in widths]


define(
    "dlrm::coalesce_lookups",
    "(Tensor[] indices, Tensor offsets, int[] table_rows, Tensor(a!) indices_fwd, Tensor(b!) offsets_fwd, "
    "Tensor(c!) valid_count_fwd, Tensor(d!) unique_indices, Tensor(e!) output_rows, Tensor(f!) output_row_offsets, "
    "Tensor(g!) valid_count_bwd, Tensor(h!) unique_count) -> ()",
)


@register_fake("dlrm::coalesce_lookups")
def _(indices, offsets, table_rows, *prepared) -> None:
    torch._check(len(indices) == len(table_rows) == offsets.shape[0], lambda: "one indices, offsets and rows a table")


@reference("dlrm::coalesce_lookups")
def coalesce_lookups_reference(
    indices: Sequence[Tensor], offsets: Tensor, table_rows: Sequence[int], *prepared: Tensor
) -> None:
    """Fills the fields of a `PreparedLookups` from raw lookups, in place.

    `indices[t]`: (lookups,) int32 or int64; `offsets`: (T, B + 1) int32 or int64; `table_rows[t]`: rows of table t.
    IndexError or ValueError, naming table and sample, for a lookup outside its table or offsets that are no offsets.
    """
    into = PreparedLookups(*prepared)
    bags = torch.arange(offsets.shape[1] - 1)
    for t, (rows, starts) in enumerate(zip(indices, offsets, strict=True)):
        check_lookups(t, rows, starts, table_rows[t], into.indices_fwd.shape[1])
        in_row_order, order = rows.sort(stable=True)
        unique, occurrences = in_row_order.unique_consecutive(return_counts=True)
        into.indices_fwd[t, : len(rows)] = rows
        into.offsets[t] = starts
        into.valid_count_fwd[t] = torch.tensor([len(starts), len(rows)])
        into.unique_indices[t, : len(unique)] = unique
        into.output_rows[t, : len(rows)] = bags.repeat_interleave(starts.diff())[order]
        into.output_row_offsets[t, 0] = 0
        into.output_row_offsets[t, 1 : len(unique) + 1] = occurrences.cumsum(0)
        into.valid_count_bwd[t] = torch.tensor([len(unique) + 1, len(rows)])
        into.unique_count[t] = len(unique)


def check_lookups(table: int, indices: Tensor, offsets: Tensor, table_rows: int, max_lookups: int) -> None:
    """ValueError for offsets that are no offsets, IndexError for a lookup outside the table."""
    lookups = len(indices)
    if lookups > max_lookups:
        raise ValueError(f"table {table}: {lookups} lookups, but there is room for {max_lookups}")
    if offsets[0] != 0:
        raise ValueError(f"table {table}, sample 0: offsets must start at 0, not at {offsets[0]}")
    decreasing = (offsets.diff() < 0).nonzero()
    if len(decreasing):
        sample = int(decreasing[0])
        raise ValueError(
            f"table {table}, sample {sample}: offsets must not decrease, as from {offsets[sample]} to "
            f"{offsets[sample + 1]}"
        )
    if offsets[-1] != lookups:
        raise ValueError(
            f"table {table}, sample {len(offsets) - 2}: offsets must end at the number of lookups, {lookups}, not at "
            f"{offsets[-1]}"
        )
    outside = ((indices < 0) | (indices >= table_rows)).nonzero()
    if len(outside):
        position = int(outside[0])
        sample = int(torch.searchsorted(offsets, position, right=True)) - 1
        raise IndexError(
            f"table {table}, sample {sample}: lookup of row {indices[position]}, but the table's rows are 0 to "
            f"{table_rows - 1}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The embedding bag
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::embedding_bag_sum", "(Tensor[] weights, Tensor indices_fwd, Tensor offsets) -> Tensor")


@register_fake("dlrm::embedding_bag_sum")
def _(weights, indices_fwd, offsets) -> Tensor:
    torch._check(len(weights) == offsets.shape[0], lambda: f"{len(weights)} tables, offsets for {offsets.shape[0]}")
    shape = (offsets.shape[1] - 1, len(weights), weights[0].shape[1])
    return weights[0].new_empty(shape, dtype=torch.promote_types(weights[0].dtype, torch.float32))


@reference("dlrm::embedding_bag_sum")
def embedding_bag_sum_reference(weights: Sequence[Tensor], indices_fwd: Tensor, offsets: Tensor) -> Tensor:
    """pooled[b, t] = sum of weights[t][i] over the lookups i of bag b; an empty bag gives zeros.

    `weights[t]`: (rows, D) float32 or bfloat16; `indices_fwd`, `offsets`: as in `PreparedLookups`. Returns (B, T, D)
    float32.
    """
    at_least_float = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    return torch.stack([sum_bags(*table) for table in zip(at_least_float, indices_fwd, offsets, strict=True)], dim=1)


def sum_bags(rows: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """(n, D), indices, (bags + 1,) -> (bags, D)."""
    return embedding_bag(indices, rows, offsets, mode="sum", include_last_offset=True)


def _save_lookups(ctx, inputs, output) -> None:
    weights, indices_fwd, offsets = inputs
    ctx.table_rows = [len(weight) for weight in weights]
    ctx.save_for_backward(indices_fwd, offsets)


def _dense_gradients(ctx, grad_pooled: Tensor):
    """A dense gradient for each table. Training never asks for it; whoever differentiates by a table does."""
    indices_fwd, offsets = ctx.saved_tensors
    position = torch.arange(indices_fwd.shape[1], dtype=offsets.dtype, device=offsets.device)
    gradients = []
    for t, rows in enumerate(ctx.table_rows):
        bag = torch.searchsorted(offsets[t], position, right=True) - 1  # B for positions past the last lookup
        in_some_bag = bag < len(grad_pooled)
        by_lookup = grad_pooled[bag.clamp(max=len(grad_pooled) - 1), t] * in_some_bag[:, None]
        gradient = grad_pooled.new_zeros(rows, grad_pooled.shape[2])
        gradients.append(gradient.index_add(0, indices_fwd[t] * in_some_bag, by_lookup))
    return gradients, None, None


register_autograd("dlrm::embedding_bag_sum", _dense_gradients, setup_context=_save_lookups)


class EmbeddingTable(nn.Module):
    """Holds the rows of a table, so that its name in a checkpoint is `emb_l.0.weight`, as it has always been."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        torch.ops.dlrm.advise_huge_pages(self.weight)


class EmbeddingBags(nn.ModuleList):
    """All tables of a model. Remembers the last pooled output and its lookups for the sparse optimizer."""

    def __init__(self, tables: Iterable[Tensor]):
        super().__init__(map(EmbeddingTable, tables))

    @property
    def weights(self) -> list[Tensor]:
        return [table.weight for table in self]

    def forward(self, lookups: PreparedLookups) -> Tensor:
        """Sums of the looked-up rows, (B, T, D): a leaf of autograd while gradients are on."""
        pooled = torch.ops.dlrm.embedding_bag_sum(self.weights, lookups.indices_fwd, lookups.offsets)
        if torch.is_grad_enabled():
            self.pooled, self.lookups = pooled.requires_grad_(), lookups
        return pooled


# ---------------------------------------------------------------------------------------------------------------------
# Sparse optimizers
# ---------------------------------------------------------------------------------------------------------------------

GROUPED_LOOKUPS = "Tensor unique_indices, Tensor output_rows, Tensor output_row_offsets, Tensor unique_count"

define(
    "dlrm::sparse_adagrad_",
    f"(Tensor(a!)[] weights, Tensor(b!)[] moments, Tensor grad_pooled, {GROUPED_LOOKUPS}, float lr, float eps, "
    "int? seed=None) -> ()",
)
define(
    "dlrm::sparse_rowwise_adagrad_",
    f"(Tensor(a!)[] weights, Tensor(b!)[] moments, Tensor grad_pooled, {GROUPED_LOOKUPS}, float lr, float eps, "
    "int? seed=None) -> ()",
)
define(
    "dlrm::sparse_sgd_",
    f"(Tensor(a!)[] weights, Tensor grad_pooled, {GROUPED_LOOKUPS}, float lr, int? seed=None) -> ()",
)


@register_fake("dlrm::sparse_adagrad_")
@register_fake("dlrm::sparse_rowwise_adagrad_")
def _(weights, moments, grad_pooled, *_, **__) -> None:
    torch._check(len(weights) == len(moments) == grad_pooled.shape[1], lambda: "one moment and gradient a table")


@register_fake("dlrm::sparse_sgd_")
def _(weights, grad_pooled, *_, **__) -> None:
    torch._check(len(weights) == grad_pooled.shape[1], lambda: "one gradient a table")


@reference("dlrm::sparse_adagrad_")
def sparse_adagrad_reference(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    lr: float,
    eps: float,
    seed: int | None = None,
) -> None:
    """Adagrad (Duchi et al. 2011, as `torch.optim.Adagrad` computes it) on the rows that were looked up, in place:

        moment[r] += g^2;  weight[r] -= lr * g / (sqrt(moment[r]) + eps),   g the sum of row r's gradients

    The update is not linear in g, so g must be whole: that is what the lookups are grouped for.
    `weights[t]`: (rows, D) float32 or bfloat16; `moments[t]`: (rows, D) float32; `grad_pooled`: (B, T, D), float32 or
    bfloat16; `seed`: see `subtract_from_rows`; the rest as in `PreparedLookups`.
    """
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count)
    for t, (rows, gradient) in enumerate(row_gradients(grad_pooled, *lookups)):
        moments[t].index_add_(0, rows, gradient.square())
        subtract_from_rows(weights[t], rows, lr * gradient / (moments[t][rows].sqrt() + eps), t, seed)


@reference("dlrm::sparse_rowwise_adagrad_")
def sparse_rowwise_adagrad_reference(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    lr: float,
    eps: float,
    seed: int | None = None,
) -> None:
    """Adagrad with one moment a row, the mean of g^2 over the row: for tables whose moments would not fit.

    `moments[t]`: (rows,) float32; the rest as of `sparse_adagrad_reference`.
    """
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count)
    for t, (rows, gradient) in enumerate(row_gradients(grad_pooled, *lookups)):
        moments[t].index_add_(0, rows, gradient.square().mean(1))
        subtract_from_rows(weights[t], rows, lr * gradient / (moments[t][rows, None].sqrt() + eps), t, seed)


@reference("dlrm::sparse_sgd_")
def sparse_sgd_reference(
    weights: Sequence[Tensor],
    grad_pooled: Tensor,
    unique_indices: Tensor,
    output_rows: Tensor,
    output_row_offsets: Tensor,
    unique_count: Tensor,
    lr: float,
    seed: int | None = None,
) -> None:
    """weight[r] -= lr * g, in place, on the rows that were looked up; arguments as of `sparse_adagrad_reference`."""
    lookups = (unique_indices, output_rows, output_row_offsets, unique_count)
    for t, (rows, gradient) in enumerate(row_gradients(grad_pooled, *lookups)):
        subtract_from_rows(weights[t], rows, lr * gradient, t, seed)


def row_gradients(
    grad_pooled: Tensor, unique_indices: Tensor, output_rows: Tensor, output_row_offsets: Tensor, unique_count: Tensor
) -> Iterable[tuple[Tensor, Tensor]]:
    """For each table the rows that were looked up, (U,) int64, and the gradient of each, (U, D) float32."""
    for t, unique in enumerate(unique_count.flatten().tolist()):
        by_bag = grad_pooled[:, t].float().contiguous()
        yield unique_indices[t, :unique].long(), sum_bags(by_bag, output_rows[t], output_row_offsets[t, : unique + 1])


def subtract_from_rows(weight: Tensor, rows: Tensor, steps: Tensor, table: int, seed: int | None) -> None:
    """weight[rows] -= steps; a bfloat16 weight is `randomly_rounded` if there is a `seed`, else to nearest."""
    values = weight[rows].float() - steps
    if weight.dtype == torch.bfloat16 and seed is not None:
        values = randomly_rounded(values, rows, table, seed)
    weight[rows] = values.to(weight.dtype)


def randomly_rounded(values: Tensor, rows: Tensor, table: int, seed: int) -> Tensor:
    """Values of bfloat16, up or down from `values` (U, D) so that the expected one is the value itself.

    Steps too small for bfloat16's 8 bits then add up instead of vanishing. The random bits are a hash of seed, table,
    row and column, so they depend on nothing else.
    """
    columns = torch.arange(values.shape[1], device=values.device)
    key = mix(mix(mix(torch.tensor(seed, device=values.device)) + table) + rows)  # (U,)
    random = mix(key[:, None] + columns) & 0xFFFF
    rounded = (values.view(torch.int32) + random.int()) & ~0xFFFF
    return torch.where(values.isnan(), values, rounded.view(torch.float32))


def mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 on the low 32 bits of int64 numbers."""
    x = x & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::advise_huge_pages", "(Tensor tensor) -> ()")


@register_fake("dlrm::advise_huge_pages")
@reference("dlrm::advise_huge_pages")
def _(tensor) -> None:
    """Asks for huge pages under a large tensor, where they exist: random rows then cost no walk of the page table."""


class SparseOptimizer(torch.optim.Optimizer):
    """Updates the tables of an `EmbeddingBags` from the gradient of the output it pooled last."""

    def __init__(self, embeddings: EmbeddingBags, **defaults: float):
        super().__init__(embeddings.weights, defaults)
        self._embeddings = embeddings

    @torch.no_grad()
    def step(self) -> None:
        lookups = self._embeddings.lookups
        grouped = (lookups.unique_indices, lookups.output_rows, lookups.output_row_offsets, lookups.unique_count)
        self.update(self._embeddings.weights, self._embeddings.pooled.grad, grouped)

    def update(self, weights: list[Tensor], grad_pooled: Tensor, grouped: tuple[Tensor, ...]) -> None:
        raise NotImplementedError


class SparseAdagrad(SparseOptimizer):
    """`sparse_adagrad_`; `state[weight]["sum"]` is the moment, (rows, D) float32."""

    def __init__(self, embeddings: EmbeddingBags, lr: float, eps: float = 1e-10):
        super().__init__(embeddings, lr=lr, eps=eps)
        for weight in embeddings.weights:
            moment = self.state[weight]["sum"] = torch.zeros_like(weight, dtype=torch.float32)
            torch.ops.dlrm.advise_huge_pages(moment)

    def update(self, weights: list[Tensor], grad_pooled: Tensor, grouped: tuple[Tensor, ...]) -> None:
        moments = [self.state[weight]["sum"] for weight in weights]
        group = self.param_groups[0]
        torch.ops.dlrm.sparse_adagrad_(weights, moments, grad_pooled, *grouped, group["lr"], group["eps"])


class SparseSGD(SparseOptimizer):
    """`sparse_sgd_`."""

    def __init__(self, embeddings: EmbeddingBags, lr: float):
        super().__init__(embeddings, lr=lr)

    def update(self, weights: list[Tensor], grad_pooled: Tensor, grouped: tuple[Tensor, ...]) -> None:
        torch.ops.dlrm.sparse_sgd_(weights, grad_pooled, *grouped, self.param_groups[0]["lr"])


# ---------------------------------------------------------------------------------------------------------------------
# Batches on the device
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class PreparedBatch:
    """A batch in tensors that keep their sizes and addresses, on the device."""

    dense: Tensor  # (B, dense features) float32
    target: Tensor  # (B, 1) float32
    lookups: PreparedLookups

    @classmethod
    def allocate(
        cls, num_tables: int, batch_size: int, max_lookups: int, num_dense: int, device: torch.device, pinned: bool
    ) -> PreparedBatch:
        """Empty tensors; `max_lookups` is N, the most lookups in one table."""
        settings = {"device": device, "pin_memory": pinned}
        lookups = PreparedLookups.shapes(num_tables, batch_size, max_lookups)
        return cls(
            torch.empty(batch_size, num_dense, **settings),
            torch.empty(batch_size, 1, **settings),
            PreparedLookups(*(torch.zeros(shape, dtype=torch.int32, **settings) for shape in lookups)),
        )

    def copy_(self, other: PreparedBatch) -> None:
        pairs = zip([self.dense, self.target, *self.lookups.fields()],
                    [other.dense, other.target, *other.lookups.fields()], strict=True)  # fmt: skip
        for mine, theirs in pairs:
            mine.copy_(theirs)


class BatchPreprocessor:
    """Host preprocessing: a raw batch -> the prepared batch on the device, always the same tensors."""

    def __init__(self, data: RandomData, device: torch.device):
        sizes = (
            len(data.table_rows),
            data.batch_size,
            data.batch_size * data.max_lookups_per_bag,
            data.num_dense_features,
        )
        on_host = device.type == "cpu"
        self._table_rows = data.table_rows
        self._host = PreparedBatch.allocate(*sizes, torch.device("cpu"), pinned=not on_host)
        self._device = self._host if on_host else PreparedBatch.allocate(*sizes, device, pinned=False)
        self.batches = self.lookups = self.unique_rows = 0  # so far, over all tables

    def __call__(self, batch: Batch) -> PreparedBatch:
        """RunError for lookups outside their table."""
        self._host.dense.copy_(batch.dense)
        self._host.target.copy_(batch.target)
        try:
            torch.ops.dlrm.coalesce_lookups(
                batch.indices, batch.offsets, self._table_rows, *self._host.lookups.fields()
            )
        except (IndexError, ValueError) as error:
            raise RunError(str(error)) from error
        self.batches += 1
        self.lookups += int(self._host.lookups.valid_count_fwd[:, 1].sum())
        self.unique_rows += int(self._host.lookups.unique_count.sum())
        if self._device is not self._host:
            self._device.copy_(self._host)
        return self._device


# ---------------------------------------------------------------------------------------------------------------------
# Back ends: all that differs from device to device
# ---------------------------------------------------------------------------------------------------------------------


class Backend:
    """What the training loop asks of a device. This class is right for the CPU, where work ends when a call returns."""

    fused_optimizers = True  # torch.optim's fused=True, one pass over all parameters

    def __init__(self, device: torch.device, options: Options):
        self.device, self.mode, self.data_type = device, options.mode, options.data_type
        self.notes = []  # what the user should know before the run
        if options.device == "auto":
            self.notes.append("No Gaudi here (habana-torch-plugin is not installed): running on the CPU.")
        if options.mode == "lazy":
            self.notes.append("Lazy mode is a Gaudi's; here it equals eager mode.")

    @property
    def name(self) -> str:
        """The model of the device."""
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.data_type == "bf16")

    def compile(self, function: Callable) -> Callable:
        """`function` as `--mode` wants it; UsageError where that can't be."""
        if self.mode != "compile":
            return function
        if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
            raise UsageError("--mode=compile needs a C++ compiler; install g++, or use --mode=eager")
        return torch.compile(function, dynamic=False)

    def dense_optimizer(self, parameters: Iterable[nn.Parameter], options: Options) -> torch.optim.Optimizer:
        optimizers = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
        return optimizers[options.optimizer](parameters, lr=options.learning_rate, fused=self.fused_optimizers)

    def sparse_optimizer(self, embeddings: EmbeddingBags, options: Options) -> SparseOptimizer:
        optimizers = {"sgd": SparseSGD, "adagrad": SparseAdagrad}
        return optimizers[options.optimizer](embeddings, lr=options.learning_rate)

    def mark_step(self) -> None:
        """Ends the recording of a graph, where a device records one."""

    def synchronize(self) -> None:
        """Waits until the device has done all it was given."""

    def timestamp(self):
        """A moment in the device's work, for `elapsed_ms`."""
        return time.perf_counter()

    def elapsed_ms(self, start, end) -> float:
        """Milliseconds from one `timestamp` to a later one; call after `synchronize`."""
        return 1000 * (end - start)

    def memory_limit(self) -> int:
        """Bytes that a new run can take."""
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(OSError), open("/proc/meminfo") as meminfo:
            available = dict(line.split(":") for line in meminfo)["MemAvailable"]
            limit = min(limit, 1024 * int(available.split()[0]))
        with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as container:
            limit = min(limit, int(container.read()))
        return limit

    def memory_in_use(self) -> tuple[int, int]:
        """Bytes in use now, and at most so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        with contextlib.suppress(OSError), open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), peak
        return peak, peak


class CudaBackend(Backend):
    """A CUDA GPU. The ops run as their references, in plain torch."""

    fused_optimizers = False

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def timestamp(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start, end) -> float:
        return start.elapsed_time(end)

    def memory_limit(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def memory_in_use(self) -> tuple[int, int]:
        return torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)


def select_backend(options: Options) -> Backend:
    """The back end that `--device` names; UsageError, saying what to do, where that device is not to be had."""
    if options.device == "hpu" and importlib.util.find_spec("habana_frameworks") is None:
        raise UsageError(
            "--device=hpu needs the Gaudi plugin (habana-torch-plugin), which is not installed; use Intel's Gaudi "
            "container or installer, or --device=cpu"
        )
    if options.device == "hpu":
        raise UsageError("--device=hpu is not available yet; use --device=cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch finds no CUDA GPU here; use --device=cpu")
    if options.device == "cuda":
        return CudaBackend(torch.device("cuda", 0), options)
    return Backend(torch.device("cpu"), options)
