"""The sizes of a DLRM-dcnv2 model, and weights and batches for it that depend on the seed alone.

Only numpy is needed: torchrec's process imports this file, too. `numpy.random.RandomState` draws the same numbers in
all of numpy's versions.

B batch, D embedding dimension, W = (1 + tables) * D, R rank of the cross layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class DcnModel:
    """A model, its optimizer and its data."""

    table_rows: list[int]
    lookups: list[int]  # per bag of each table
    dim: int
    bottom: list[int]  # widths of the bottom MLP, from the dense features on
    top: list[int]  # widths of the top MLP's layers
    cross_layers: int
    cross_rank: int
    batch: int
    optimizer: str  # sgd, adagrad or rwsadagrad
    learning_rate: float
    eps: float
    data_type: str = "fp32"  # or bf16, of the layers
    seed: int = 0

    @property
    def width(self) -> int:
        return (1 + len(self.table_rows)) * self.dim


class Weights(NamedTuple):
    """The weights of a model, float32, part by part in the order of a forward pass."""

    tables: list[np.ndarray]  # (rows, D)
    bottom: list[np.ndarray]  # (outputs, inputs) and (outputs,), layer by layer
    cross: list[np.ndarray]  # (R, W), (W, R) and (W,), layer by layer
    top: list[np.ndarray]  # as `bottom`


def draw_weights(model: DcnModel) -> Weights:
    """Returns weights uniform in +-sqrt(1 / inputs), and in tables, as the reference script has them, in
    +-sqrt(1 / rows)."""
    generator = np.random.RandomState(model.seed)

    def draw(*shape: int, terms: int) -> np.ndarray:
        bound = (1 / terms) ** 0.5
        return generator.uniform(-bound, bound, shape).astype(np.float32)

    def mlp(widths: list[int]) -> list[np.ndarray]:
        return [tensor for m, n in pairwise(widths) for tensor in (draw(n, m, terms=m), draw(n, terms=n))]

    def cross_layer(width: int, rank: int) -> list[np.ndarray]:
        return [draw(rank, width, terms=width), draw(width, rank, terms=rank), draw(width, terms=width)]

    return Weights(
        tables=[draw(rows, model.dim, terms=rows) for rows in model.table_rows],
        bottom=mlp(model.bottom),
        cross=[tensor for _ in range(model.cross_layers) for tensor in cross_layer(model.width, model.cross_rank)],
        top=mlp([model.width, *model.top]),
    )


class NumpyBatch(NamedTuple):
    """A batch of data."""

    dense: np.ndarray  # (B, dense features) float32
    indices: list[np.ndarray]  # (B, lookups per bag) int64, table by table; a row may occur twice in a bag
    target: np.ndarray  # (B, 1) float32, 0 or 1


def draw_batches(model: DcnModel, count: int) -> list[NumpyBatch]:
    generator = np.random.RandomState(model.seed + 1)

    def bags(rows: int, lookups: int) -> np.ndarray:
        return generator.randint(rows, size=(model.batch, lookups)).astype(np.int64)

    return [
        NumpyBatch(
            dense=generator.uniform(size=(model.batch, model.bottom[0])).astype(np.float32),
            indices=[bags(*table) for table in zip(model.table_rows, model.lookups, strict=True)],
            target=generator.randint(2, size=(model.batch, 1)).astype(np.float32),
        )
        for _ in range(count)
    ]
