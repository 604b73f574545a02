"""Criteo: preprocessing of text, and loading of batches against the step that they are for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import criteo_loop
from benchmarks.criteo_memory import most_memory
from benchmarks.measure import Result, against, median_ms
from dlrm.data.criteo_generator import generate
from dlrm.data.criteo_preprocess import PreprocessJob, preprocess
from dlrm.data.data_set import open_data_set
from dlrm.kernels.native import load_kernels
from dlrm.options import Options
from dlrm.pipeline import one_core_for_new_threads
from dlrm_s_pytorch import Trainer, select_backend

SAMPLES = 100_000
LOOPED = 2_000  # lines that the loop gets, whose time is scaled
BATCHES = 20


def measure(rounds: int) -> list[Result]:
    load_kernels()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = folder / "train.txt"
        generate(str(raw), SAMPLES)
        return [*measure_preprocessing(raw, folder, rounds), measure_memory(raw), *measure_loading(raw, rounds)]


def measure_preprocessing(raw: Path, folder: Path, rounds: int) -> list[Result]:
    """Of a file, from text to rows on the disk."""
    head = b"".join(raw.read_bytes().splitlines(keepends=True)[:LOOPED])
    runs = iter(range(100))
    times = median_ms(
        {
            "ours": lambda: preprocess(PreprocessJob("kaggle", str(raw), folder / f"run_{next(runs)}", 10_000_000)),
            "Python loop over lines, scaled": lambda: criteo_loop.read([head], 10_000_000),
        },
        max(1, rounds // 2),
    )
    times["Python loop over lines, scaled"] *= SAMPLES / LOOPED
    rate = SAMPLES / times["ours"] * 1000
    job = f"{SAMPLES:,} lines: {rate:,.0f} rows/s, {raw.stat().st_size / SAMPLES * rate / 1e6:.0f} MB/s"
    return against(job, "ours", times)


def measure_memory(raw: Path) -> Result:
    """Of preprocessing a text larger than what it may take."""
    large, limit = raw.with_name("large.txt"), 400 * 2**20
    with large.open("wb") as file:
        file.writelines([raw.read_bytes()] * (2 * limit // raw.stat().st_size))
    taken, size = most_memory(large, raw.with_name("large"), limit), large.stat().st_size
    job = f"most memory of preprocessing {size / 2**30:.2f} GiB"
    return Result(job, taken / 2**30, "--preprocess-memory", limit / 2**30, "GiB")


def on_one_core(call: Callable[[], object]) -> None:
    """As on the trainer's host thread."""
    with one_core_for_new_threads():
        call()


def measure_loading(raw: Path, rounds: int) -> list[Result]:
    """Of batches of the Kaggle recipe, against its training step, and against lists of rows that are stacked."""
    results = []
    for batch_size in (128, 2048):
        data_set = open_data_set(
            Options(
                data_generation="dataset", raw_data_file=str(raw), arch_sparse_feature_size=16, device="cpu",
                arch_mlp_bot=(13, 512, 256, 64, 16), arch_mlp_top=(512, 256, 1), mini_batch_size=batch_size,
                num_batches=min(BATCHES, SAMPLES * 6 // 7 // batch_size),
            )
        )  # fmt: skip
        data = data_set.training_data()
        rows = [*np.load(raw.parent / "train_processed" / "day_0.npy")[:batch_size]]
        trainer = Trainer(data_set, select_backend(data_set.options))
        batches = trainer.pipeline.run(data)
        prepared = next(batches)
        batches.close()

        def stack(rows=rows) -> None:
            torch.log(torch.tensor(np.array([row[1:14] for row in rows]), dtype=torch.float) + 1)
            torch.tensor(np.array([row[14:] for row in rows]), dtype=torch.long)
            torch.tensor([int(row[0]) for row in rows], dtype=torch.float)

        candidates = {
            "ours": lambda data=data: on_one_core(lambda: [None for _ in data]),
            "lists of rows, stacked": lambda stack=stack, data=data: on_one_core(
                lambda: [stack() for _ in range(len(data))]
            ),
            "the training step": lambda trainer=trainer, prepared=prepared, data=data: [
                trainer.train_step(prepared) for _ in range(len(data))
            ],
        }
        times = {name: ms / len(data) for name, ms in median_ms(candidates, rounds).items()}
        rate = 1000 * batch_size / times["ours"]
        results += against(f"a batch of {batch_size}: {rate:,.0f} samples/s", "ours", times)
    return results
