"""A whole training step, beside the same model in plain torch modules, and beside its matrix products alone.

The plain model has nn.EmbeddingBag(sparse=True), nn.Linear and torch.optim.Adagrad, and autocast for bf16. During our
step the host thread prepares the next batch, as in a run. The bounds multiply the matrices of a step, as a step lays
them out: in fp32, by torch's default, by oneDNN and by the library that numpy has; in bf16, by torch. One more bound in
bf16, "best layout", has the transposed gradient as a matrix of its own, with which some products are faster.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

import demo_dlrm
from benchmarks.gemm import by_numpy
from benchmarks.measure import Result, against, median_ms, with_next
from dlrm.batch import Batch
from dlrm.data.data_set import open_data_set
from dlrm.data.random_data import RandomData
from dlrm.kernels.gemm import onednn_output
from dlrm.options import Options
from dlrm.system.memory import keep_freed_memory
from dlrm_s_pytorch import Trainer, select_backend

BATCHES = 6
CONFIGS = ("single_node_dlrm_eager_medium_{}", "embedding_heavy", "mlperf_random")


def measure(rounds: int) -> list[Result]:
    keep_freed_memory()  # for all candidates alike
    results = []
    for name, data_type in itertools.product(CONFIGS, ("fp32", "bf16")):
        results += measure_config(name.format(data_type), data_type, rounds)
        gc.collect()
    return results


def config_options(name: str, **settings) -> Options:
    """Returns the options of a file in hb_configs/, with `settings` in place of its own."""
    config = demo_dlrm.read_config(demo_dlrm.find_config(name))
    return Options(**config.given | settings)


def measure_config(name: str, data_type: str, rounds: int) -> list[Result]:
    options = config_options(name, data_type=data_type, device="cpu", optimizer="adagrad", num_batches=BATCHES)
    batches = list(RandomData(options))
    candidates = {
        "ours": our_step(options, batches),
        "plain torch modules": with_next(PlainStep(options), batches),
        **matrix_products(options),
    }
    return against(f"step {name.removeprefix('single_node_dlrm_')}, {data_type}", "ours", median_ms(candidates, rounds))


def our_step(options: Options, batches: list[Batch]) -> Callable[[], None]:
    trainer = Trainer(open_data_set(options), select_backend(options))
    prepared = trainer.prepared(itertools.cycle(batches))
    return lambda: trainer.train_step(next(prepared))


class PlainStep:
    """A training step of the model in plain torch modules. The call takes a raw batch."""

    def __init__(self, options: Options):
        dim = options.arch_sparse_feature_size
        features = 1 + len(options.arch_embedding_size)
        self.options = options
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(rows, dim, mode="sum", sparse=True, include_last_offset=True)
            for rows in options.arch_embedding_size
        )
        self.bottom = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(options.arch_mlp_bot))
        self.top = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise((top_input(options), *options.arch_mlp_top)))
        self.row, self.column = torch.tril_indices(features, features, offset=-1)
        self.optimizers = [
            torch.optim.Adagrad(part.parameters(), lr=options.learning_rate)
            for part in (self.tables, self.bottom, self.top)
        ]

    def forward(self, batch: Batch) -> Tensor:
        x = batch.dense
        for layer in self.bottom:
            x = layer(x).relu()
        pooled = [bag(i, o) for bag, i, o in zip(self.tables, batch.indices, batch.offsets, strict=True)]
        if self.options.arch_interaction_op == "cat":
            x = torch.cat([x, *pooled], dim=1)
        else:
            features = torch.stack([x, *pooled], dim=1)
            x = torch.cat([x, (features @ features.mT)[:, self.row, self.column]], dim=1)
        for layer in self.top[:-1]:
            x = layer(x).relu()
        return torch.sigmoid(self.top[-1](x).float())

    def __call__(self, batch: Batch) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.data_type == "bf16"):
            probability = self.forward(batch)
        functional.binary_cross_entropy(probability, batch.target).backward()
        for optimizer in self.optimizers:
            optimizer.step()


def top_input(options: Options) -> int:
    """Returns the width of the interaction's output, which is the input of the top MLP."""
    interaction = select_backend(options).interactions[options.arch_interaction_op]
    features = 1 + len(options.arch_embedding_size)
    return interaction(features, options.arch_sparse_feature_size, options.arch_interaction_itself).width


def layer_widths(options: Options) -> list[tuple[int, int]]:
    """Returns inputs and outputs of all layers, those of cross layers included, in the order of a forward pass."""
    width, rank = top_input(options), options.dcn_low_rank_dim
    cross = [(width, rank), (rank, width)] if rank else [(width, width)]
    cross *= options.dcn_num_layers if options.arch_interaction_op == "dcn" else 0
    return [*pairwise(options.arch_mlp_bot), *cross, *pairwise((width, *options.arch_mlp_top))]


def matrix_products(options: Options) -> dict[str, Callable[[], None]]:
    """Returns functions that do nothing but the matrix products of a training step, by their names as bounds."""
    if options.data_type == "bf16":
        laid_out = {"": False, ", best layout": True}
        factors = {name: list(products_of_step(options, torch.bfloat16, it)) for name, it in laid_out.items()}
        return {f"bound: matrix products{name}": partial(multiply_all, by_torch, it) for name, it in factors.items()}
    factors = list(products_of_step(options, torch.float32, transposed=False))
    libraries = {"torch's default": by_torch, "oneDNN": by_onednn, "numpy": by_numpy}
    return {f"bound: products by {name}": partial(multiply_all, it, factors) for name, it in libraries.items()}


def by_torch(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.mm(left, right, out=out)


def by_onednn(left: Tensor, right: Tensor, out: Tensor) -> None:
    onednn_output(left, right.t(), None, relu=False)  # oneDNN in torch has no argument for an output


def multiply_all(multiply: Callable, factors: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for left, right, out in factors:
        multiply(left, right, out)


def products_of_step(options: Options, dtype: torch.dtype, transposed: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the left factor, right factor and output of each product: the forward and backward of all layers."""
    batch = options.mini_batch_size

    def random(*size: int) -> Tensor:
        return torch.randn(size).to(dtype)

    for position, (m, n) in enumerate(layer_widths(options)):
        x, weight, gradient = random(batch, m), random(n, m), random(batch, n)
        yield x, weight.t(), random(batch, n)
        yield (random(n, batch) if transposed else gradient.t()), x, random(n, m)
        if position:  # the first layer's input needs no gradient
            yield gradient, weight, random(batch, m)
