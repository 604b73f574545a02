"""What devices have in common that work beside the host, and for which this project has no kernels of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dlrm.devices.backend import Backend
from dlrm.errors import UsageError
from dlrm.kernels.dense import DenseLayer, ForeachAdagrad, ForeachSGD, PlainLayer
from dlrm.kernels.interaction import CatInteraction, NativeDotInteraction
from dlrm.kernels.static_embedding import StaticAdagrad, StaticEmbeddingBags, StaticRowwiseAdagrad, StaticSGD
from dlrm.options import Options


class AcceleratorBackend(Backend):
    """A device that runs native operators of static shapes, and bf16 by autocast.

    Learning rates are tensors of one element, which come to the device with the batch: a recorded or compiled step sees
    a change, and nothing waits for a copy of its own.
    """

    has_own_memory = True
    embedding_bags = StaticEmbeddingBags
    sparse_optimizers: ClassVar = {"sgd": StaticSGD, "adagrad": StaticAdagrad, "rwsadagrad": StaticRowwiseAdagrad}
    dense_optimizers: ClassVar = {"sgd": ForeachSGD, "adagrad": ForeachAdagrad, "rwsadagrad": ForeachAdagrad}
    interactions: ClassVar = {"cat": CatInteraction, "dcn": CatInteraction, "dot": NativeDotInteraction}

    def __init__(self, device: torch.device, options: Options):
        if options.special_tables:
            raise UsageError(f"{options.special_tables} works on the CPU alone; use --device=cpu")
        if options.table_data_type != "fp32":
            raise UsageError("--table-data-type=bf16 works on the CPU alone; use --device=cpu")
        super().__init__(device, options)

    def layer(self, weight: Tensor, bias: Tensor | None, relu: bool) -> DenseLayer:
        return PlainLayer(weight, bias, relu)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.data_type == "bf16")

    def dense_optimizer(self, layers: Sequence[DenseLayer], options: Options) -> torch.optim.Optimizer:
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        return self.dense_optimizers[options.optimizer](
            parameters, lr=self.learning_rate(options), **options.optimizer_settings
        )

    def learning_rate(self, options: Options) -> Tensor:
        return torch.full((1,), options.learning_rate, device=self.device)

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, exact: float, on_device: Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr"] = on_device

    def host_memory(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, pin_memory=True)
