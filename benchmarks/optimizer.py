"""The dense optimizers on the 103 M weights of the medium model, beside those of torch.optim.

The bound reads and writes as many bytes as Adagrad has to, in address order.
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


def layers_with_gradients(shadow_type: torch.dtype | None = None) -> list[PlainLayer]:
    layers = [PlainLayer(torch.randn(n, m), torch.randn(n), relu=True, shadow_type=shadow_type) for m, n in WIDTHS]
    for leaf in leaves(layers):
        leaf.grad = torch.randn_like(leaf)
    return layers


def leaves(layers: list[PlainLayer]) -> list[Tensor]:
    return [leaf for layer in layers for leaf in layer.leaves]


def measure_fp32(name: str, ours: type, theirs: type, rounds: int) -> list[Result]:
    layers = layers_with_gradients()
    candidates = {"ours": ours(layers, lr=1e-3).step}
    for how, setting in {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}.items():
        candidates[f"torch.optim, {how}"] = theirs(leaves(layers), lr=1e-3, **setting).step
    return against(f"dense {name}, fp32, 103 M weights", "ours", median_ms(candidates, rounds))


def measure_adagrad(rounds: int) -> list[Result]:
    """Measures Adagrad in fp32, then with bf16 gradients and bf16 copies of the weights, which torch.optim lacks."""
    optimizer = FusedDenseAdagrad(layers_with_gradients(torch.bfloat16), lr=1e-3)
    weights = sum(n * m + n for m, n in WIDTHS)
    # Adagrad reads or writes 20 bytes per weight. Adding to the stream reads and writes 8 bytes per float.
    stream = torch.zeros(20 * weights // 8)
    times = median_ms({"ours": optimizer.step, "bound: memory traffic": lambda: stream.add_(1)}, rounds)
    return measure_fp32("adagrad", FusedDenseAdagrad, torch.optim.Adagrad, rounds) + against(
        "dense adagrad, bf16 with fp32 masters, 103 M weights", "ours", times
    )
