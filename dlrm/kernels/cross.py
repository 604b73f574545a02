"""Cross layers, through which all features of a sample multiply each other (R. Wang et al., "DCN V2", WWW 2021).

B batch, W width of all features side by side, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dlrm.kernels import ops  # noqa: F401 - registers the ops that are called below
from dlrm.kernels.dense import DenseLayer
from dlrm.kernels.gemm import Products


class CrossLayer(nn.Module):
    """x0 * (W (V x) + b) + x, or x0 * (W x + b) + x without V."""

    def __init__(self, down: DenseLayer | None, up: DenseLayer):
        """`down`: V, (R, W), without a bias; `up`: W, (W, R), or (W, W) without `down`, and its bias b, (W,)."""
        super().__init__()
        self.down, self.up = down, up

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        """(B, W), (B, W) -> (B, W). `first` is x0, the input of the first cross layer."""
        return first * self.up(self.factor_of_up(x)) + x

    def factor_of_up(self, x: Tensor) -> Tensor:
        """Returns what W is multiplied by."""
        return x if self.down is None else self.down(x)


class CrossNet(nn.Sequential):
    """Cross layers; without any, the output is the input."""

    def __init__(self, layers: Iterable[CrossLayer] = ()):
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, W)."""
        first = x
        for layer in self:
            x = layer(first, x)
        return x

    def dense_layers(self) -> list[DenseLayer]:
        """Returns the layers that multiply, in the order in which they do."""
        return [layer for cross in self for layer in (cross.down, cross.up) if layer is not None]


class FusedCrossNet(CrossNet):
    """Cross layers out of fused layers. All else that they do takes one pass over memory in each direction."""

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self:
            factor, (weight, bias) = layer.up.factor(layer.factor_of_up(x)), layer.up.leaves
            gradients = layer.up.gradients if torch.is_grad_enabled() else ()
            first, x = first.to(factor.dtype), x.to(factor.dtype)
            first, x = FusedCross.apply(first, x, factor, weight, bias, gradients, layer.up.products)
        return x


class FusedCross(torch.autograd.Function):
    """x0 * (W f + b) + x by the given products and by `dlrm::cross`.

    The backward pass overwrites `gradients`, those of W and b, and tells autograd of none. x0 goes from layer to layer,
    so that its gradient comes back from the later layers, and each layer adds its own in the same pass.
    """

    @staticmethod
    def forward(
        ctx,
        first: Tensor,
        x: Tensor,
        factor: Tensor,
        weight: Tensor,
        bias: Tensor,
        gradients: Sequence[Tensor],
        products: Products,
    ) -> tuple[Tensor, Tensor]:
        """(B, W), (B, W), (B, R), (W, R), (W,) -> (B, W), (B, W)."""
        ctx.gradients, ctx.products = gradients, products
        ctx.set_materialize_grads(False)
        product = products.output(factor, weight, None, False)
        ctx.save_for_backward(first, product, bias, factor, weight)
        return first, torch.ops.dlrm.cross(first, product, bias, x)

    @staticmethod
    def backward(ctx, later: Tensor | None, grad: Tensor):
        first, product, bias, factor, weight = ctx.saved_tensors
        grad_weight, grad_bias = ctx.gradients
        grad_first, rows, columns, sums = torch.ops.dlrm.cross_backward(grad, first, product, bias, later)
        ctx.products.weight_gradient(columns if len(columns) else rows.t(), factor, grad_weight)
        grad_bias.copy_(sums)
        return grad_first, grad, ctx.products.input_gradient(rows, weight), None, None, None, None
