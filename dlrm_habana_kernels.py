"""The kernels of the trainer: embedding bags, interactions, layers, optimizers; a back end a device.

The ops they are made of are in `dlrm/kernels/ops.py`, in plain torch, and in dlrm/kernels/csrc/, in C++ for the CPU.

The tables are not autograd leaves; what is looked up in them is. The backward of a sum bag is itself a sum bag: row r
of a table receives the gradients of all bags that looked it up. So the gradient of the pooled output, (B, T, D), and
the lookups grouped by row are all that a sparse optimizer needs, and no gradient of table size ever exists.

B batch, T tables, F = T + 1 features, D embedding dimension, N most lookups of a table in a batch, U rows that a
table's lookups hit.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.batch import Batch
from dlrm.distributed.launch import find_launch
from dlrm.errors import UsageError
from dlrm.kernels.gemm import PRODUCTS, Products, bf16_products, fp32_products
from dlrm.kernels.native import BuildError, find_compiler, load_kernels
from dlrm.kernels.ops import PreparedLookups, Sizes, check_lookups, num_pairs, rounding_seeds
from dlrm.options import INT32_MAX, Options, gaudi_environment
from dlrm.system import memory

# ---------------------------------------------------------------------------------------------------------------------
# Embedding bags
# ---------------------------------------------------------------------------------------------------------------------


class EmbeddingTable(nn.Module):
    """Holds the rows of a table, so that its name in a checkpoint is `emb_l.0.weight`, as it has always been."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        torch.ops.dlrm.advise_huge_pages(self.weight)


class EmbeddingBags(nn.ModuleList):
    """All tables of a model. Remembers what it looked up last, and where, for the sparse optimizer."""

    lookups_type = PreparedLookups  # what a batch must hold
    optimizers: ClassVar = {}  # by name; where there are none, the back end's
    learned_row_weights = ()

    def __init__(self, tables: Iterable[Tensor], origins: Sequence[tuple[int, int]] = ()):
        """`origins`: of tables that are parts of others, the number and first row there."""
        super().__init__(map(EmbeddingTable, tables))
        self.origins = origins or [(number, 0) for number in range(len(self))]

    @property
    def weights(self) -> list[Tensor]:
        return [table.weight for table in self]

    def forward(self, lookups: PreparedLookups) -> Tensor:
        """What is read from the tables for a batch: a leaf of autograd while gradients are on. Input of `pool`."""
        looked_up = self.look_up(lookups)
        if torch.is_grad_enabled():
            self.looked_up, self.lookups = looked_up.requires_grad_(), lookups
        return looked_up

    def look_up(self, lookups: PreparedLookups) -> Tensor:
        return torch.ops.dlrm.embedding_bag_sum(self.weights, lookups.indices_fwd, lookups.offsets)

    def pool(self, looked_up: Tensor, lookups: PreparedLookups) -> Tensor:
        """The sum of each bag, (B, T, D)."""
        return looked_up


# ---------------------------------------------------------------------------------------------------------------------
# Sparse optimizers
# ---------------------------------------------------------------------------------------------------------------------


LearningRate = float | Tensor  # a tensor of one element where the device records what it is given, see `Backend`


class SparseOptimizer(torch.optim.Optimizer):
    """Updates the tables of an `EmbeddingBags` from the gradient of what it looked up last."""

    def __init__(self, embeddings: EmbeddingBags, **defaults: LearningRate):
        super().__init__(embeddings.weights, defaults)
        self._embeddings = embeddings
        self.updates = 0  # so far
        self._rounds = embeddings.weights[0].dtype == torch.bfloat16

    @property
    def seeds(self) -> list[int] | None:
        """For the rounding of the next update, where tables are bfloat16."""
        return rounding_seeds(self.updates, *zip(*self._embeddings.origins, strict=True)) if self._rounds else None

    @torch.no_grad()
    def step(self) -> None:
        self.update(self._embeddings, self._embeddings.looked_up.grad, self._embeddings.lookups)
        self.updates += 1

    def update(self, embeddings: EmbeddingBags, gradient: Tensor, lookups: PreparedLookups) -> None:
        raise NotImplementedError


class SparseAdagrad(SparseOptimizer):
    """`sparse_adagrad_`; `state[weight]["sum"]` is the moment, (rows, D) float32."""

    update_tables_ = torch.ops.dlrm.sparse_adagrad_

    def __init__(self, embeddings: EmbeddingBags, lr: LearningRate, eps: float = 1e-10):
        super().__init__(embeddings, lr=lr, eps=eps)
        self.moments = [self.zero_moment(weight) for weight in embeddings.weights]
        for weight, moment in zip(embeddings.weights, self.moments, strict=True):
            torch.ops.dlrm.advise_huge_pages(moment)
            self.state[weight]["sum"] = moment

    def update(self, embeddings: EmbeddingBags, gradient: Tensor, lookups: PreparedLookups) -> None:
        group = self.param_groups[0]
        rates = group["lr"], group["eps"], self.seeds
        self.update_tables_(embeddings.weights, self.moments, gradient, *lookups.grouped(), *rates)

    @staticmethod
    def zero_moment(weight: Tensor) -> Tensor:
        return torch.zeros_like(weight, dtype=torch.float32)


class SparseRowwiseAdagrad(SparseAdagrad):
    """`sparse_rowwise_adagrad_`; the moment is (rows,) float32."""

    update_tables_ = torch.ops.dlrm.sparse_rowwise_adagrad_

    @staticmethod
    def zero_moment(weight: Tensor) -> Tensor:
        return torch.zeros(len(weight), device=weight.device)


class SparseSGD(SparseOptimizer):
    """`sparse_sgd_`."""

    def __init__(self, embeddings: EmbeddingBags, lr: LearningRate):
        super().__init__(embeddings, lr=lr)

    def update(self, embeddings: EmbeddingBags, gradient: Tensor, lookups: PreparedLookups) -> None:
        lr = self.param_groups[0]["lr"]
        torch.ops.dlrm.sparse_sgd_(embeddings.weights, gradient, *lookups.grouped(), lr, self.seeds)


# ---------------------------------------------------------------------------------------------------------------------
# Static shapes: embedding bags and their update out of native operators alone
#
# For devices where the ops above have no kernel, and where a size that follows the data costs a recompilation or a
# wait. Bags are padded with a row of zeros, groups with no gradient; what is padded is thrown away or written back as
# it was.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class StaticLookups:
    """The lookups of a batch for tables that are stacked in one, below them a row of zeros; L lookups a bag at most."""

    unique_rows: Tensor  # (T * N + 1,) int32; from t * N on, the rows of table t that occur, then the row of zeros
    positions: Tensor  # (T, B, L) int32; for each lookup its place in `unique_rows`, then the last one
    host: PreparedLookups | None = None  # where the lookups of a batch are grouped first

    @classmethod
    def allocate(cls, sizes: Sizes, **settings) -> StaticLookups:
        tables = len(sizes.table_rows)
        positions = (tables, sizes.batch_size, sizes.lookups_per_bag)
        return cls(
            torch.zeros(tables * sizes.max_lookups + 1, dtype=torch.int32, **settings),
            torch.zeros(positions, dtype=torch.int32, **settings),
            PreparedLookups.allocate(sizes) if settings["device"].type == "cpu" else None,
        )

    def fields(self) -> list[Tensor]:
        return [self.unique_rows, self.positions]

    def fill(self, batch: Batch, table_rows: Sequence[int], coalesce: Callable[..., None]) -> PreparedLookups:
        """From a raw batch, on the host. Returns the grouped lookups that it went through."""
        grouped = self.host.fill(batch, table_rows, coalesce)
        torch.ops.dlrm.pad_lookups(grouped.offsets, *grouped.grouped(), table_rows, *self.fields())
        return grouped


class StaticEmbeddingBags(EmbeddingBags):
    """Tables stacked in one storage, so that an operator serves all of them."""

    lookups_type = StaticLookups

    def __init__(self, tables: Iterable[Tensor], origins: Sequence[tuple[int, int]] = ()):
        super().__init__(tables, origins)
        rows = sum(map(len, self.weights))
        if rows >= INT32_MAX:
            raise UsageError(
                f"--arch-embedding-size: {rows:,} rows in all are too many for {type(self).__name__}, which finds them "
                f"by int32; use more ranks (--world_size)"
            )
        self.stacked = torch.empty(rows + 1, self.weights[0].shape[1])
        self.stacked[-1] = 0
        for table, part in self._parts():  # whose memory is taken as that of the table is given back
            table.weight = nn.Parameter(part.copy_(table.weight), requires_grad=False)

    def _parts(self) -> Iterator[tuple[EmbeddingTable, Tensor]]:
        """Each table and its part of the stack."""
        return zip(self, self.stacked.split([*map(len, self.weights), 1]), strict=False)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> StaticEmbeddingBags:
        """Moves the stack, instead of each table by itself."""
        self.stacked = function(self.stacked)
        for table, part in self._parts():
            table.weight = nn.Parameter(part, requires_grad=False)
        return self

    def look_up(self, lookups: StaticLookups) -> Tensor:
        """Each row that occurs, once: (T * N + 1, D)."""
        return self.stacked.index_select(0, lookups.unique_rows)

    def pool(self, looked_up: Tensor, lookups: StaticLookups) -> Tensor:
        return functional.embedding(lookups.positions, looked_up).sum(2).transpose(0, 1)


class StaticSGD(SparseOptimizer):
    """SGD on a `StaticEmbeddingBags`."""

    def __init__(self, embeddings: StaticEmbeddingBags, lr: LearningRate):
        super().__init__(embeddings, lr=lr)

    def update(self, embeddings: StaticEmbeddingBags, gradient: Tensor, lookups: StaticLookups) -> None:
        step = self.direction(gradient[:-1], lookups.unique_rows[:-1].long())  # the last row is padding's
        updated = embeddings.looked_up[:-1] - self.param_groups[0]["lr"] * step
        embeddings.stacked.index_copy_(0, lookups.unique_rows[:-1].long(), updated)

    def direction(self, gradient: Tensor, rows: Tensor) -> Tensor:
        return gradient


class StaticAdagrad(StaticSGD):
    """Adagrad on a `StaticEmbeddingBags`; `state[weight]["sum"]` is the moment, (rows, D) float32."""

    def __init__(self, embeddings: StaticEmbeddingBags, lr: LearningRate, eps: float = 1e-10):
        super().__init__(embeddings, lr=lr)
        self._eps = eps
        self._moments = self.zero_moments(embeddings.stacked)
        sizes = [len(weight) for weight in embeddings.weights] + [1]
        for weight, moment in zip(embeddings.weights, self._moments.split(sizes), strict=False):
            self.state[weight]["sum"] = moment

    def direction(self, gradient: Tensor, rows: Tensor) -> Tensor:
        moments = self._moments.index_select(0, rows) + self.squares(gradient)
        self._moments.index_copy_(0, rows, moments)
        return gradient / (moments.sqrt() + self._eps)

    @staticmethod
    def zero_moments(stacked: Tensor) -> Tensor:
        return torch.zeros_like(stacked)

    @staticmethod
    def squares(gradient: Tensor) -> Tensor:
        return gradient.square()


class StaticRowwiseAdagrad(StaticAdagrad):
    """Row-wise Adagrad likewise; the moment is (rows,) float32."""

    def __init__(self, embeddings: StaticEmbeddingBags, lr: LearningRate, eps: float = 1e-10):
        super().__init__(embeddings, lr, eps)
        for state in self.state.values():
            state["sum"] = state["sum"].squeeze(1)

    @staticmethod
    def zero_moments(stacked: Tensor) -> Tensor:
        return stacked.new_zeros(len(stacked), 1)

    @staticmethod
    def squares(gradient: Tensor) -> Tensor:
        return gradient.square().mean(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Gaudi's own kernels, which run in lazy mode alone. They are functions, unknown to autograd and autocast; a count on
# the device says how much of a tensor is valid, and what lies past it is undefined.
# ---------------------------------------------------------------------------------------------------------------------

SUM_BAGS = 1  # kernel_mode: bags of any length


class HpexEmbeddingBags(EmbeddingBags):
    """`hpex.kernels.EmbeddingBag`, a call for each table."""

    def look_up(self, lookups: PreparedLookups) -> Tensor:
        from habana_frameworks.torch.hpex.kernels import EmbeddingBag

        tables = zip(self.weights, lookups.indices_fwd, lookups.offsets, lookups.valid_count_fwd, strict=True)
        return torch.stack([EmbeddingBag.forward(*table, SUM_BAGS) for table in tables], dim=1)


class HpexAdagrad(SparseAdagrad):
    """`hpex.optimizers.SparseAdagrad`, whose eps is fixed at 1e-10, on gradients that `EmbeddingBag.backward` sums."""

    def update(self, embeddings: EmbeddingBags, gradient: Tensor, lookups: PreparedLookups) -> None:
        from habana_frameworks.torch.hpex.kernels import EmbeddingBag
        from habana_frameworks.torch.hpex.optimizers import SparseAdagrad

        for t, (weight, moment) in enumerate(zip(embeddings.weights, self.moments, strict=True)):
            by_row = gradient.new_empty(lookups.unique_indices.shape[1], gradient.shape[2])
            by_bag = gradient[:, t].contiguous()
            groups = lookups.output_rows[t], lookups.output_row_offsets[t], lookups.valid_count_bwd[t]
            EmbeddingBag.backward(by_row, by_bag, *groups, SUM_BAGS)
            rows = lookups.unique_indices[t], self.param_groups[0]["lr"], lookups.unique_count[t]
            SparseAdagrad.forward(by_row, weight, moment, *rows)


def coalesce_lookups_by_plugin(
    indices: Sequence[Tensor], offsets: Tensor, table_rows: Sequence[int], *prepared: Tensor
) -> None:
    """What `dlrm::coalesce_lookups` does, by `hpex.kernels.EmbeddingBagPreproc`, on one core of the host."""
    from habana_frameworks.torch.hpex.kernels import EmbeddingBagPreproc

    into = PreparedLookups(*prepared)
    for t, (rows, starts) in enumerate(zip(indices, offsets, strict=True)):
        check_lookups(t, rows, starts, table_rows[t], into.indices_fwd.shape[1])
        into.indices_fwd[t, : len(rows)] = rows
        into.offsets[t] = starts
        # It sorts by as many bits as its last argument has: with less than the table's rows, some would occur twice.
        grouped = EmbeddingBagPreproc.forward(rows.int(), starts.int(), table_rows[t])
        into.unique_count[t], into.unique_indices[t, : len(rows)], into.output_rows[t, : len(rows)] = grouped[:3]
        into.output_row_offsets[t, : len(rows) + 1] = grouped[3]
        into.valid_count_fwd[t] = torch.tensor([len(starts), len(rows)])
        into.valid_count_bwd[t] = torch.tensor([int(grouped[0]) + 1, len(rows)])


# ---------------------------------------------------------------------------------------------------------------------
# Interactions
# ---------------------------------------------------------------------------------------------------------------------


class CatInteraction(nn.Module):
    """All features side by side."""

    multiplications = 0

    def __init__(self, num_features: int, dim: int, itself: bool):
        """`itself` means nothing here."""
        super().__init__()
        self.width = num_features * dim

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """(B, D), (B, T, D) -> (B, (1 + T) * D), in the type of `dense`."""
        return torch.cat([dense, pooled.flatten(1).to(dense.dtype)], dim=1)


class FusedDotInteraction(nn.Module):
    """The dense feature, then the dot product of each pair of features: the lower triangle of Z = X X^T, row by row."""

    def __init__(self, num_features: int, dim: int, itself: bool):
        super().__init__()
        self.itself = itself
        self.width = dim + num_pairs(num_features, itself)
        self.multiplications = num_features**2 * dim  # for each sample

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """(B, D), (B, T, D) -> (B, D + pairs), in the type of `dense`."""
        return torch.ops.dlrm.dot_interaction(dense, pooled, self.itself)


class DotInteraction(FusedDotInteraction):
    """The same out of native operators."""

    def __init__(self, num_features: int, dim: int, itself: bool):
        super().__init__(num_features, dim, itself)
        row, column = torch.tril_indices(num_features, num_features, offset=0 if itself else -1)
        pairs = row * num_features + column
        places = torch.full((num_features**2,), len(pairs)).index_copy(0, pairs, torch.arange(len(pairs)))
        self.register_buffer("pairs", pairs.int(), persistent=False)
        self.register_buffer("places", places.int(), persistent=False)

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        features = torch.cat([dense[:, None], pooled.to(dense.dtype)], dim=1)  # (B, F, D)
        products = torch.bmm(features, features.transpose(1, 2)).flatten(1)  # (B, F * F)
        return torch.cat([dense, SelectColumns.apply(products, self.pairs, self.places)], dim=1)


class SelectColumns(torch.autograd.Function):
    """`matrix[:, columns]` for distinct columns, whose gradient is a selection, too. Plain indexing adds where it need
    not, and a Gaudi does that on the host."""

    @staticmethod
    def forward(ctx, matrix: Tensor, columns: Tensor, places: Tensor) -> Tensor:
        """`places`: for each column of the matrix its place in the result, or the width of the result."""
        ctx.save_for_backward(places)
        return matrix.index_select(1, columns)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return functional.pad(gradient, (0, 1)).index_select(1, *ctx.saved_tensors), None, None


# ---------------------------------------------------------------------------------------------------------------------
# Layers and their optimizers
# ---------------------------------------------------------------------------------------------------------------------


class DenseLayer(nn.Module):
    """x W^T + bias, then a ReLU if `relu`.

    With `shadows`, bfloat16 copies of weight and bias are what x meets, and are the leaves of autograd. The optimizer
    keeps them in step, so that no weight or gradient is converted in between. Weight and bias stay float32.
    """

    gradients_stay = False  # in the same memory, step after step
    products = PRODUCTS["default"]

    def __init__(self, weight: Tensor, bias: Tensor, relu: bool, shadows: bool = False):
        """(outputs, inputs) and (outputs,) float32."""
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.relu = relu
        self.shadows = [t.detach().bfloat16().requires_grad_() for t in (weight, bias)] if shadows else []

    @property
    def leaves(self) -> list[Tensor]:
        """Weight and bias as autograd sees them."""
        return self.shadows or [self.weight, self.bias]

    @property
    def gradients(self) -> list[Tensor]:
        return [leaf.grad for leaf in self.leaves]

    @gradients.setter
    def gradients(self, gradients: Sequence[Tensor]) -> None:
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient

    @torch.no_grad()
    def update_shadows(self) -> None:
        """After weight and bias were changed by others than the optimizer."""
        for shadow, parameter in zip(self.shadows, (self.weight, self.bias), strict=False):
            shadow.copy_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        output = functional.linear(x.to(self.leaves[0].dtype), *self.leaves)
        return functional.relu(output) if self.relu else output


class FusedLayer(DenseLayer):
    """The same by the given products of torch's on the CPU.

    Gradients keep their memory, and each backward overwrites them: fresh ones, of tens of megabytes, would cost more in
    page faults than in arithmetic.
    """

    gradients_stay = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        relu: bool,
        shadows: bool = False,
        products: Products = PRODUCTS["default"],
    ):
        super().__init__(weight, bias, relu, shadows)
        self.products = products
        self._gradients = []

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
        return FusedLinear.apply(x.to(self.leaves[0].dtype), *self.leaves, gradients, self.relu, self.products)


class FusedLinear(torch.autograd.Function):
    """x W^T + bias, then ReLU if `relu`, by the given products.

    The backward overwrites `gradients`, tensors like weight and bias, and tells autograd of none. x, weight and bias
    are of one type.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, gradients: Sequence[Tensor], relu: bool, products: Products
    ) -> Tensor:
        """(B, m), (n, m), (n,) -> (B, n)."""
        ctx.gradients, ctx.products = gradients, products
        output = products.output(x, weight, bias, relu)
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
        ctx.products.weight_gradient(columns, x, grad_weight)
        grad_bias.copy_(sums)
        grad_x = ctx.products.input_gradient(grad, weight) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, None


class FusedDenseSGD(torch.optim.Optimizer):
    """`dense_sgd_`, on the weights and biases of all layers in one pass."""

    def __init__(self, layers: Sequence[DenseLayer], lr: float):
        self._weights = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
        self._shadows = [shadow for layer in layers for shadow in layer.shadows]
        self._layers = layers
        super().__init__(self._weights, {"lr": lr})

    def zero_grad(self, set_to_none: bool = True) -> None:
        for layer in self._layers:
            for leaf in layer.leaves:
                leaf.grad = None

    @torch.no_grad()
    def step(self) -> None:
        gradients = [gradient for layer in self._layers for gradient in layer.gradients]
        self.update(gradients, self.param_groups[0]["lr"])

    def update(self, gradients: list[Tensor], lr: float) -> None:
        torch.ops.dlrm.dense_sgd_(self._weights, gradients, self._shadows, lr)


class FusedDenseAdagrad(FusedDenseSGD):
    """`dense_adagrad_`, likewise; `state[parameter]["sum"]` is the moment, of the parameter's shape."""

    def __init__(self, layers: Sequence[DenseLayer], lr: float, eps: float = 1e-10):
        super().__init__(layers, lr)
        self._eps = eps
        self._moments = zero_moments(self)

    def update(self, gradients: list[Tensor], lr: float) -> None:
        torch.ops.dlrm.dense_adagrad_(self._weights, self._moments, gradients, self._shadows, lr, self._eps)


class ForeachSGD(torch.optim.Optimizer):
    """SGD out of native operators. The learning rate is a tensor on the device: `torch.optim` would read it back."""

    def __init__(self, parameters: Sequence[Tensor], lr: Tensor):
        super().__init__(parameters, {"lr": lr})
        self._parameters = list(parameters)

    @torch.no_grad()
    def step(self) -> None:
        steps = self.directions([parameter.grad for parameter in self._parameters])
        torch._foreach_mul_(steps, self.param_groups[0]["lr"].view(()))
        torch._foreach_sub_(self._parameters, steps)

    def directions(self, gradients: list[Tensor]) -> list[Tensor]:
        """Tensors that may be overwritten: a gradient has done its work here."""
        return gradients


class ForeachAdagrad(ForeachSGD):
    """Adagrad likewise; `state[parameter]["sum"]` is the moment, of the parameter's shape."""

    def __init__(self, parameters: Sequence[Tensor], lr: Tensor, eps: float = 1e-10):
        super().__init__(parameters, lr)
        self._eps = eps
        self._moments = zero_moments(self)

    def directions(self, gradients: list[Tensor]) -> list[Tensor]:
        torch._foreach_addcmul_(self._moments, gradients, gradients)
        roots = torch._foreach_sqrt(self._moments)
        torch._foreach_add_(roots, self._eps)
        return torch._foreach_div(gradients, roots)


def zero_moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """New moments of all parameters, in their order, which are in the optimizer's state as well."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    for parameter, moment in zip(parameters, moments, strict=True):
        optimizer.state[parameter]["sum"] = moment
    return moments


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Where it is a tensor, in place, so that what a device recorded stays right."""
    for group in optimizer.param_groups:
        current = group.get("lr_t", group["lr"])  # FusedAdagrad's name for its tensor
        if isinstance(current, Tensor):
            current.copy_(torch.tensor([rate]))
        else:
            group["lr"] = rate


# ---------------------------------------------------------------------------------------------------------------------
# Back ends: all that differs from device to device
# ---------------------------------------------------------------------------------------------------------------------


class Backend:
    """What the training loop asks of a device. This class is right for the CPU, where work ends when a call returns."""

    wide_dtype = torch.float64  # for sums that the public script takes in it
    copies = False  # batches are copied from the host
    times_phases = True  # a time stamp within an iteration means something
    embedding_bags = EmbeddingBags
    sparse_optimizers: ClassVar = {
        "sgd": SparseSGD,
        "adagrad": SparseAdagrad,
        "rwsadagrad": SparseRowwiseAdagrad,
    }
    dense_optimizers: ClassVar = {
        "sgd": FusedDenseSGD,
        "adagrad": FusedDenseAdagrad,
        "rwsadagrad": FusedDenseAdagrad,  # its rows are a table's
    }
    interactions: ClassVar = {"cat": CatInteraction, "dot": FusedDotInteraction}
    coalesce_lookups = staticmethod(torch.ops.dlrm.coalesce_lookups)

    def __init__(self, device: torch.device, options: Options):
        self.device, self.mode, self.data_type = device, options.mode, options.data_type
        self._gemm, self._samples = options.gemm, options.samples_per_step // find_launch().size  # of this rank
        self.kernels = load_kernels()  # of the host: native, or reference

    @staticmethod
    def notes(options: Options) -> list[str]:
        """What the user should know before the run."""
        notes = []
        if options.device == "auto":
            notes.append(f"No Gaudi here ({why_no_gaudi()}): running on the CPU.")
        if options.mode == "lazy":
            notes.append("Lazy mode is a Gaudi's; here it equals eager mode.")
        return notes

    @property
    def name(self) -> str:
        """The model of the device."""
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    def layer(self, weight: Tensor, bias: Tensor, relu: bool) -> DenseLayer:
        shadows = self.data_type == "bf16"
        if self.mode == "compile":
            return DenseLayer(weight, bias, relu, shadows)  # the compiler fuses by itself
        outputs, inputs = weight.shape
        products = bf16_products() if shadows else fp32_products(self._gemm, self._samples, inputs, outputs)
        return FusedLayer(weight, bias, relu, shadows, products)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Where bf16 needs it; here, layers have bf16 weights."""
        return contextlib.nullcontext()

    def compile(self, function: Callable) -> Callable:
        """`function` as `--mode` wants it; UsageError where that can't be."""
        if self.mode != "compile":
            return function
        try:
            find_compiler()
        except BuildError as error:
            raise UsageError(f"--mode=compile: {error}; install g++, or use --mode=eager") from None
        return torch.compile(function, dynamic=False, fullgraph=True)

    def dense_optimizer(self, layers: Sequence[DenseLayer], options: Options) -> torch.optim.Optimizer:
        return self.dense_optimizers[options.optimizer](layers, lr=self.learning_rate(options))

    def sparse_optimizer(self, embeddings: EmbeddingBags, options: Options) -> SparseOptimizer:
        optimizers = embeddings.optimizers or self.sparse_optimizers
        return optimizers[options.optimizer](embeddings, lr=self.learning_rate(options))

    def learning_rate(self, options: Options) -> LearningRate:
        """The base rate, in the form that optimizers take."""
        return options.learning_rate

    def repeated(self, step: Callable) -> Callable:
        """What to call in place of `step` time and again, always with the same tensors. It returns what `step` does,
        which may be overwritten by the next call."""
        return step

    def mark_step(self) -> None:
        """Ends the recording of a graph, where a device records one."""

    def synchronize(self) -> None:
        """Waits until the device has done all it was given."""

    def waiter(self) -> Callable[[], None]:
        """A function that waits until the device has done what it was given up to now."""
        return lambda: None

    def timestamp(self):
        """A moment in the device's work, for `elapsed_ms`."""
        return time.perf_counter()

    def elapsed_ms(self, start, end) -> float:
        """Milliseconds from one `timestamp` to a later one; call after `synchronize`."""
        return 1000 * (end - start)

    def memory_limit(self) -> int:
        """Bytes that a new run can take."""
        return memory.free_memory()

    def memory_in_use(self) -> tuple[int, int]:
        """Bytes in use now, and at most so far."""
        return memory.memory_in_use()


class AcceleratorBackend(Backend):
    """What devices have in common that work beside the host, and for which we have no kernels of our own."""

    copies = True
    embedding_bags = StaticEmbeddingBags
    sparse_optimizers: ClassVar = {
        "sgd": StaticSGD,
        "adagrad": StaticAdagrad,
        "rwsadagrad": StaticRowwiseAdagrad,
    }
    dense_optimizers: ClassVar = {"sgd": ForeachSGD, "adagrad": ForeachAdagrad, "rwsadagrad": ForeachAdagrad}
    interactions: ClassVar = {"cat": CatInteraction, "dot": DotInteraction}

    def __init__(self, device: torch.device, options: Options):
        if options.special_tables:
            raise UsageError(f"{options.special_tables} works on the CPU alone; use --device=cpu")
        if options.table_data_type != "fp32":
            raise UsageError("--table-data-type=bf16 works on the CPU alone; use --device=cpu")
        super().__init__(device, options)

    def layer(self, weight: Tensor, bias: Tensor, relu: bool) -> DenseLayer:
        return DenseLayer(weight, bias, relu)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.data_type == "bf16")

    def dense_optimizer(self, layers: Sequence[DenseLayer], options: Options) -> torch.optim.Optimizer:
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        return self.dense_optimizers[options.optimizer](parameters, lr=self.learning_rate(options))

    def learning_rate(self, options: Options) -> Tensor:
        return torch.full((1,), options.learning_rate, device=self.device)


class CudaBackend(AcceleratorBackend):
    """A CUDA GPU."""

    def __init__(self, device: torch.device, options: Options):
        super().__init__(device, options)
        torch.cuda.set_device(device)  # events go to the current device's stream

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def waiter(self) -> Callable[[], None]:
        return self.timestamp().synchronize

    def timestamp(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start, end) -> float:
        return start.elapsed_time(end)

    def memory_limit(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def memory_in_use(self) -> tuple[int, int]:
        return torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)


class HpuBackend(AcceleratorBackend):
    """A Gaudi, through habana-torch-plugin 1.19 or newer.

    In lazy mode Adagrad runs on the plugin's kernels. Everywhere else, and for SGD (whose sparse kernel the plugin's
    source calls wrong), tables are read and updated by native operators of static shapes: the plugin's kernels refuse
    to run there, and torch's embedding bag and `index_add_` would silently run on the host. With `--hpu-graphs`, too,
    operators are native: the plugin's dense Adagrad begins with a mark of a step, which would cut a recording in two.
    """

    wide_dtype = torch.float32
    oldest = (1, 19)

    def __init__(self, device: torch.device, options: Options):
        super().__init__(device, options)
        import habana_frameworks.torch.core as htcore

        self._htcore, self._lazy, self._records = htcore, options.mode == "lazy", options.hpu_graphs
        self.times_phases = not self._lazy  # there, work starts at the end of the step
        self._uses_kernels = self._lazy and not self._records and options.optimizer == "adagrad"
        if self._uses_kernels:
            self.embedding_bags, self.sparse_optimizers = HpexEmbeddingBags, {"adagrad": HpexAdagrad}
        if options.lookup_preprocessing == "plugin":
            self.coalesce_lookups = coalesce_lookups_by_plugin
        if self._lazy:
            self._set_lazy_passes(options.optimizer)

    @staticmethod
    def notes(options: Options) -> list[str]:
        if options.hmp_opt_level == "O1" and not options.hmp_verbose:
            return []
        return ["--hmp-opt-level and --hmp-verbose do nothing: torch.autocast took the place of hmp."]

    @staticmethod
    def _set_lazy_passes(optimizer: str) -> None:
        """As Habana's fork set them; the switches are private by now, and may go."""
        from habana_frameworks.torch.utils import debug

        passes = {"fuse_t_mm_optimization": True}
        if optimizer == "adagrad":
            passes |= {"eliminate_common_subexpression": False, "constant_pooling": False}
        for name, wanted in passes.items():
            getattr(debug, f"_enable_{name}", lambda flag: None)(wanted)

    @property
    def name(self) -> str:
        return torch.hpu.get_device_name()

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, backend="hpu_backend", dynamic=False) if self.mode == "compile" else function

    def dense_optimizer(self, layers: Sequence[DenseLayer], options: Options) -> torch.optim.Optimizer:
        if not self._uses_kernels:
            return super().dense_optimizer(layers, options)
        from habana_frameworks.torch.hpex.optimizers import FusedAdagrad

        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        return FusedAdagrad(parameters, lr=options.learning_rate)

    def repeated(self, step: Callable) -> Callable:
        return RecordedStep(step) if self._records else step

    def mark_step(self) -> None:
        if self._lazy:
            self._htcore.mark_step()

    def synchronize(self) -> None:
        self.mark_step()
        torch.hpu.synchronize()

    def waiter(self) -> Callable[[], None]:
        event = torch.hpu.Event()
        event.record()
        return event.synchronize

    def timestamp(self):
        event = torch.hpu.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start, end) -> float:
        return start.elapsed_time(end)

    def memory_limit(self) -> int:
        return torch.hpu.mem_get_info()[0]

    def memory_in_use(self) -> tuple[int, int]:
        return torch.hpu.memory_allocated(), torch.hpu.max_memory_allocated()


class RecordedStep:
    """`step`, of which a Gaudi records the work once, in lazy mode, and then does it again on the same tensors."""

    warm_up = 2  # calls in which graphs are compiled

    def __init__(self, step: Callable):
        self._step, self._calls = step, 0
        self._graph, self._results = torch.hpu.HPUGraph(), None

    def __call__(self, *arguments):
        self._calls += 1
        if self._calls <= self.warm_up:
            return self._step(*arguments)
        if self._results is None:
            with torch.hpu.graph(self._graph):  # other than a CUDA graph's, its work is done while it is recorded
                self._results = self._step(*arguments)
        else:
            self._graph.replay()
        return self._results


def why_no_gaudi() -> str:
    """What keeps a Gaudi from being used; empty where nothing does."""
    if importlib.util.find_spec("habana_frameworks") is None:
        return "habana-torch-plugin is not installed"
    import habana_frameworks.torch.core  # noqa: F401 - brings torch.hpu

    return "" if torch.hpu.is_available() else "habana-torch-plugin finds no device"


def check_gaudi(options: Options) -> None:
    """UsageError, in one line that says what to do, where there is no Gaudi, or its plugin is old, or was loaded in the
    other mode."""
    if reason := why_no_gaudi():
        raise UsageError(
            f"--device=hpu: {reason}; use Intel's Gaudi container or installer, see what hl-smi prints and whether "
            "HABANA_VISIBLE_DEVICES is set, or use --device=cpu"
        )
    release = importlib.metadata.version("habana-torch-plugin")
    if tuple(map(int, release.split(".")[:2])) < HpuBackend.oldest:
        oldest = ".".join(map(str, HpuBackend.oldest))
        raise UsageError(f"--device=hpu: habana-torch-plugin {release} is too old; {oldest} or newer is needed")
    from habana_frameworks.torch.utils.internal import is_lazy

    if is_lazy() != (options.mode == "lazy"):
        needed = gaudi_environment(options)["PT_HPU_LAZY_MODE"]
        raise UsageError(
            f"--mode={options.mode} needs PT_HPU_LAZY_MODE={needed} before torch is imported; start demo_dlrm.py or "
            "dlrm_s_pytorch.py as a program"
        )
    if options.hpu_graphs and not hasattr(torch.hpu, "HPUGraph"):
        raise UsageError(f"--hpu-graphs: habana-torch-plugin {release} has no torch.hpu.HPUGraph; leave the flag out")


def select_backend(options: Options) -> Backend:
    """The back end that `--device` names; UsageError, saying what to do, where that device is not to be had."""
    if options.device == "hpu" or (options.device == "auto" and not why_no_gaudi()):
        check_gaudi(options)
        return HpuBackend(torch.device("hpu"), options)
    if options.hpu_graphs:
        raise UsageError("--hpu-graphs works on a Gaudi alone; use --device=hpu, or leave the flag out")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch finds no CUDA GPU here; use --device=cpu")
    if options.device == "cuda":
        return CudaBackend(torch.device("cuda", find_launch().local_rank), options)
    memory.keep_freed_memory()
    return Backend(torch.device("cpu"), options)
