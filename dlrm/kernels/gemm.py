"""The matrix products of fully connected layers on the CPU, by whatever is fastest for their shape.

In fp32, torch multiplies by MKL where it was built with MKL, but has oneDNN, too, and there is a kernel of our own,
`dlrm::matrix_product`. Which of them is fastest depends on processor and shape. The products of large layers are timed
with each, once per machine. The choice is kept in a file whose name depends on all that the choice depends on, so that
runs repeat bit for bit. All compute in float32; only the order of their sums differs.

    DLRM_CACHE   the folder where choices are kept; ~/.cache/dlrm unless set

B batch, m inputs of a layer, n outputs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dlrm.kernels import ops  # noqa: F401 - registers the op that is called below
from dlrm.kernels.native import cache_folder, processor
from dlrm.system.files import locked, renamed_when_done

WORTH_TIMING = 2**29  # multiplications; a smaller product takes less than a few milliseconds
CLEARLY_FASTER = 0.9  # of the default's time, at most
ROUNDS = 4  # calls that are timed per product


class Products(NamedTuple):
    """The three matrix products of a layer in a training step."""

    # x (B, m), weight (n, m), bias (n,) or None, relu -> (B, n)
    output: Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]
    input_gradient: Callable[[Tensor, Tensor], Tensor]  # gradient (B, n), weight (n, m) -> (B, m)
    weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]  # gradient^T (n, B), x (B, m), out (n, m) -> out


def default_output(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    output = functional.linear(x, weight, bias)
    return output.relu_() if relu else output


def onednn_output(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """Leaves the ReLU to torch. oneDNN's own turns NaN into 0, so a loss that diverged would look finite."""
    output = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return output.relu_() if relu else output


def native_product(left: Tensor, right: Tensor, bias: Tensor | None, relu: bool, out: Tensor | None = None) -> Tensor:
    out = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
    torch.ops.dlrm.matrix_product(left, right, bias, relu, out)
    return out


PRODUCTS = {  # by the name that --gemm has for them
    "default": Products(
        default_output,
        torch.mm,
        lambda columns, x, out: torch.mm(columns, x, out=out),
    ),
    "onednn": Products(
        onednn_output,
        lambda gradient, weight: onednn_output(gradient, weight.t(), None, relu=False),
        lambda columns, x, out: out.copy_(onednn_output(columns, x.t(), None, relu=False)),
    ),
    "native": Products(
        lambda x, weight, bias, relu: native_product(x, weight.t(), bias, relu),
        lambda gradient, weight: native_product(gradient, weight, None, relu=False),
        lambda columns, x, out: native_product(columns, x, None, relu=False, out=out),
    ),
}


def count_products(layers: Iterable[Products]) -> dict[str, int]:
    """Returns how many of all products of the layers are computed by each of `PRODUCTS`, by its name."""
    products = [product for products_of_layer in layers for product in products_of_layer]
    return {name: sum(product in named for product in products) for name, named in PRODUCTS.items()}


def multiplies_bf16() -> bool:
    """Says whether oneDNN has bfloat16 products here. Where it has none, torch multiplies in scalar loops, on one core:
    on an AVX2 processor that took 150 times as long as fp32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bf16_products() -> Products:
    """Returns the products of bfloat16 layers.

    torch multiplies bfloat16 by oneDNN anyway. Called directly, oneDNN adds the bias in the same pass.
    """
    return PRODUCTS["default"]._replace(output=onednn_output if multiplies_bf16() else default_output)


def fp32_products(gemm: str, batch: int, inputs: int, outputs: int) -> Products:
    """Returns the products that `--gemm` names for a float32 layer of this shape: with "auto", the fastest."""
    if gemm != "auto":
        return PRODUCTS[gemm]
    if batch * inputs * outputs < WORTH_TIMING or not torch.backends.mkldnn.is_available():
        return PRODUCTS["default"]
    names = kept_choice(batch, inputs, outputs)
    return Products(*(getattr(PRODUCTS[names[field]], field) for field in Products._fields))


@functools.cache
def kept_choice(batch: int, inputs: int, outputs: int) -> dict[str, str]:
    """Returns, for each field of `Products`, the name of the fastest of `PRODUCTS`.

    Names the default everywhere if the choice cannot be kept in a file: otherwise, runs would not repeat bit for bit.
    """
    shape = f"{batch} x {inputs} -> {outputs}"
    try:
        path = cache_folder() / f"products-{machine_key()}.json"
        with locked(path.with_suffix(".lock")):
            kept = read_choices(path)
            if shape not in kept:
                print(f"Timing the matrix products of layers {shape} (once)...", file=sys.stderr, flush=True)
                kept[shape] = fastest(batch, inputs, outputs)
                with renamed_when_done(path) as file:
                    file.write((json.dumps(kept, indent=2) + "\n").encode())
            return kept[shape]
    except OSError:
        return dict.fromkeys(Products._fields, "default")


def machine_key() -> str:
    """Returns a hash of all that a choice depends on besides the shape."""
    inputs = torch.__version__, processor(), str(torch.get_num_threads()), *PRODUCTS
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def read_choices(path: Path) -> dict[str, dict[str, str]]:
    """Returns the choices in a file, by shape. Leaves out whatever is damaged."""
    try:
        choices = json.loads(path.read_text())
        known = {shape for shape, names in choices.items() if set(names) == set(Products._fields)}
        return {shape: choices[shape] for shape in known if set(choices[shape].values()) <= PRODUCTS.keys()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return {}


def fastest(batch: int, inputs: int, outputs: int) -> dict[str, str]:
    """Times all `PRODUCTS` for a layer of this shape, and returns the name of the fastest for each field of `Products`.

    Names the default unless another one is clearly faster.
    """
    x, weight, bias = torch.ones(batch, inputs), torch.ones(outputs, inputs), torch.ones(outputs)
    gradient, out = torch.ones(batch, outputs), torch.empty(outputs, inputs)
    arguments = Products((x, weight, bias, True), (gradient, weight), (gradient.t(), x, out))
    choice = {}
    for field in Products._fields:
        calls = {
            name: functools.partial(getattr(products, field), *getattr(arguments, field))
            for name, products in PRODUCTS.items()
        }
        times = least_seconds(calls)
        best = min(times, key=times.get)
        choice[field] = best if times[best] < CLEARLY_FASTER * times["default"] else "default"
    return choice


def least_seconds(calls: dict[str, Callable]) -> dict[str, float]:
    """Returns, for each function, the seconds of its fastest call. The functions are called in turn, `ROUNDS` times."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - start)
    return least
