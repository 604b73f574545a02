"""Several ranks on this machine: the training step beside that of one rank, and the all-to-all beside a memory copy.

There are 1, 2 and 4 ranks. "total work constant" splits the same batch among the ranks. "work per rank constant" has a
batch that grows with the number of ranks. The memory copy moves the bytes of the all-to-all. The name of the job shows
the bytes sent, beside those that `bytes_by_formula` expects.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Result
from dlrm.distributed.launch import LaunchJob, commands, find_launch
from dlrm.options import OptionParser, Options

ROOT = Path(__file__).resolve().parent.parent
RANKS = (1, 2, 4)
BATCH = 512
FLAGS = (
    "--device=cpu --arch-sparse-feature-size=32 --arch-mlp-bot=13-256-128-32 --arch-mlp-top=256-128-1 "
    "--num-indices-per-lookup=10 --arch-embedding-size=" + "-".join(["20000"] * 8)
)


def bytes_by_formula(options: Options, ranks: int, dense_parameters: int) -> dict[str, float]:
    """Returns the mean number of bytes that a rank sends per iteration, if no table is split.

    all-to-all: each of N ranks holds T / N tables. It sends their pooled rows for the samples of the N - 1 other ranks,
    and as many gradients for its own samples: 2 * 4 * B * T * D * (N - 1) / N^2 bytes for a batch of B.
    all-reduce of P dense parameters around a ring: 2 * 4 * P * (N - 1) / N bytes.
    """
    rows = options.mini_batch_size * len(options.arch_embedding_size)
    all_to_all = 8 * rows * options.arch_sparse_feature_size * (ranks - 1) / ranks**2
    return {"all-to-all": all_to_all, "all-reduce": 8 * dense_parameters * (ranks - 1) / ranks}


def model_ms(cards: int, options: Options, dense_parameters: int, inside: float, outside: float) -> dict[str, float]:
    """Returns an estimate in ms per iteration of the collectives, if no computation hides them.

    Cards come in boxes of eight, and the batch per card is constant. A card sends `inside` bytes per second to its box
    and `outside` bytes per second out of it, and receives as many. A collective starts in 20 us, and takes another 1 us
    per card with which a card exchanges messages.
    """
    per_card = 8 * options.mini_batch_size * len(options.arch_embedding_size) * options.arch_sparse_feature_size
    near, boxes = min(cards, 8), max(1, cards // 8)
    all_to_all = per_card * max((near - 1) / cards / inside, (cards - near) / cards / outside)
    all_reduce = 8 * dense_parameters * ((near - 1) / near / inside + (boxes - 1) / boxes / near / outside)
    latency = 3 * 20e-6 + (2 * (cards - 1) + near + boxes) * 1e-6
    return {"all-to-all": 1e3 * all_to_all, "all-reduce": 1e3 * all_reduce, "latency": 1e3 * latency}


def measure(rounds: int) -> list[Result]:
    results = []
    for title, batch in (("total work constant", lambda n: BATCH), ("work per rank constant", lambda n: BATCH * n)):
        times = {ranks: run_ranks(ranks, batch(ranks), rounds) for ranks in RANKS}
        for ranks, found in times.items():
            name = f"{title}, {ranks} rank{'s' * (ranks > 1)}, batch {batch(ranks)}"
            results.append(Result(f"step, {name}", found["step"], "one rank", times[1]["step"]))
            if ranks > 1:
                sent = f"{found['sent'] / 1e6:.2f} MB sent per rank, by the formula {found['formula'] / 1e6:.2f} MB"
                results.append(Result(f"all-to-all, {name}; {sent}", found["exchange"], "copy", found["copy"]))
    return results


def run_ranks(ranks: int, batch: int, rounds: int) -> dict[str, float]:
    """Starts the ranks and returns the measurements of rank 0.

    "step", "exchange" and "copy" are medians in ms; "sent" and "formula" are bytes per iteration. One rank alone has
    only "step".
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        flags = [*FLAGS.split(), f"--mini-batch-size={batch}", f"--num-batches={20 * rounds}"]
        (command,) = commands(LaunchJob(ranks), [__file__, str(file), str(rounds), *flags], {})
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # one core per rank, if there are enough
        subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, cwd=ROOT)
        return json.loads(file.read_text())


def measure_rank(file: str, rounds: int, flags: list[str]) -> None:
    """Trains as one of several ranks. Rank 0 writes the measurements that `run_ranks` returns to `file`, as JSON."""
    from dlrm.data.data_set import open_data_set
    from dlrm.distributed.rendezvous import join_ranks
    from dlrm_s_pytorch import Trainer, select_backend

    options = Options(**OptionParser(prog="benchmark").parse_given(flags))
    backend = select_backend(options)
    data_set = open_data_set(options)
    with join_ranks(data_set, find_launch(), backend) as ranks:
        trainer, times = Trainer(data_set, backend, ranks), []
        for prepared in trainer.prepared(iter(trainer.data)):
            start = time.perf_counter()
            trainer.train_step(prepared)
            times.append(1000 * (time.perf_counter() - start))
        found = {"step": statistics.median(times[5:])}
        if ranks.size > 1:
            parameters = sum(p.numel() for layer in trainer.model.dense_layers() for p in (layer.weight, layer.bias))
            found |= measure_exchange(options, ranks, backend, 20 * rounds)
            found["sent"] = bytes_to_others(trainer, prepared, ranks.rank)
            found["formula"] = bytes_by_formula(options, ranks.size, parameters)["all-to-all"]
        if ranks.rank == 0:
            Path(file).write_text(json.dumps(found))


def measure_exchange(options: Options, ranks, backend, repeats: int) -> dict[str, float]:
    """Returns the median ms of the exchange, forward and backward, and of copying the pooled rows twice in memory."""
    import torch

    from dlrm.distributed.exchange import AllToAll

    exchange = AllToAll(ranks.plan, ranks.rank, backend.device)
    pooled = torch.randn(options.mini_batch_size, len(ranks.held_pieces), ranks.plan.width)
    spare, times = torch.empty_like(pooled), {"exchange": [], "copy": []}
    for _ in range(repeats):
        start = time.perf_counter()
        exchange.start_forward(pooled)
        exchange.start_backward(exchange.finish_forward())
        exchange.finish_backward(pooled.shape)
        middle = time.perf_counter()
        spare.copy_(pooled)
        spare.copy_(pooled)
        times["exchange"].append(1000 * (middle - start))
        times["copy"].append(1000 * (time.perf_counter() - middle))
    return {name: statistics.median(values) for name, values in times.items()}


def bytes_to_others(trainer, prepared, rank: int) -> int:
    """Returns the bytes that this rank sends to other ranks in the all-to-alls of one training step."""
    import torch.distributed as dist

    sent, all_to_all = [], dist.all_to_all_single

    def counting_all_to_all(into, rows, received, to_each, **settings):
        sent.append((sum(to_each) - to_each[rank]) * rows[0].nbytes)
        return all_to_all(into, rows, received, to_each, **settings)

    dist.all_to_all_single = counting_all_to_all
    trainer.train_step(prepared)
    dist.all_to_all_single = all_to_all
    return sum(sent)


if __name__ == "__main__":
    measure_rank(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
