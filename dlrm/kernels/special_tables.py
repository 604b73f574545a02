"""Tables by tricks: quotient-remainder and mixed-dimension tables, and weighted pooling. Plain torch, on the CPU.

Tables of more rows than `--qr-threshold` or `--md-threshold` are made smaller; the others stay as they are. Where the
public script works and is right, the numbers are its own: so are the generators, the order in which they are asked,
and the names of the weights.

    quotient-remainder  Shi et al., arXiv:1909.02107. Row i is found at i // C of one table and i % C of another, for
                        C collisions. What is multiplied, added or concatenated are the two sums over the bag.
    mixed dimension     Ginart et al., arXiv:1909.11810. A table of n rows holds D (n_min / n)^temperature numbers in
                        each, and a matrix takes the sum over the bag to D.
    weighted pooling    Each row has a weight, which multiplies it in the sum over the bag.
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

SumBags = Callable[[Tensor, Tensor], Tensor]  # (weight (n, d), rows (lookups,)) -> (B, d), the sum over each bag
Draw = Callable[[int, int], Tensor]  # (rows, dim) -> a table, uniform in +-sqrt(1 / rows)

# ---------------------------------------------------------------------------------------------------------------------
# Tables: what each makes of its lookups, given how bags are summed
# ---------------------------------------------------------------------------------------------------------------------


class OrdinaryTable(nn.Module):
    """A row for each row."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, rows: Tensor, sum_bags: SumBags) -> Tensor:
        return sum_bags(self.weight, rows)


class QuotientRemainderTable(nn.Module):
    def __init__(self, rows: int, dim: int, collisions: int, operation: str, init: str):
        """`dim` is that of either table; concatenated, they give twice as much."""
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
    """Of the uniform distribution that both tables are drawn from.

    A row composed of the two has the variance of an ordinary table's row, 1 / (3 rows). The public script means
    +-sqrt(1 / rows), but says sqrt(1 / rows) to 1: all weights are positive, and the first losses enormous.
    """
    if init == "public":
        return np.sqrt(1 / rows), 1.0
    bound = {"mult": (3 / rows) ** 0.25, "add": (0.5 / rows) ** 0.5, "concat": (1 / rows) ** 0.5}[operation]
    return -bound, bound


class MixedDimensionTable(nn.Module):
    def __init__(self, rows: int, own_dim: int, dim: int, draw: Draw):
        super().__init__()
        self.embs = nn.EmbeddingBag(rows, own_dim)
        nn.init.xavier_uniform_(self.embs.weight)  # in the public script, too, for nothing; so the next draw is its own
        self.proj = nn.Linear(own_dim, dim, bias=False) if own_dim < dim else nn.Identity()
        if own_dim < dim:
            nn.init.xavier_uniform_(self.proj.weight)
        self.embs.weight = nn.Parameter(draw(rows, own_dim))

    def forward(self, rows: Tensor, sum_bags: SumBags) -> Tensor:
        return self.proj(sum_bags(self.embs.weight, rows))


def mixed_dimensions(options: Options) -> list[int]:
    """Numbers in a row of each table."""
    rows, dim = torch.tensor(options.arch_embedding_size), options.arch_sparse_feature_size
    dims = dim * rows.min() ** options.md_temperature * rows ** (-options.md_temperature)
    dims = dims.round().clamp(1, dim)
    if options.md_round_dims:
        dims = (2 ** dims.log2().round()).clamp(1, dim)
    return torch.where(rows > options.md_threshold, dims, dim).int().tolist()


def table_numbers(options: Options) -> int:
    """Weights in all tables."""
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
# All tables of a model, in the place of `EmbeddingBags`
# ---------------------------------------------------------------------------------------------------------------------


class SpecialSGD(torch.optim.SGD):
    """SGD on the gradients that autograd leaves in the tables, most of which are sparse."""

    def __init__(self, tables: SpecialTables, lr: float):
        super().__init__(tables.weights, lr=lr)

    def step(self, lookups: Lookups) -> None:
        """Updates the tables after a backward pass, and drops the gradients. `lookups` are not needed."""
        super().step()
        self.zero_grad()


class SpecialAdagrad(torch.optim.Adagrad):
    """Adagrad on the gradients that autograd leaves in the tables, most of which are sparse."""

    def __init__(self, tables: SpecialTables, lr: float):
        super().__init__(tables.weights, lr=lr)

    def step(self, lookups: Lookups) -> None:
        """Updates the tables after a backward pass, and drops the gradients. `lookups` are not needed."""
        super().step()
        self.zero_grad()


class SpecialTables(nn.ModuleList):
    """Tables that are leaves of autograd, each of its own kind."""

    lookups_type = PreparedLookups
    optimizers: ClassVar = {"sgd": SpecialSGD, "adagrad": SpecialAdagrad}

    def __init__(self, options: Options, draw: Draw):
        super().__init__()
        if options.optimizer not in self.optimizers:
            raise UsageError(f"--optimizer={options.optimizer} does not work with {options.special_tables}")
        torch.sparse.check_sparse_tensor_invariants.disable()  # as by default, but then torch warns of it
        dims = mixed_dimensions(options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.numpy_rand_seed)
            for rows, own_dim in zip(options.arch_embedding_size, dims, strict=True):
                self.append(self._make(options, rows, own_dim, draw))
        # Weights of rows; not registered here, but by the model, under the name that checkpoints have for them.
        self.row_weights = [torch.ones(rows) for rows in options.arch_embedding_size if options.weighted_pooling]
        if options.weighted_pooling == "learned":
            self.row_weights = [nn.Parameter(weights) for weights in self.row_weights]

    @staticmethod
    def _make(options: Options, rows: int, own_dim: int, draw: Draw) -> nn.Module:
        if options.qr_flag and rows > options.qr_threshold:
            dim, collisions = options.arch_sparse_feature_size, options.qr_collisions
            return QuotientRemainderTable(rows, dim, collisions, options.qr_operation, options.qr_init)
        if options.md_flag and rows > options.md_threshold:
            return MixedDimensionTable(rows, own_dim, options.embedding_dim, draw)
        torch.empty(rows, options.embedding_dim).normal_()  # as the public script's modules do, before it fills them
        return OrdinaryTable(draw(rows, options.embedding_dim))

    @property
    def learned_row_weights(self) -> list[nn.Parameter]:
        return [weights for weights in self.row_weights if isinstance(weights, nn.Parameter)]

    @property
    def weights(self) -> list[nn.Parameter]:
        """All that is learned."""
        return [*self.parameters(), *self.learned_row_weights]

    def forward(self, lookups: PreparedLookups) -> Tensor:
        """The sum of each bag, (B, T, D)."""
        bags = zip(lookups.indices_fwd, lookups.offsets, strict=True)
        return torch.stack([self.look_up(t, rows[: starts[-1]], starts) for t, (rows, starts) in enumerate(bags)], 1)

    def look_up(self, t: int, rows: Tensor, starts: Tensor) -> Tensor:
        """In one table: (lookups,), (B + 1,) -> (B, D)."""
        rows, starts = rows.long(), starts.long()
        row_weights = self.row_weights[t][rows] if self.row_weights else None

        def sum_bags(weight: Tensor, rows: Tensor) -> Tensor:
            return functional.embedding_bag(
                rows,
                weight,
                starts,
                mode="sum",
                sparse=True,
                per_sample_weights=row_weights,
                include_last_offset=True,
            )

        return self[t](rows, sum_bags)

    def pool(self, rows: Tensor, lookups: PreparedLookups) -> Tensor:
        """Returns the sum over each bag, (B, T, D). Here `forward` has already summed the rows."""
        return rows
