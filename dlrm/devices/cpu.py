"""The CPU, where work ends when a call returns."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dlrm.devices.backend import Backend
from dlrm.kernels.cross import CrossLayer, CrossNet, FusedCrossNet
from dlrm.kernels.dense import DenseLayer, FusedDenseAdagrad, FusedDenseSGD, FusedLayer, PlainLayer
from dlrm.kernels.embedding import EmbeddingBags, SparseAdagrad, SparseRowwiseAdagrad, SparseSGD
from dlrm.kernels.gemm import bf16_products, fp32_products, multiplies_bf16
from dlrm.kernels.interaction import CatInteraction, FusedDotInteraction
from dlrm.options import Options
from dlrm.system import memory


class CpuBackend(Backend):
    """The CPU, on the kernels in `dlrm/kernels/csrc/`, or on plain torch where they cannot be built."""

    wide_dtype = torch.float64
    has_own_memory = False
    times_phases = True
    process_group = "gloo"
    embedding_bags = EmbeddingBags
    sparse_optimizers: ClassVar = {"sgd": SparseSGD, "adagrad": SparseAdagrad, "rwsadagrad": SparseRowwiseAdagrad}
    dense_optimizers: ClassVar = {
        "sgd": FusedDenseSGD,
        "adagrad": FusedDenseAdagrad,
        "rwsadagrad": FusedDenseAdagrad,  # only tables have rows
    }
    interactions: ClassVar = {"cat": CatInteraction, "dcn": CatInteraction, "dot": FusedDotInteraction}

    def __init__(self, options: Options, why_no_gaudi: str = ""):
        """`why_no_gaudi` says why `--device=auto` has not found a Gaudi."""
        super().__init__(torch.device("cpu"), options)
        self._gemm, self._why_no_gaudi = options.gemm, why_no_gaudi
        self._shadow_type = None
        if options.data_type == "bf16":
            self._shadow_type = torch.bfloat16 if multiplies_bf16() else torch.float32
        self._samples_per_rank = options.samples_per_step // options.world_size
        memory.keep_freed_memory()

    def notes(self, options: Options) -> list[str]:
        notes = []
        if self._why_no_gaudi:
            notes.append(f"No Gaudi here ({self._why_no_gaudi}): running on the CPU.")
        if options.mode == "lazy":
            notes.append("Lazy mode is a Gaudi's; here it equals eager mode.")
        if self._shadow_type == torch.float32:
            notes.append("This processor has no bfloat16 products: layers multiply rounded numbers in fp32.")
        return notes

    @property
    def arithmetic(self) -> str:
        return "bf16 rounded, fp32 multiplied" if self._shadow_type == torch.float32 else self.data_type

    @property
    def name(self) -> str:
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    def layer(self, weight: Tensor, bias: Tensor | None, relu: bool) -> DenseLayer:
        if self.mode == "compile":
            return PlainLayer(weight, bias, relu, self._shadow_type)  # the compiler fuses by itself
        outputs, inputs = weight.shape
        if self._shadow_type == torch.bfloat16:
            products = bf16_products()
        else:
            products = fp32_products(self._gemm, self._samples_per_rank, inputs, outputs)
        return FusedLayer(weight, bias, relu, self._shadow_type, products)

    def cross_net(self, layers: Iterable[CrossLayer]) -> CrossNet:
        return CrossNet(layers) if self.mode == "compile" else FusedCrossNet(layers)

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # the layers have bfloat16 weights themselves

    def dense_optimizer(self, layers: Sequence[DenseLayer], options: Options) -> torch.optim.Optimizer:
        return self.dense_optimizers[options.optimizer](
            layers, lr=self.learning_rate(options), **options.optimizer_settings
        )

    def learning_rate(self, options: Options) -> float:
        return options.learning_rate

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, exact: float, on_device: Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr"] = exact

    def synchronize(self) -> None:
        pass

    def timestamp(self) -> float:
        return time.perf_counter()

    def wait_for(self, moment: float) -> None:
        pass

    def elapsed_ms(self, start: float, end: float) -> float:
        return 1000 * (end - start)

    def memory_limit(self) -> int:
        return memory.free_memory()

    def memory_in_use(self) -> tuple[int, int]:
        return memory.memory_in_use()
