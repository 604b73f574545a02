"""Fully connected layers, and the optimizers of their weights.

B batch, m inputs of a layer, n outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.kernels import ops  # noqa: F401 - registers the ops that are called below
from dlrm.kernels.gemm import PRODUCTS, Products

# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


class DenseLayer(nn.Module):
    """x W^T + bias, then a ReLU if `relu`.

    With shadows, the products use copies of weight and bias that are rounded to bfloat16, and these are the leaves of
    autograd. The optimizer keeps them equal to the rounded weights, so that no weight is converted in between. Weight
    and bias themselves stay float32. The shadows are bfloat16 where the processor multiplies it. Elsewhere they are
    float32: products of rounded numbers in float32 have the same numerics, bfloat16 factors and float32 sums.
    """

    gradients_stay: bool  # whether the gradients keep their memory from step to step
    products: Products

    def __init__(self, weight: Tensor, bias: Tensor | None, relu: bool, shadow_type: torch.dtype | None = None):
        """`weight`: (n, m) float32; `bias`: (n,) float32, or None. Without a `shadow_type`, there are no shadows."""
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        self.relu = relu
        self.shadows = [self._rounded(t.detach(), shadow_type).requires_grad_() for t in self.weights if shadow_type]

    @property
    def weights(self) -> list[Tensor]:
        """The weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def leaves(self) -> list[Tensor]:
        """Weight and bias as autograd sees them."""
        return self.shadows or self.weights

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of the leaves."""
        raise NotImplementedError

    @gradients.setter
    def gradients(self, gradients: Sequence[Tensor]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def update_shadows(self) -> None:
        """Rounds the weights into the shadows, after something other than the optimizer has changed the weights."""
        for shadow, parameter in zip(self.shadows, self.weights, strict=False):
            shadow.copy_(parameter.bfloat16())

    def factor(self, x: Tensor) -> Tensor:
        """Returns x in the form that the products take; with shadows, rounded. The gradient of x is rounded as well."""
        return self._rounded(x, self.shadows[0].dtype) if self.shadows else x.to(self.weight.dtype)

    @staticmethod
    def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.bfloat16().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, m) -> (B, n), in the type of the leaves."""
        raise NotImplementedError


class PlainLayer(DenseLayer):
    """A layer whose gradients autograd allocates: for compilers, and for devices other than the CPU."""

    gradients_stay = False
    products = PRODUCTS["default"]

    @property
    def gradients(self) -> list[Tensor]:
        return [leaf.grad for leaf in self.leaves]

    @gradients.setter
    def gradients(self, gradients: Sequence[Tensor]) -> None:
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient

    def forward(self, x: Tensor) -> Tensor:
        output = functional.linear(self.factor(x), *self.leaves)
        return functional.relu(output) if self.relu else output


class FusedLayer(DenseLayer):
    """A layer on the CPU that multiplies by the given products.

    Each backward pass overwrites the gradients in the same memory: fresh ones, of tens of megabytes, would cost more in
    page faults than in arithmetic.
    """

    gradients_stay = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        relu: bool,
        shadow_type: torch.dtype | None = None,
        products: Products = PRODUCTS["default"],
    ):
        super().__init__(weight, bias, relu, shadow_type)
        self.products = products
        self._gradients: list[Tensor] = []

    @property
    def gradients(self) -> list[Tensor]:
        if not self._gradients:  # before the first step; inference needs none
            self._gradients = [torch.zeros_like(leaf, requires_grad=False) for leaf in self.leaves]
        return self._gradients

    @gradients.setter
    def gradients(self, gradients: Sequence[Tensor]) -> None:
        self._gradients = list(gradients)

    def forward(self, x: Tensor) -> Tensor:
        gradients = self.gradients if torch.is_grad_enabled() else ()
        weight, bias = self.leaves if self.bias is not None else (*self.leaves, None)
        return FusedLinear.apply(self.factor(x), weight, bias, gradients, self.relu, self.products)


class FusedLinear(torch.autograd.Function):
    """x W^T + bias, then a ReLU if `relu`, by the given products.

    The backward pass overwrites `gradients`, tensors like weight and bias, and tells autograd of none. x, weight and
    bias have the same type.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, gradients: Sequence[Tensor], relu: bool, products: Products
    ) -> Tensor:
        """(B, m), (n, m), (n,) or None -> (B, n)."""
        ctx.gradients, ctx.products = gradients, products
        output = products.output(x, weight, bias, relu)
        ctx.save_for_backward(x, weight, output if relu else None)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, output = ctx.saved_tensors
        grad_weight, *grad_biases = ctx.gradients
        if output is not None and x.dtype == torch.bfloat16:
            grad, columns, sums = torch.ops.dlrm.relu_backward(grad, output)
        else:
            if output is not None:
                grad = torch.ops.aten.threshold_backward(grad, output, 0)
            columns, sums = grad.t(), grad.sum(0) if grad_biases else None
        ctx.products.weight_gradient(columns, x, grad_weight)
        for grad_bias in grad_biases:
            grad_bias.copy_(sums)
        grad_x = ctx.products.input_gradient(grad, weight) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers on the CPU: all weights and biases in one pass
# ---------------------------------------------------------------------------------------------------------------------


class FusedDenseOptimizer(torch.optim.Optimizer):
    """Updates the weights, biases and shadows of all layers by one op."""

    def __init__(self, layers: Sequence[DenseLayer], lr: float):
        self._weights = [parameter for layer in layers for parameter in layer.weights]
        self._layers = layers
        shadows = [shadow for layer in layers for shadow in layer.shadows]
        self._shadows = [shadow for shadow in shadows if shadow.dtype == torch.bfloat16]  # which the op writes
        super().__init__(self._weights, {"lr": lr})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients that autograd allocated. Those that keep their memory are overwritten anyway."""
        for layer in self._layers:
            for leaf in layer.leaves:
                leaf.grad = None

    @torch.no_grad()
    def step(self) -> None:
        gradients = [gradient for layer in self._layers for gradient in layer.gradients]
        self.update(gradients, self.param_groups[0]["lr"])
        if not self._shadows:
            for layer in self._layers:
                layer.update_shadows()

    def update(self, gradients: list[Tensor], lr: float) -> None:
        """Updates the weights from one gradient per weight and bias."""
        raise NotImplementedError


class FusedDenseSGD(FusedDenseOptimizer):
    """SGD by `dlrm::dense_sgd_`."""

    def update(self, gradients: list[Tensor], lr: float) -> None:
        torch.ops.dlrm.dense_sgd_(self._weights, gradients, self._shadows, lr)


class FusedDenseAdagrad(FusedDenseOptimizer):
    """Adagrad by `dlrm::dense_adagrad_`. The moment, `state[parameter]["sum"]`, has the parameter's shape."""

    def __init__(
        self, layers: Sequence[DenseLayer], lr: float, eps: float = 1e-10, initial_accumulator_value: float = 0.0
    ):
        super().__init__(layers, lr)
        self._eps = eps
        self._moments = new_moments(self, initial_accumulator_value)

    def update(self, gradients: list[Tensor], lr: float) -> None:
        torch.ops.dlrm.dense_adagrad_(self._weights, self._moments, gradients, self._shadows, lr, self._eps)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers out of native operators
# ---------------------------------------------------------------------------------------------------------------------


class ForeachOptimizer(torch.optim.Optimizer):
    """Updates parameters by operators on lists of tensors.

    The learning rate is a tensor on the device. `torch.optim` would read it back, and so wait for the device.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: Tensor):
        super().__init__(parameters, {"lr": lr})
        self._parameters = list(parameters)

    @torch.no_grad()
    def step(self) -> None:
        steps = self.directions([parameter.grad for parameter in self._parameters])
        torch._foreach_mul_(steps, self.param_groups[0]["lr"].view(()))
        torch._foreach_sub_(self._parameters, steps)

    def directions(self, gradients: list[Tensor]) -> list[Tensor]:
        """Returns the steps for a learning rate of 1, in tensors that may be overwritten."""
        raise NotImplementedError


class ForeachSGD(ForeachOptimizer):
    """SGD out of native operators."""

    def directions(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients  # which nobody reads after the update


class ForeachAdagrad(ForeachOptimizer):
    """Adagrad out of native operators. The moment, `state[parameter]["sum"]`, has the parameter's shape."""

    def __init__(
        self, parameters: Sequence[Tensor], lr: Tensor, eps: float = 1e-10, initial_accumulator_value: float = 0.0
    ):
        super().__init__(parameters, lr)
        self._eps = eps
        self._moments = new_moments(self, initial_accumulator_value)

    def directions(self, gradients: list[Tensor]) -> list[Tensor]:
        torch._foreach_addcmul_(self._moments, gradients, gradients)
        roots = torch._foreach_sqrt(self._moments)
        torch._foreach_add_(roots, self._eps)
        return torch._foreach_div(gradients, roots)


def new_moments(optimizer: torch.optim.Optimizer, value: float) -> list[Tensor]:
    """Puts a moment full of `value` for each parameter into the optimizer's state, and returns them in the same
    order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [torch.full_like(parameter, value, requires_grad=False) for parameter in parameters]
    for parameter, moment in zip(parameters, moments, strict=True):
        optimizer.state[parameter]["sum"] = moment
    return moments
