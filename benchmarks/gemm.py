"""Matrix products of fp32 layers: our kernel beside torch's default, oneDNN, and the library that numpy has.

`--gemm=auto` chooses the fastest but numpy's. A further peer is oneDNN on a prepacked weight. Its time leaves out the
packing, which training would have to repeat in each step because the weights change.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Result, against, median_ms
from dlrm.kernels.gemm import PRODUCTS
from dlrm.kernels.native import load_kernels
from dlrm.system.memory import keep_freed_memory

SHAPES = ((512, 1024, 1024), (512, 128, 4096), (512, 4096, 4096), (2048, 479, 1024), (2048, 1024, 1024))  # B, in, out


def measure(rounds: int) -> list[Result]:
    load_kernels()
    keep_freed_memory()  # for all candidates alike
    return [result for shape in SHAPES for result in measure_shape(*shape, rounds)]


def measure_shape(batch: int, inputs: int, outputs: int, rounds: int) -> list[Result]:
    x, weight = torch.randn(batch, inputs), torch.randn(outputs, inputs)
    bias, grad = torch.randn(outputs), torch.randn(batch, outputs)
    native, default, onednn = PRODUCTS["native"], PRODUCTS["default"], PRODUCTS["onednn"]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
    out, transposed_grad = torch.empty(outputs, inputs), grad.t()
    products = {
        "output": {
            "ours": lambda: native.output(x, weight, bias, True),
            "torch's default": lambda: default.output(x, weight, bias, True),
            "numpy": lambda: by_numpy(x, weight.t(), torch.empty(batch, outputs)).add_(bias).relu_(),
            "oneDNN": lambda: onednn.output(x, weight, bias, True),
            "oneDNN, prepacked": lambda: onednn.output(x, packed, bias, True),
        },
        "gradient of x": {
            "ours": lambda: native.input_gradient(grad, weight),
            "torch's default": lambda: default.input_gradient(grad, weight),
            "numpy": lambda: by_numpy(grad, weight, torch.empty(batch, inputs)),
            "oneDNN": lambda: onednn.input_gradient(grad, weight),
        },
        "gradient of W": {
            "ours": lambda: native.weight_gradient(transposed_grad, x, out),
            "torch's default": lambda: default.weight_gradient(transposed_grad, x, out),
            "numpy": lambda: by_numpy(transposed_grad, x, out),
            "oneDNN": lambda: onednn.weight_gradient(transposed_grad, x, out),
        },
    }
    results = []
    for name, candidates in products.items():
        times = median_ms(candidates, 4 * rounds)
        results += against(f"fp32 {name}, {batch} x {inputs} -> {outputs}", "ours", times)
    return results


def by_numpy(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Writes left right to `out` with numpy's library, which is OpenBLAS in the builds of PyPI."""
    np.matmul(left.numpy(), right.numpy(), out=out.numpy())
    return out
