"""Special tables: quotient-remainder tables, mixed-dimension tables and weighted pooling, in plain torch on the CPU.

Tables with more rows than `--qr-threshold` or `--md-threshold` are made smaller; the others stay as they are. Where the
reference script works and is right, the numbers here equal its numbers. Random numbers come from the same generators in
the same order, and the weights have the same names.

    quotient-remainder  Shi et al., arXiv:1909.02107. With C collisions, row i is made of row i // C of one table and
                        row i % C of another. For each bag, the rows of either table are summed, and the two sums are
                        multiplied, added or concatenated.
    mixed dimension     Ginart et al., arXiv:1909.11810. Each row of a table of n rows has D (n_min / n)^temperature
                        numbers, where n_min is the number of rows of the smallest table. A matrix takes the sum over
                        the bag to D numbers.
    weighted pooling    Each row has a weight, which multiplies the row in the sum over the bag.

B batch, T tables, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.errors import UsageError
from dlrm.kernels.lookups import Lookups, PreparedLookups
from dlrm.options import Options

SumBags = Callable[[Tensor, Tensor], Tensor]  # (weight (n, d), rows (lookups,)) -> the sum over each bag, (B, d)
Draw = Callable[[int, int], Tensor]  # (rows, dim) -> a table (rows, dim), uniform in +-sqrt(1 / rows)

# ---------------------------------------------------------------------------------------------------------------------
# Tables: each computes its pooled rows, given a function that sums bags
# ---------------------------------------------------------------------------------------------------------------------


class OrdinaryTable(nn.Module):
    """A table that holds every row itself."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, rows: Tensor, sum_bags: SumBags) -> Tensor:
        """Returns the sum over each bag of the given rows (lookups,), (B, D)."""
        return sum_bags(self.weight, rows)


class QuotientRemainderTable(nn.Module):
    """A table whose row i is composed of row i // C of one small table and row i % C of another, for C collisions."""

    def __init__(self, rows: int, dim: int, collisions: int, operation: str, init: str):
        """`dim` is the dimension of either small table; `operation`: mult, add, or concat, which gives 2 * dim."""
        super().__init__()
        self.collisions, self.operation = collisions, operation
        self.weight_q = nn.Parameter(torch.empty(-(-rows // collisions), dim))
        self.weight_r = nn.Parameter(torch.empty(collisions, dim))
        low, high = qr_bounds(rows, operation, init)
        for weight in self.parameters():
            nn.init.uniform_(weight, low, high)

    def forward(self, rows: Tensor, sum_bags: SumBags) -> Tensor:
        quotient = sum_bags(self.weight_q, rows // self.collisions)
        remainder = sum_bags(self.weight_r, rows % self.collisions)
        if self.operation == "concat":
            return torch.cat([quotient, remainder], dim=1)
        return quotient + remainder if self.operation == "add" else quotient * remainder


def qr_bounds(rows: int, operation: str, init: str) -> tuple[float, float]:
    """Returns the bounds of the uniform distribution that both small tables are drawn from.

    A composed row has the variance of an ordinary table's row, 1 / (3 rows). The exception is the `init` "public",
    which repeats the reference script. That script means +-sqrt(1 / rows) but says sqrt(1 / rows) to 1, so that all
    weights are positive and the first losses enormous.
    """
    if init == "public":
        return np.sqrt(1 / rows), 1.0
    bound = {"mult": (3 / rows) ** 0.25, "add": (0.5 / rows) ** 0.5, "concat": (1 / rows) ** 0.5}[operation]
    return -bound, bound


class MixedDimensionTable(nn.Module):
    """A table with rows of `own_dim` numbers, and a matrix that takes the sum over a bag to `dim` numbers."""

    def __init__(self, rows: int, own_dim: int, dim: int, draw: Draw):
        super().__init__()
        self.embs = nn.EmbeddingBag(rows, own_dim)
        nn.init.xavier_uniform_(self.embs.weight)  # keeps the reference script's order of draws; overwritten below
        self.proj = nn.Linear(own_dim, dim, bias=False) if own_dim < dim else nn.Identity()
        if own_dim < dim:
            nn.init.xavier_uniform_(self.proj.weight)
        self.embs.weight = nn.Parameter(draw(rows, own_dim))

    def forward(self, rows: Tensor, sum_bags: SumBags) -> Tensor:
        return self.proj(sum_bags(self.embs.weight, rows))


def mixed_dimensions(options: Options) -> list[int]:
    """Returns for each table the dimension of its rows."""
    rows, dim = torch.tensor(options.arch_embedding_size), options.arch_sparse_feature_size
    dims = dim * rows.min() ** options.md_temperature * rows ** (-options.md_temperature)
    dims = dims.round().clamp(1, dim)
    if options.md_round_dims:
        dims = (2 ** dims.log2().round()).clamp(1, dim)
    return torch.where(rows > options.md_threshold, dims, dim).int().tolist()


def table_numbers(options: Options) -> int:
    """Returns the number of weights in all tables, projections and weights of rows included."""
    dims = mixed_dimensions(options) if options.md_flag else [options.embedding_dim] * len(options.arch_embedding_size)
    total = 0
    for rows, dim in zip(options.arch_embedding_size, dims, strict=True):
        if options.qr_flag and rows > options.qr_threshold:
            total += (-(-rows // options.qr_collisions) + options.qr_collisions) * options.arch_sparse_feature_size
        else:
            total += rows * dim + (dim * options.embedding_dim if dim < options.embedding_dim else 0)
        total += rows if options.weighted_pooling else 0
    return total


# ---------------------------------------------------------------------------------------------------------------------
# All tables of a model: `SpecialTables` takes the place of `EmbeddingBags`
# ---------------------------------------------------------------------------------------------------------------------


class SpecialOptimizer(torch.optim.Optimizer):
    """Updates tables by the gradients that autograd leaves in them, most of which are sparse.

    The rule is that of the optimizer of torch.optim from which a subclass inherits as well.
    """

    def __init__(self, tables: SpecialTables, lr: float, **settings: float):
        super().__init__(tables.weights, lr=lr, **settings)

    def step(self, lookups: Lookups) -> None:
        """Updates the tables after a backward pass, and drops the gradients. `lookups` are not needed."""
        super().step()
        self.zero_grad()


class SpecialSGD(SpecialOptimizer, torch.optim.SGD):
    """SGD on a `SpecialTables`."""


class SpecialAdagrad(SpecialOptimizer, torch.optim.Adagrad):
    """Adagrad on a `SpecialTables`."""


class SpecialTables(nn.ModuleList):
    """All tables of a model, each of its own kind. Unlike those of an `EmbeddingBags`, they are leaves of autograd."""

    lookups_type = PreparedLookups
    optimizers: ClassVar = {"sgd": SpecialSGD, "adagrad": SpecialAdagrad}

    def __init__(self, options: Options, draw: Draw):
        super().__init__()
        if options.optimizer not in self.optimizers:
            raise UsageError(f"--optimizer={options.optimizer} does not work with {options.special_tables}")
        torch.sparse.check_sparse_tensor_invariants.disable()  # the default, but torch warns unless it is set
        dims = mixed_dimensions(options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.numpy_rand_seed)
            for rows, own_dim in zip(options.arch_embedding_size, dims, strict=True):
                self.append(self._make_table(options, rows, own_dim, draw))
        # The weights of rows are registered by the model, under the name that checkpoints have for them, not here.
        self.row_weights = [torch.ones(rows) for rows in options.arch_embedding_size if options.weighted_pooling]
        if options.weighted_pooling == "learned":
            self.row_weights = [nn.Parameter(weights) for weights in self.row_weights]

    @staticmethod
    def _make_table(options: Options, rows: int, own_dim: int, draw: Draw) -> nn.Module:
        if options.qr_flag and rows > options.qr_threshold:
            dim, collisions = options.arch_sparse_feature_size, options.qr_collisions
            return QuotientRemainderTable(rows, dim, collisions, options.qr_operation, options.qr_init)
        if options.md_flag and rows > options.md_threshold:
            return MixedDimensionTable(rows, own_dim, options.embedding_dim, draw)
        torch.empty(rows, options.embedding_dim).normal_()  # keeps the reference script's order of draws
        return OrdinaryTable(draw(rows, options.embedding_dim))

    @property
    def learned_row_weights(self) -> list[nn.Parameter]:
        """The weights of rows that training changes, (rows,) per table; empty unless --weighted-pooling=learned."""
        return [weights for weights in self.row_weights if isinstance(weights, nn.Parameter)]

    @property
    def weights(self) -> list[nn.Parameter]:
        """All parameters of all tables, and the learned weights of rows."""
        return [*self.parameters(), *self.learned_row_weights]

    def forward(self, lookups: PreparedLookups) -> Tensor:
        """Returns the sum over each bag, (B, T, D)."""
        per_table = enumerate((table.indices_fwd, table.offsets) for table in lookups.by_table())
        return torch.stack([self.look_up(t, rows[: offsets[-1]], offsets) for t, (rows, offsets) in per_table], dim=1)

    def look_up(self, t: int, rows: Tensor, offsets: Tensor) -> Tensor:
        """Returns the sum over each bag of table t, (B, D). `rows`: (lookups,); `offsets`: (B + 1,)."""
        rows, offsets = rows.long(), offsets.long()
        row_weights = self.row_weights[t][rows] if self.row_weights else None

        def sum_bags(weight: Tensor, rows: Tensor) -> Tensor:
            return functional.embedding_bag(
                rows,
                weight,
                offsets,
                mode="sum",
                sparse=True,
                per_sample_weights=row_weights,
                include_last_offset=True,
            )

        return self[t](rows, sum_bags)

    def pool(self, rows: Tensor, lookups: PreparedLookups) -> Tensor:
        """Returns the sum over each bag, (B, T, D). Here `forward` has already summed the rows."""
        return rows
