"""A process that does a training step of IPEX's embedding bags for each line that it reads.

python ipex_step.py MODULE TABLES ROWS DIM BATCH LOOKUPS

The first line that it prints is the largest error of one update at a learning rate of 1, with random gradients. Then it
answers each line with another one. It runs in a Python that has torch and intel-extension-for-pytorch, and needs
nothing of this project.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import intel_extension_for_pytorch as ipex
import torch
from torch import Tensor, nn

BATCHES = 6
FIRST_UPDATES = {  # of a gradient, at a learning rate of 1 and with moments of 0
    "MergedEmbeddingBagWithAdaGrad": torch.sign,
    "MergedEmbeddingBagWithSGD": torch.clone,
}


def main(module: str, *numbers: str) -> None:
    tables, rows, dim, batch, lookups = map(int, numbers)
    merge = getattr(ipex.nn.modules, module).from_embeddingbag_list
    inputs = [random_batch(tables, rows, batch, lookups) for _ in range(BATCHES)]
    gradients = [torch.randn(batch, dim) for _ in range(tables)]

    bags = [new_bag(rows, dim) for _ in range(tables)]
    print(largest_error(merge, new_bag(rows, dim), FIRST_UPDATES[module], inputs[0], gradients[0]), flush=True)
    merged = merge(bags, lr=0.01)
    for _, (indices, offsets) in zip(sys.stdin, itertools.cycle(inputs), strict=False):
        torch.autograd.backward(merged(indices, offsets), gradients)
        print("done", flush=True)


def new_bag(rows: int, dim: int) -> nn.EmbeddingBag:
    return nn.EmbeddingBag(rows, dim, mode="sum", sparse=True, include_last_offset=True)


def random_batch(tables: int, rows: int, batch: int, lookups: int) -> tuple[list, list]:
    indices = [torch.randint(rows, (batch * lookups,)) for _ in range(tables)]
    return indices, [torch.arange(0, batch * lookups + 1, lookups)] * tables


def largest_error(merge, bag: nn.EmbeddingBag, update: Callable, batch: tuple[list, list], gradient: Tensor) -> float:
    """Returns how far rows are from what one update should make of them."""
    indices, offsets = batch[0][0], batch[1][0]
    summed = torch.zeros_like(bag.weight).index_add_(0, indices, gradient.repeat_interleave(offsets.diff(), 0))
    expected = bag.weight.detach() - update(summed)
    merged = merge([bag], lr=1.0)
    torch.autograd.backward(merged([indices], [offsets]), [gradient])
    return (merged.weights[0] - expected).abs().max().item()


if __name__ == "__main__":
    main(*sys.argv[1:])
