"""The matrix products of fp32 layers: what we use, torch's default, against oneDNN, and oneDNN on a prepacked weight.

Prepacking takes time in each step, since weights change, and is not counted. On the machines measured so far no path
wins by more than a tenth, so the layers use torch's default; where one does, this benchmark shows it.
"""

from __future__ import annotations

import torch

from benchmarks.measure import Result, against, median_ms

SHAPES = ((512, 1024, 1024), (512, 128, 4096), (512, 4096, 4096), (2048, 479, 1024), (2048, 1024, 1024))  # B, in, out


def measure(rounds: int) -> list[Result]:
    return [result for shape in SHAPES for result in measure_shape(*shape, rounds)]


def measure_shape(batch: int, inputs: int, outputs: int, rounds: int) -> list[Result]:
    x, weight, bias, grad = (
        torch.randn(batch, inputs), torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(batch, outputs)
    )  # fmt: skip
    linear, onednn = torch.nn.functional.linear, torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to_mkldnn(), batch)
    columns, transposed = grad.t().contiguous(), weight.t().contiguous()
    products = {
        "forward": {
            "ours": lambda: linear(x, weight, bias),
            "oneDNN": lambda: onednn(x, weight, bias, "none", [], ""),
            "oneDNN, prepacked": lambda: onednn(x, packed, bias, "none", [], ""),
        },
        "gradient of x": {
            "ours": lambda: grad @ weight,
            "oneDNN": lambda: onednn(grad, transposed, None, "none", [], ""),
        },
        "gradient of W": {
            "ours": lambda: torch.mm(grad.t(), x),
            "transposed beforehand": lambda: torch.mm(columns, x),
        },
    }
    results = []
    for name, candidates in products.items():
        times = median_ms(candidates, 4 * rounds)
        results += against(f"fp32 {name}, {batch} x {inputs} -> {outputs}", "ours", times)
    return results
