"""The dense half of a training step on the CPU: ours, the matrix products alone, and plain PyTorch.

    python benchmarks/step_dense.py LIBRARY     the built csrc/, a shared library

Alternating rounds in one process, medians in milliseconds; a step is forward, backward and Adagrad.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from csrc_dense_reference import Layer
from torch import Tensor, nn
from torch.nn import functional

# batch, bottom MLP, features of the interaction that come from tables, top MLP
SHAPES = {
    "medium": (512, (1024, 1024, 1024, 64), 64, (128, *[4096] * 7, 1)),
    "criteo": (2048, (13, 512, 256, 64), 415, (479, 1024, 1024, 512, 256, 1)),
}
LR, EPS = 1e-3, 1e-10


class Step:
    """The two MLPs, the tables' part of the interaction being constant; master weights in float32."""

    def __init__(self, shape: str, data_type: torch.dtype):
        self.data_type = data_type
        batch, self.bottom, from_tables, self.top = SHAPES[shape]
        widths = [*pairwise(self.bottom), *pairwise(self.top)]
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in widths)
        self.dense, self.from_tables = torch.rand(batch, self.bottom[0]), torch.randn(batch, from_tables)
        self.target = torch.randint(0, 2, (batch, 1)).float()
        self.masters = [parameter.detach().clone() for parameter in self.layers.parameters()]
        self.moments = [torch.zeros_like(master) for master in self.masters]

    def loss(self, apply: Callable[[nn.Linear, Tensor, bool], Tensor], dense: Tensor, from_tables: Tensor) -> Tensor:
        bottom = len(self.bottom) - 1
        x = dense
        for layer in self.layers[:bottom]:
            x = apply(layer, x, True)
        x = torch.cat([x, from_tables.to(x.dtype)], dim=1)
        for layer in self.layers[bottom:-1]:
            x = apply(layer, x, True)
        return functional.binary_cross_entropy(torch.sigmoid(apply(self.layers[-1], x, False).float()), self.target)


class Ours(Step):
    """Weights of the data type of training, gradients that keep their memory, one pass of the optimizer."""

    def __init__(self, shape: str, data_type: torch.dtype):
        super().__init__(shape, data_type)
        self.layers.to(data_type)
        self.parameters = list(self.layers.parameters())
        self.shadows = [p.detach() for p in self.parameters] if data_type == torch.bfloat16 else []
        if not self.shadows:
            self.masters = [p.detach() for p in self.parameters]
        self.gradients = {
            layer: (torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)) for layer in self.layers
        }

    def apply(self, layer: nn.Linear, x: Tensor, relu: bool) -> Tensor:
        return Layer.apply(x, layer.weight, layer.bias, self.gradients[layer], relu)

    def forward_backward(self) -> None:
        self.loss(self.apply, self.dense.to(self.data_type), self.from_tables).backward()

    def __call__(self) -> None:
        self.forward_backward()
        gradients = [gradient for pair in self.gradients.values() for gradient in pair]
        torch.ops.dlrm.dense_adagrad_(self.masters, self.moments, gradients, self.shadows, LR, EPS)


class Plain(Step):
    """nn.Linear under autocast and torch's Adagrad."""

    def __init__(self, shape: str, data_type: torch.dtype, fused: bool):
        super().__init__(shape, data_type)
        self.optimizer = torch.optim.Adagrad(self.layers.parameters(), lr=LR, fused=fused)

    def apply(self, layer: nn.Linear, x: Tensor, relu: bool) -> Tensor:
        return layer(x).relu() if relu else layer(x)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.data_type == torch.bfloat16):
            loss = self.loss(self.apply, self.dense, self.from_tables)
        loss.backward()
        self.optimizer.step()


class Products(Step):
    """The matrix products of a step alone, into tensors that exist; with the gradient's transpose given, or not."""

    def __init__(self, shape: str, data_type: torch.dtype, transposed: bool):
        super().__init__(shape, data_type)
        batch, self.calls = len(self.dense), []

        def new(*size: int) -> Tensor:
            return torch.randn(size).to(data_type)

        for position, layer in enumerate(self.layers):
            n, m = layer.weight.shape
            x, weight, grad, columns = new(batch, m), new(n, m), new(batch, n), new(n, batch)
            self.calls.append((x, weight.t(), new(batch, n)))
            self.calls.append((columns if transposed else grad.t(), x, new(n, m)))
            if position:
                self.calls.append((grad, weight, new(batch, m)))

    def __call__(self) -> None:
        for left, right, out in self.calls:
            torch.mm(left, right, out=out)


def candidates(shape: str, data_type: torch.dtype) -> dict[str, Callable[[], None]]:
    ours = Ours(shape, data_type)
    return {
        "products alone": Products(shape, data_type, transposed=False),
        "products alone, gradient transposed": Products(shape, data_type, transposed=True),
        "ours, forward and backward": ours.forward_backward,
        "ours": ours,
        "nn.Linear, autocast, Adagrad(fused=True)": Plain(shape, data_type, fused=True),
        "nn.Linear, autocast, Adagrad": Plain(shape, data_type, fused=False),
    }


def milliseconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def main(library: str) -> None:
    torch.ops.load_library(library)
    for shape in SHAPES:
        for data_type in (torch.bfloat16, torch.float32):
            steps = candidates(shape, data_type)
            rounds = [{name: milliseconds(step) for name, step in steps.items()} for _ in range(9)][2:]
            medians = {name: statistics.median(times[name] for times in rounds) for name in steps}
            print(f"{shape}, {data_type}, {torch.get_num_threads()} threads")
            for name, median in medians.items():
                print(f"  {name:42} {median:9.2f} ms {median / medians['ours']:6.2f} x ours")


if __name__ == "__main__":
    main(*sys.argv[1:])
