"""The dense optimizers on the 103 M weights of the medium model, against those of torch.optim.

The bound reads and writes as many bytes as Adagrad has to, in one stream.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.measure import Result, against, median_ms
from dlrm.kernels.dense import FusedDenseAdagrad, FusedDenseSGD, PlainLayer
from dlrm.kernels.native import load_kernels

WIDTHS = [*pairwise((1024, 1024, 1024, 64)), *pairwise((128, *[4096] * 7, 1))]


def measure(rounds: int) -> list[Result]:
    load_kernels()
    return measure_fp32("sgd", FusedDenseSGD, torch.optim.SGD, rounds) + measure_adagrad(rounds)


def layers(shadows: bool = False) -> list[PlainLayer]:
    made = [PlainLayer(torch.randn(n, m), torch.randn(n), relu=True, shadows=shadows) for m, n in WIDTHS]
    for leaf in leaves(made):
        leaf.grad = torch.randn_like(leaf)
    return made


def leaves(of: list[PlainLayer]) -> list[Tensor]:
    return [leaf for layer in of for leaf in layer.leaves]


def measure_fp32(name: str, ours: type, theirs: type, rounds: int) -> list[Result]:
    model = layers()
    candidates = {"ours": ours(model, lr=1e-3).step} | {
        f"torch.optim, {how}": theirs(
            leaves(model), lr=1e-3, **{how: True} if how != "loop" else {"foreach": False}
        ).step
        for how in ("fused", "foreach", "loop")
    }
    return against(f"dense {name}, fp32, 103 M weights", "ours", median_ms(candidates, rounds))


def measure_adagrad(rounds: int) -> list[Result]:
    """fp32, then bf16 gradients with shadows, which torch.optim does not have."""
    optimizer = FusedDenseAdagrad(layers(shadows=True), lr=1e-3)
    weights = sum(n * m + n for m, n in WIDTHS)
    stream = torch.zeros(
        20 * weights // 8
    )  # 20 bytes a weight are read or written, of which this stream does 8 a float
    times = median_ms({"ours": optimizer.step, "bound: memory traffic": lambda: stream.add_(1)}, rounds)
    return measure_fp32("adagrad", FusedDenseAdagrad, torch.optim.Adagrad, rounds) + against(
        "dense adagrad, bf16 with fp32 masters, 103 M weights", "ours", times
    )
