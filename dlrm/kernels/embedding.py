"""Embedding bags and their sparse optimizers, made of the ops in `ops.py`.

The tables are not leaves of autograd; the rows read from them are. The backward pass of a sum bag is itself a sum bag:
row r of a table receives the gradients of all bags that looked it up. So the gradient of the pooled rows, (B, T, D),
and the lookups grouped by row are all that a sparse optimizer needs, and no gradient of a table's size ever exists.

B batch, T tables, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from dlrm.kernels.lookups import Lookups, PreparedLookups
from dlrm.kernels.ops import rounding_seeds

# ---------------------------------------------------------------------------------------------------------------------
# Embedding bags
# ---------------------------------------------------------------------------------------------------------------------


class EmbeddingTable(nn.Module):
    """The rows of one table. A module of its own, so that checkpoints name it `emb_l.0.weight`, as they always have."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        torch.ops.dlrm.advise_huge_pages(self.weight)


class EmbeddingBags(nn.ModuleList):
    """All tables of a model, or the pieces of tables that one of several ranks holds."""

    lookups_type: ClassVar = PreparedLookups  # the form in which it takes the lookups of a batch
    optimizers: ClassVar = {}  # by the name that --optimizer has for them; where empty, the back end's are used
    learned_row_weights: Sequence[nn.Parameter] = ()  # none, but for weighted pooling

    def __init__(self, tables: Iterable[Tensor], origins: Sequence[tuple[int, int]] = ()):
        """`tables`: (rows, D) each, float32 or bfloat16. `origins`: for each piece of a table, the table's number and
        the piece's first row in it; none for whole tables."""
        super().__init__(map(EmbeddingTable, tables))
        self.origins = origins or [(number, 0) for number in range(len(self))]

    @staticmethod
    def bytes_per_lookup(dim: int) -> int:
        """Returns the bytes that a lookup of a batch takes: as drawn, and in four tensors of two `PreparedLookups`."""
        return 8 + 2 * 4 * 4

    @property
    def weights(self) -> list[Tensor]:
        """The rows of each table, (rows, D)."""
        return [table.weight for table in self]

    def forward(self, lookups: Lookups) -> Tensor:
        """Reads the rows that a batch looks up, in the form that `pool` takes.

        While gradients are on, the result is a leaf of autograd, and is left in `lookups.rows` as well.
        """
        rows = self.read(lookups)
        if torch.is_grad_enabled():
            lookups.rows = rows.requires_grad_()
        return rows

    def read(self, lookups: PreparedLookups) -> Tensor:
        """Returns the sum over each bag of the rows that it looks up, (B, T, D) float32."""
        return torch.ops.dlrm.embedding_bag_sum(self.weights, *lookups.bagged())

    def pool(self, rows: Tensor, lookups: PreparedLookups) -> Tensor:
        """Returns the sum over each bag, (B, T, D). Here `read` has already summed them."""
        return rows


# ---------------------------------------------------------------------------------------------------------------------
# Sparse optimizers
# ---------------------------------------------------------------------------------------------------------------------

LearningRate = float | Tensor  # a tensor of one element on devices that record the values they are given


class SparseOptimizer(torch.optim.Optimizer):
    """Updates the rows of an `EmbeddingBags` that a batch has looked up."""

    def __init__(self, embeddings: EmbeddingBags, **defaults: LearningRate):
        super().__init__(embeddings.weights, defaults)
        self.embeddings = embeddings
        self.updates = 0  # number of steps so far, which random rounding depends on
        self._rounds = embeddings.weights[0].dtype == torch.bfloat16

    @property
    def seeds(self) -> list[int] | None:
        """Seeds for the random rounding of the next update, one per table; None for float32 tables."""
        return rounding_seeds(self.updates, *zip(*self.embeddings.origins, strict=True)) if self._rounds else None

    @torch.no_grad()
    def step(self, lookups: Lookups) -> None:
        """Updates the tables after a backward pass. Takes the rows, with their gradient, out of `lookups`."""
        rows, lookups.rows = lookups.rows, None
        self.update(rows, lookups)
        self.updates += 1

    def update(self, rows: Tensor, lookups: Lookups) -> None:
        """Updates the tables from what `EmbeddingBags.read` returned for these lookups, and its gradient."""
        raise NotImplementedError


class SparseAdagrad(SparseOptimizer):
    """Adagrad by `dlrm::sparse_adagrad_`. The moment, `state[weight]["sum"]`, is (rows, D) float32."""

    update_tables_ = torch.ops.dlrm.sparse_adagrad_

    def __init__(
        self,
        embeddings: EmbeddingBags,
        lr: LearningRate,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
    ):
        super().__init__(embeddings, lr=lr, eps=eps)
        self.moments = [self.zero_moment(weight) for weight in embeddings.weights]
        for weight, moment in zip(embeddings.weights, self.moments, strict=True):
            torch.ops.dlrm.advise_huge_pages(moment)
            if initial_accumulator_value:  # or else the system gives the zeros when a row is first looked up
                moment.fill_(initial_accumulator_value)
            self.state[weight]["sum"] = moment

    def update(self, rows: Tensor, lookups: PreparedLookups) -> None:
        group = self.param_groups[0]
        rates = group["lr"], group["eps"], self.seeds
        self.update_tables_(self.embeddings.weights, self.moments, rows.grad, *lookups.grouped(), *rates)

    @staticmethod
    def zero_moment(weight: Tensor) -> Tensor:
        return torch.zeros_like(weight, dtype=torch.float32)


class SparseRowwiseAdagrad(SparseAdagrad):
    """Row-wise Adagrad by `dlrm::sparse_rowwise_adagrad_`. The moment, `state[weight]["sum"]`, is (rows,) float32."""

    update_tables_ = torch.ops.dlrm.sparse_rowwise_adagrad_

    @staticmethod
    def zero_moment(weight: Tensor) -> Tensor:
        return torch.zeros(len(weight), device=weight.device)


class SparseSGD(SparseOptimizer):
    """SGD by `dlrm::sparse_sgd_`."""

    def __init__(self, embeddings: EmbeddingBags, lr: LearningRate):
        super().__init__(embeddings, lr=lr)

    def update(self, rows: Tensor, lookups: PreparedLookups) -> None:
        lr = self.param_groups[0]["lr"]
        torch.ops.dlrm.sparse_sgd_(self.embeddings.weights, rows.grad, *lookups.grouped(), lr, self.seeds)
