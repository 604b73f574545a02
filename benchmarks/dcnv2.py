"""Whole iterations of `dcnv2_random`, MLPerf's DLRM-dcnv2 with smaller tables, beside torchrec's, and beside bounds.

With `--torchrec-python`, torchrec's `DLRM_DCN` trains the same model on the same batches in a process of its own, with
fbgemm's tables, which its backward pass updates, and `torch.optim.Adagrad` for all other weights; in bf16, under
autocast. Neither draws data while it is measured; ours prepares the next batch on its host thread, as in a run. The
bounds are the matrix products of all layers, and the bytes that rows, pooled outputs and the dense optimizer's numbers
take at least, in address order.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable

import torch

from benchmarks.dcn_model import DcnModel, draw_batches
from benchmarks.measure import Result, against, median_ms
from benchmarks.step import BATCHES, config_options, layer_widths, matrix_products, our_step
from benchmarks.torchrec_losses import on_torch, torchrec_process
from dlrm.batch import Batch
from dlrm.options import Options
from dlrm.system.memory import keep_freed_memory

CONFIG = "dcnv2_random"
BUFFER = 1 << 26  # floats; 256 MiB, so that little of it stays cached
PRODUCTS = "bound: matrix products"


def measure(rounds: int, torchrec_python: str | None = None) -> list[Result]:
    keep_freed_memory()  # for all candidates alike
    results = []
    for data_type, optimizer in itertools.product(("fp32", "bf16"), ("adagrad", "rwsadagrad")):
        options = config_options(CONFIG, data_type=data_type, device="cpu", optimizer=optimizer)
        results += measure_options(options, rounds, torchrec_python)
        gc.collect()
    return results


def measure_options(options: Options, rounds: int, torchrec_python: str | None) -> list[Result]:
    model = model_of(options)
    batches = [on_torch(batch) for batch in draw_batches(model, BATCHES)]
    products = {name: call for name, call in matrix_products(options).items() if "best layout" not in name}
    with contextlib.ExitStack() as stack:
        candidates = {"ours": our_step(options, batches)}
        if torchrec_python:
            peer = stack.enter_context(torchrec_process(torchrec_python, model, BATCHES, "own"))
            candidates["torchrec, fbgemm"] = peer.step
        candidates |= products | {"bound: memory traffic": move(bytes_to_move(options, batches))}
        times = median_ms(candidates, rounds)
    fastest = min(times.pop(name) for name in products)
    times |= {PRODUCTS: fastest, f"{PRODUCTS} + memory traffic": fastest + times["bound: memory traffic"]}
    return against(f"whole iteration, {CONFIG}, {options.optimizer}, {options.data_type}", "ours", times)


def model_of(options: Options) -> DcnModel:
    return DcnModel(
        table_rows=list(options.arch_embedding_size),
        lookups=list(options.lookups_per_bag),
        dim=options.arch_sparse_feature_size,
        bottom=list(options.arch_mlp_bot),
        top=list(options.arch_mlp_top),
        cross_layers=options.dcn_num_layers,
        cross_rank=options.dcn_low_rank_dim,
        batch=options.mini_batch_size,
        optimizer=options.optimizer,
        learning_rate=options.learning_rate,
        eps=options.optimizer_eps,
        data_type=options.data_type,
    )


def bytes_to_move(options: Options, batches: list[Batch]) -> int:
    """Returns the bytes that a step must at least read from memory or write to it.

    Forward reads each row that occurs once, and writes the pooled outputs. The update reads their gradient, and reads
    and writes each such row and its moment, which with row-wise Adagrad is too small to count. Adagrad reads or writes
    20 bytes per weight of a layer.
    """
    unique_rows = sum(len(indices.unique()) for batch in batches for indices in batch.indices) // len(batches)
    row = 4 * options.arch_sparse_feature_size
    pooled = row * options.mini_batch_size * len(options.arch_embedding_size)
    times_per_row = 5 if options.optimizer == "adagrad" else 3
    weights = sum(n * m for m, n in layer_widths(options))
    return times_per_row * row * unique_rows + 2 * pooled + 20 * weights


def move(size: int) -> Callable[[], None]:
    """Returns a function that reads and writes `size` bytes in all, in address order."""
    memory = torch.zeros(BUFFER)
    torch.ops.dlrm.advise_huge_pages(memory)

    def step() -> None:
        for first in range(0, size // 8, BUFFER):
            memory[: size // 8 - first].add_(1)

    return step
