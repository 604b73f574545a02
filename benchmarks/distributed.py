"""Several ranks on this machine: the all-to-all, and the whole step, for 1, 2 and 4 of them, against one rank.

Total work constant is the same batch over more ranks; work of a rank constant is a batch that grows with them. The peer
of an all-to-all is a copy of the same bytes in memory. Bytes sent are held against `bytes_by_formula`.
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
    """Mean bytes that a rank sends in an iteration, with tables whole.

    all-to-all: of its T / N tables, the pooled rows of the samples of N - 1 others, once forward and once backward:
    2 * 4 * B * T * D * (N - 1) / N^2. all-reduce, as a ring does it: 2 * 4 * P * (N - 1) / N.
    """
    rows = options.mini_batch_size * len(options.arch_embedding_size)
    all_to_all = 8 * rows * options.arch_sparse_feature_size * (ranks - 1) / ranks**2
    return {"all-to-all": all_to_all, "all-reduce": 8 * dense_parameters * (ranks - 1) / ranks}


def model_ms(cards: int, options: Options, dense_parameters: int, inside: float, outside: float) -> dict[str, float]:
    """On paper: ms of an iteration's collectives, where nothing hides them, for a batch that grows with the cards.

    Eight cards a box; `inside` and `outside` are bytes a second and direction of a card to its box, and out of it. A
    collective starts in 20 us and takes 1 us for each card that it talks to.
    """
    per_card = 8 * options.mini_batch_size * len(options.arch_embedding_size) * options.arch_sparse_feature_size
    near, boxes = min(cards, 8), max(1, cards // 8)
    all_to_all = per_card * max((near - 1) / cards / inside, (cards - near) / cards / outside)
    all_reduce = 8 * dense_parameters * ((near - 1) / near / inside + (boxes - 1) / boxes / near / outside)
    latency = 3 * 20e-6 + (2 * (cards - 1) + near + boxes) * 1e-6
    return {"all-to-all": 1e3 * all_to_all, "all-reduce": 1e3 * all_reduce, "latency": 1e3 * latency}


def measure(rounds: int) -> list[Result]:
    results = []
    for title, batch in (("total work constant", lambda n: BATCH), ("work of a rank constant", lambda n: BATCH * n)):
        times = {ranks: run(ranks, batch(ranks), rounds) for ranks in RANKS}
        for ranks, found in times.items():
            name = f"{title}, {ranks} rank{'s' * (ranks > 1)}, batch {batch(ranks)}"
            results.append(Result(f"step, {name}", found["step"], "one rank", times[1]["step"]))
            if ranks > 1:
                sent = f"{found['sent'] / 1e6:.2f} MB sent by a rank, by the formula {found['formula'] / 1e6:.2f}"
                results.append(Result(f"all-to-all, {name}; {sent}", found["exchange"], "copy", found["copy"]))
    return results


def run(ranks: int, batch: int, rounds: int) -> dict[str, float]:
    """Medians in ms, and bytes, that rank 0 of a run finds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        flags = [*FLAGS.split(), f"--mini-batch-size={batch}", f"--num-batches={20 * rounds}"]
        (command,) = commands(LaunchJob(ranks), [__file__, str(file), str(rounds), *flags], {})
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # a core for a rank, where there are enough
        subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, cwd=ROOT)
        return json.loads(file.read_text())


def measure_rank(file: str, rounds: int, flags: list[str]) -> None:
    from dlrm.data.data_set import open_data_set
    from dlrm.distributed.rendezvous import join_ranks
    from dlrm_s_pytorch import Trainer, select_backend

    options = Options(**OptionParser(prog="benchmark").parse_given(flags))
    backend = select_backend(options)
    data_set = open_data_set(options)
    with join_ranks(data_set, find_launch(), backend) as ranks:
        trainer, times = Trainer(data_set, backend, ranks), []
        for prepared in trainer.pipeline.run(iter(trainer.data)):
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
    """Forward and backward of the exchange by itself, and a copy of what it sends and receives."""
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
    """What a training step gives to all-to-alls for other ranks."""
    import torch.distributed as dist

    sent, all_to_all = [], dist.all_to_all_single

    def counted(into, rows, received, to_each, **settings):
        sent.append((sum(to_each) - to_each[rank]) * rows[0].nbytes)
        return all_to_all(into, rows, received, to_each, **settings)

    dist.all_to_all_single = counted
    trainer.train_step(prepared)
    dist.all_to_all_single = all_to_all
    return sum(sent)


if __name__ == "__main__":
    measure_rank(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
