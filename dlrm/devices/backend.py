"""What the training loop asks of a device. A new device is one more subclass; the loop never asks which one it has."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlrm.errors import UsageError
from dlrm.kernels import ops  # noqa: F401 - registers the ops
from dlrm.kernels.cross import CrossLayer, CrossNet
from dlrm.kernels.dense import DenseLayer
from dlrm.kernels.embedding import EmbeddingBags, LearningRate, SparseOptimizer
from dlrm.kernels.native import BuildError, find_compiler, load_kernels
from dlrm.options import Options


class Peaks(NamedTuple):
    """What a device can do at most, by its maker."""

    bytes_per_second: float  # that its memory delivers
    bf16_flop_per_second: float  # of matrix products; a multiplication and an addition are two


class Backend(abc.ABC):
    """A device, the modules and optimizers that run on it, and how to time it and to wait for it."""

    wide_dtype: torch.dtype  # of sums that the reference script takes in float64
    has_own_memory: bool  # beside the host's; batches are then copied to it
    times_phases: bool  # whether time stamps are taken within an iteration
    process_group: str  # the backend of torch.distributed for the device's tensors
    collectives_time_out: bool = True  # whether that backend ends a collective that takes too long
    embedding_bags: type[EmbeddingBags]
    sparse_optimizers: dict[str, type[SparseOptimizer]]  # by the name that --optimizer has for them
    dense_optimizers: dict[str, type[torch.optim.Optimizer]]
    interactions: dict[str, type[nn.Module]]  # by the name that --arch-interaction-op has for them
    coalesce_lookups: Callable[..., None] = staticmethod(torch.ops.dlrm.coalesce_lookups)

    def __init__(self, device: torch.device, options: Options):
        self.device, self.mode, self.data_type = device, options.mode, options.data_type
        self.kernels = load_kernels()  # of the host: native, or reference and why
        self.step_end: Any = None  # what `end_step` returned last

    def notes(self, options: Options) -> list[str]:
        """Returns lines that the user should read before the run."""
        return []

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The model of the device."""

    @property
    def peaks(self) -> Peaks | None:
        """What the device can do at most, or None where that is not known."""
        return None

    @property
    def arithmetic(self) -> str:
        """The type that layers round to, and how they multiply if that is not plain from the type."""
        return self.data_type

    # -- Modules and optimizers

    @abc.abstractmethod
    def layer(self, weight: Tensor, bias: Tensor | None, relu: bool) -> DenseLayer:
        """Returns a fully connected layer; `weight`: (outputs, inputs), `bias`: (outputs,) or None, float32."""

    def cross_net(self, layers: Iterable[CrossLayer]) -> CrossNet:
        """Returns cross layers one after the other; they consist of layers that `layer` returned."""
        return CrossNet(layers)

    @abc.abstractmethod
    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns the context in which the forward pass runs in the type that `--data_type` names."""

    def compile(self, function: Callable) -> Callable:
        """Returns `function` as `--mode` wants it, compiled by torch's own compiler unless a device has another one.

        Raises UsageError if it cannot be compiled here.
        """
        if self.mode != "compile":
            return function
        try:
            find_compiler()
        except BuildError as error:
            raise UsageError(f"--mode=compile: {error}; install g++, or use --mode=eager") from None
        return torch.compile(function, dynamic=False, fullgraph=True)

    @abc.abstractmethod
    def dense_optimizer(self, layers: Sequence[DenseLayer], options: Options) -> torch.optim.Optimizer:
        """Returns the optimizer of the layers' weights and biases."""

    def sparse_optimizer(self, embeddings: EmbeddingBags, options: Options) -> SparseOptimizer:
        """Returns the optimizer of the tables."""
        optimizers = embeddings.optimizers or self.sparse_optimizers
        return optimizers[options.optimizer](embeddings, lr=self.learning_rate(options), **options.optimizer_settings)

    @abc.abstractmethod
    def learning_rate(self, options: Options) -> LearningRate:
        """Returns the base learning rate in the form that the optimizers take."""

    @abc.abstractmethod
    def set_learning_rate(self, optimizer: torch.optim.Optimizer, exact: float, on_device: Tensor) -> None:
        """Gives all parameters of the optimizer another learning rate: a number, or the same in float32, (1,), on the
        device."""

    # -- Steps, waiting and time

    def replace_step_by_recorded(self, step: Callable) -> Callable:
        """Returns a function to call in place of `step`, again and again with the same tensors.

        It returns what `step` returns. The next call may overwrite the tensors in it.
        """
        return step

    def mark_step(self) -> None:  # noqa: B027 - most devices gather no graph
        """Ends the graph of a step, on devices that gather one."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Waits until the device has done all work that it was given."""

    def end_step(self) -> Any:
        """Ends the graph of a step, on devices that gather one. Returns the `timestamp` of its end."""
        self.mark_step()
        self.step_end = self.timestamp()
        return self.step_end

    @abc.abstractmethod
    def timestamp(self) -> Any:
        """Returns a moment in the device's work: the end of all work that it was given before this call."""

    @abc.abstractmethod
    def wait_for(self, moment: Any) -> None:
        """Waits until the device's work has reached a `timestamp`."""

    @abc.abstractmethod
    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Returns the milliseconds from one `timestamp` to a later one. Wait for the later one first."""

    # -- Memory

    def host_memory(self, count: int, dtype: torch.dtype) -> Tensor:
        """Returns so many zeros on the host, from where copies to the device wait for nothing."""
        return torch.zeros(count, dtype=dtype)

    def device_memory(self, count: int, dtype: torch.dtype) -> Tensor:
        """Returns so many zeros on the device."""
        return torch.zeros(count, dtype=dtype, device=self.device)

    def num_batches_on_device(self, num_bytes: int) -> int:
        """Returns for how many batches, of so many bytes each, the device has memory of its own.

        With more than one, a batch can be copied to the device while it works on another.
        """
        return 1 if self.has_own_memory else 0

    @abc.abstractmethod
    def memory_limit(self) -> int:
        """Returns the number of bytes that a new run can take."""

    @abc.abstractmethod
    def memory_in_use(self) -> tuple[int, int]:
        """Returns the number of bytes in use now, and the largest number so far."""

    # -- What only some devices have

    def prepare_collectives(self) -> None:  # noqa: B027 - torch has those of most devices
        """Registers the device's backend of torch.distributed, where it is not a part of torch."""

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Returns what the device's software counts, by its names; nothing on devices that count nothing."""
        return {}
