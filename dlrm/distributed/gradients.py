"""The gradients of the MLPs, made those of the batch of all ranks."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
import torch.distributed as dist

from dlrm.kernels.dense import DenseLayer


class DenseGradients(abc.ABC):
    """What happens to the gradients of the MLPs between the backward pass and the optimizer."""

    @abc.abstractmethod
    def start_top(self) -> None:
        """Is called in the backward pass, when the gradients of the top MLP are there."""

    @abc.abstractmethod
    def start_bottom(self) -> None:
        """Is called after the backward pass."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Is called before the optimizer reads the gradients."""


class OwnGradients(DenseGradients):
    """The gradients of one rank, which has the whole batch."""

    def start_top(self) -> None:
        pass

    def start_bottom(self) -> None:
        pass

    def finish(self) -> None:
        pass


class MeanGradients(DenseGradients):
    """Means over the ranks. The all-reduce of the top MLP runs during the backward pass of the bottom MLP, and that of
    the bottom MLP while the tables are updated."""

    def __init__(self, top: Sequence[DenseLayer], bottom: Sequence[DenseLayer], ranks: int):
        self._top, self._bottom = Bucket(top, ranks), Bucket(bottom, ranks)

    def start_top(self) -> None:
        self._top.start()

    def start_bottom(self) -> None:
        self._bottom.start()

    def finish(self) -> None:
        self._top.finish()
        self._bottom.finish()


class Bucket:
    """The mean over ranks of the gradients of some layers, in one all-reduce.

    Gradients that keep their memory are made parts of one tensor, once and for all; others are copied into one. Sums
    are float32: in bfloat16, each further rank would round them once more.
    """

    def __init__(self, layers: Sequence[DenseLayer], ranks: int):
        self._layers, self._ranks = layers, ranks
        self._leaves = [leaf for layer in layers for leaf in layer.leaves]
        self._stay = all(layer.gradients_stay for layer in layers)
        if self._stay and layers:
            self._flat = self._leaves[0].new_zeros(sum(leaf.numel() for leaf in self._leaves))
            self._hand_out()

    def start(self) -> None:
        """Starts the all-reduce, unless there are no layers."""
        if not self._layers:
            return
        if not self._stay:
            self._flat = torch.cat([leaf.grad.flatten() for leaf in self._leaves])
        self._sum = self._flat.float()  # the same tensor, if it is float32 already
        self._work = dist.all_reduce(self._sum, async_op=True)

    def finish(self) -> None:
        """Waits for the all-reduce, and leaves the means in the layers' gradients."""
        if not self._layers:
            return
        self._work.wait()
        self._flat.copy_(self._sum.div_(self._ranks))
        if not self._stay:
            self._hand_out()

    def _hand_out(self) -> None:
        """Makes each gradient a part of the one tensor."""
        parts = iter(self._flat.split([leaf.numel() for leaf in self._leaves]))
        for layer in self._layers:
            layer.gradients = [next(parts).view_as(leaf) for leaf in layer.leaves]
