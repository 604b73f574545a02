"""Interactions: how the dense feature and the pooled rows of a sample become the input of the top MLP.

B batch, T tables, F = T + 1 features, D embedding dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.kernels.ops import num_pairs


class CatInteraction(nn.Module):
    """All features side by side."""

    multiplications = 0  # per sample

    def __init__(self, num_features: int, dim: int, itself: bool):
        """`itself` has no meaning here; the constructors of all interactions take the same arguments."""
        super().__init__()
        self.width = num_features * dim

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """(B, D), (B, T, D) -> (B, F * D), in the type of `dense`."""
        return torch.cat([dense, pooled.flatten(1).to(dense.dtype)], dim=1)


class DotInteraction(nn.Module):
    """The dense feature, then the dot product of each pair of features: the lower triangle of X X^T, row by row, where
    the rows of X are the features. With `itself`, each feature is also paired with itself."""

    def __init__(self, num_features: int, dim: int, itself: bool):
        super().__init__()
        self.itself = itself
        self.width = dim + num_pairs(num_features, itself)
        self.multiplications = num_features**2 * dim  # per sample

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """(B, D), (B, T, D) -> (B, D + pairs), in the type of `dense`."""
        raise NotImplementedError


class FusedDotInteraction(DotInteraction):
    """The dot interaction by `dlrm::dot_interaction`."""

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        return torch.ops.dlrm.dot_interaction(dense, pooled, self.itself)


class NativeDotInteraction(DotInteraction):
    """The dot interaction out of native operators."""

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
    """Selects distinct columns of a matrix, with a gradient that is a selection, too.

    The gradient of plain indexing adds up, which distinct columns do not need, and which a Gaudi does on the host.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor, columns: Tensor, places: Tensor) -> Tensor:
        """Returns `matrix[:, columns]`. `places` holds, for each column of the matrix, its place in the result, or the
        width of the result if it is not in it."""
        ctx.save_for_backward(places)
        return matrix.index_select(1, columns)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return functional.pad(gradient, (0, 1)).index_select(1, *ctx.saved_tensors), None, None
