"""The dense ops: fused optimizers with bfloat16 shadows, and the dot interaction. To be merged into the kernels module.

    dlrm::dense_adagrad_             gradients of all dense weights -> weights, moments and shadows, in place
    dlrm::dense_sgd_                 gradients of all dense weights -> weights and shadows, in place
    dlrm::dot_interaction            (B, D), (B, T, D) -> (B, D + pairs)
    dlrm::dot_interaction_backward   gradient of that  -> gradients of both
    dlrm::relu_backward              gradient of a ReLU's output -> that of its input as rows, as columns, and summed

B batch, T tables, F = T + 1 features, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake
from torch.nn import functional

# ---------------------------------------------------------------------------------------------------------------------
# Dense optimizers
# ---------------------------------------------------------------------------------------------------------------------

define(
    "dlrm::dense_adagrad_",
    "(Tensor(a!)[] weights, Tensor(b!)[] moments, Tensor[] grads, Tensor(c!)[] shadows, float lr, float eps) -> ()",
)
define("dlrm::dense_sgd_", "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] shadows, float lr) -> ()")


@register_fake("dlrm::dense_adagrad_")
def _(weights, moments, grads, shadows, lr, eps) -> None:
    torch._check(len(weights) == len(moments) == len(grads), lambda: "one moment and gradient a weight")
    torch._check(len(shadows) in (0, len(weights)), lambda: "a shadow for each weight, or none")


@register_fake("dlrm::dense_sgd_")
def _(weights, grads, shadows, lr) -> None:
    torch._check(len(weights) == len(grads), lambda: "one gradient a weight")
    torch._check(len(shadows) in (0, len(weights)), lambda: "a shadow for each weight, or none")


def dense_adagrad_reference(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    grads: Sequence[Tensor],
    shadows: Sequence[Tensor],
    lr: float,
    eps: float,
) -> None:
    """Adagrad (Duchi et al. 2011, as `torch.optim.Adagrad` computes it) on every element, in place:

        moment += g^2;  weight -= lr * g / (sqrt(moment) + eps);  shadow = bfloat16(weight)

    `weights[p]`, `moments[p]`: float32; `grads[p]`: float32 or bfloat16; `shadows[p]`: bfloat16, or no shadows at all.
    """
    for weight, moment, grad in zip(weights, moments, grads, strict=True):
        grad = grad.float()
        moment.addcmul_(grad, grad)
        weight.addcdiv_(grad, moment.sqrt().add_(eps), value=-lr)
    for shadow, weight in zip(shadows, weights, strict=False):
        shadow.copy_(weight)


impl("dlrm::dense_adagrad_", "default", dense_adagrad_reference)


def dense_sgd_reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], shadows: Sequence[Tensor], lr: float
) -> None:
    """weight -= lr * g; shadow = bfloat16(weight), in place; arguments as of `dense_adagrad_reference`."""
    for weight, grad in zip(weights, grads, strict=True):
        weight.add_(grad.float(), alpha=-lr)
    for shadow, weight in zip(shadows, weights, strict=False):
        shadow.copy_(weight)


impl("dlrm::dense_sgd_", "default", dense_sgd_reference)


# ---------------------------------------------------------------------------------------------------------------------
# The dot interaction
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::dot_interaction", "(Tensor dense, Tensor pooled, bool itself) -> Tensor")
define("dlrm::dot_interaction_backward", "(Tensor grad, Tensor dense, Tensor pooled, bool itself) -> (Tensor, Tensor)")


def num_pairs(num_features: int, itself: bool) -> int:
    return num_features * (num_features + (1 if itself else -1)) // 2


@register_fake("dlrm::dot_interaction")
def _(dense, pooled, itself) -> Tensor:
    batch, tables, dim = pooled.shape
    torch._check(dense.shape == (batch, dim), lambda: f"dense {tuple(dense.shape)}, pooled {tuple(pooled.shape)}")
    return dense.new_empty(batch, dim + num_pairs(tables + 1, itself))


@register_fake("dlrm::dot_interaction_backward")
def _(grad, dense, pooled, itself) -> tuple[Tensor, Tensor]:
    return dense.new_empty(dense.shape), pooled.new_empty(pooled.shape)


def dot_interaction_reference(dense: Tensor, pooled: Tensor, itself: bool) -> Tensor:
    """The dense feature, then the dot product of each pair of features: the lower triangle of X X^T, row by row, where
    the rows of X are the dense feature and the pooled ones; with the diagonal if `itself`.

    `dense`: (B, D), `pooled`: (B, T, D), float. Returns (B, D + pairs) in the type of `dense`.
    """
    features = torch.cat([dense[:, None], pooled], dim=1)  # (B, F, D)
    products = torch.bmm(features, features.transpose(1, 2))  # (B, F, F)
    row, column = torch.tril_indices(*products.shape[1:], offset=0 if itself else -1, device=dense.device)
    return torch.cat([dense, products[:, row, column].to(dense.dtype)], dim=1)


impl("dlrm::dot_interaction", "default", dot_interaction_reference)


def dot_interaction_backward_reference(
    grad: Tensor, dense: Tensor, pooled: Tensor, itself: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of X is (G + G^T) X, G that of the triangle. Returns (B, D) and (B, T, D), typed as the inputs."""
    features = torch.cat([dense[:, None], pooled], dim=1)  # (B, F, D)
    batch, num_features, dim = features.shape
    row, column = torch.tril_indices(num_features, num_features, offset=0 if itself else -1, device=dense.device)
    triangle = features.new_zeros(batch, num_features, num_features)
    triangle[:, row, column] = grad[:, dim:].to(features.dtype)
    grad_features = torch.bmm(triangle + triangle.transpose(1, 2), features)
    return (grad_features[:, 0] + grad[:, :dim]).to(dense.dtype), grad_features[:, 1:].to(pooled.dtype).contiguous()


impl("dlrm::dot_interaction_backward", "default", dot_interaction_backward_reference)


def _save_features(ctx, inputs, output) -> None:
    dense, pooled, ctx.itself = inputs
    ctx.save_for_backward(dense, pooled)


def _interaction_backward(ctx, grad: Tensor):
    return *torch.ops.dlrm.dot_interaction_backward(grad, *ctx.saved_tensors, ctx.itself), None


register_autograd("dlrm::dot_interaction", _interaction_backward, setup_context=_save_features)


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------

define("dlrm::relu_backward", "(Tensor grad, Tensor output) -> (Tensor, Tensor, Tensor)")


@register_fake("dlrm::relu_backward")
def _(grad, output) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = output.shape
    return output.new_empty(batch, width), output.new_empty(width, batch), output.new_empty(width)


def relu_backward_reference(grad: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of what a ReLU was given, from that of its output: as rows (B, n), as columns (n, B), and its sum
    over the batch (n,), which is the gradient of the bias before the ReLU."""
    masked = torch.where(output > 0, grad, 0)
    return masked, masked.t().contiguous(), masked.sum(0)


impl("dlrm::relu_backward", "default", relu_backward_reference)


class Layer(torch.autograd.Function):
    """x W^T + bias, then ReLU if `relu`, by the fastest product that torch has for each of the three.

    The backward overwrites `gradients`, tensors like weight and bias, and tells autograd of none: a fresh gradient of
    tens of megabytes costs more in page faults each step than in arithmetic. x, weight and bias are of one type.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, gradients: tuple[Tensor, Tensor], relu: bool) -> Tensor:
        """(B, m), (n, m), (n,) -> (B, n)."""
        ctx.gradients = gradients
        if relu and x.dtype == torch.bfloat16 and x.is_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            output = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
        else:
            output = functional.linear(x, weight, bias)
            output = output.relu_() if relu else output
        ctx.save_for_backward(x, weight, output if relu else None)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, output = ctx.saved_tensors
        grad_weight, grad_bias = ctx.gradients
        if output is not None and x.dtype == torch.bfloat16:
            grad, columns, sums = torch.ops.dlrm.relu_backward(grad, output)
        else:
            if output is not None:
                grad = torch.ops.aten.threshold_backward(grad, output, 0)
            columns, sums = grad.t(), grad.sum(0)
        torch.mm(columns, x, out=grad_weight)
        grad_bias.copy_(sums)
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None, None
