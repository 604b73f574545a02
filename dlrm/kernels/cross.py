"""Cross layers, through which all features of a sample multiply each other (R. Wang et al., "DCN V2", WWW 2021).

B batch, W width of all features side by side, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from dlrm.kernels.dense import DenseLayer


class CrossLayer(nn.Module):
    """x0 * (W (V x) + b) + x, or x0 * (W x + b) + x without V."""

    def __init__(self, down: DenseLayer | None, up: DenseLayer):
        """`down`: V, (R, W), without a bias; `up`: W, (W, R), or (W, W) without `down`, and its bias b, (W,)."""
        super().__init__()
        self.down, self.up = down, up

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        """(B, W), (B, W) -> (B, W). `first` is the input of the first cross layer, x0."""
        product = self.up(x if self.down is None else self.down(x))
        return first * product + x


class CrossNet(nn.Sequential):
    """Cross layers; without any, the output is the input."""

    def __init__(self, layers: Iterable[CrossLayer] = ()):
        super().__init__(*layers)

    def forward(self, first: Tensor) -> Tensor:
        """(B, W) -> (B, W)."""
        x = first
        for layer in self:
            x = layer(first, x)
        return x

    def dense_layers(self) -> list[DenseLayer]:
        """Returns the layers that multiply, in the order in which they do."""
        return [layer for cross in self for layer in (cross.down, cross.up) if layer is not None]
