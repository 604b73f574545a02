"""Matrix products of fp32 layers: torch's default, which counts as ours, beside oneDNN. `--gemm` chooses one of them.

A further peer is oneDNN on a prepacked weight. Its time leaves out the packing, which training would have to repeat in
each step because the weights change.
"""

from __future__ import annotations

import torch

from benchmarks.measure import Result, against, median_ms
from dlrm.kernels.gemm import PRODUCTS

SHAPES = ((512, 1024, 1024), (512, 128, 4096), (512, 4096, 4096), (2048, 479, 1024), (2048, 1024, 1024))  # B, in, out


def measure(rounds: int) -> list[Result]:
    return [result for shape in SHAPES for result in measure_shape(*shape, rounds)]


def measure_shape(batch: int, inputs: int, outputs: int, rounds: int) -> list[Result]:
    x, weight = torch.randn(batch, inputs), torch.randn(outputs, inputs)
    bias, grad = torch.randn(outputs), torch.randn(batch, outputs)
    default, onednn = PRODUCTS["default"], PRODUCTS["onednn"]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
    out, transposed_grad = torch.empty(outputs, inputs), grad.t()
    products = {
        "output": {
            "default": lambda: default.output(x, weight, bias, True),
            "oneDNN": lambda: onednn.output(x, weight, bias, True),
            "oneDNN, prepacked": lambda: onednn.output(x, packed, bias, True),
        },
        "gradient of x": {
            "default": lambda: default.input_gradient(grad, weight),
            "oneDNN": lambda: onednn.input_gradient(grad, weight),
        },
        "gradient of W": {
            "default": lambda: default.weight_gradient(transposed_grad, x, out),
            "oneDNN": lambda: onednn.weight_gradient(transposed_grad, x, out),
        },
    }
    results = []
    for name, candidates in products.items():
        times = median_ms(candidates, 4 * rounds)
        results += against(f"fp32 {name} by torch's default, {batch} x {inputs} -> {outputs}", "default", times)
    return results
