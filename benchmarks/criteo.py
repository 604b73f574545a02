"""Criteo data: preprocessing of text, and loading of batches beside the training step that they are for."""

from __future__ import annotations

import itertools
import tempfile
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
SAMPLES_OF_LOOP = 2_000  # the loop is slow, so its time is scaled up to SAMPLES
BATCHES = 20


def measure(rounds: int) -> list[Result]:
    load_kernels()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = folder / "train.txt"
        generate(str(raw), SAMPLES)
        results = [*measure_preprocessing(raw, folder, rounds), measure_memory(raw)]
        for batch_size in (128, 2048):
            results += measure_loading(raw, batch_size, rounds)
        return results


def measure_preprocessing(raw: Path, folder: Path, rounds: int) -> list[Result]:
    """Measures the preprocessing of a file, from text to rows on the disk."""
    head = b"".join(raw.read_bytes().splitlines(keepends=True)[:SAMPLES_OF_LOOP])
    runs = itertools.count()
    times = median_ms(
        {
            "ours": lambda: preprocess(PreprocessJob("kaggle", str(raw), folder / f"run_{next(runs)}", 10_000_000)),
            "Python loop over lines, scaled": lambda: criteo_loop.read([head], 10_000_000),
        },
        max(1, rounds // 2),
    )
    times["Python loop over lines, scaled"] *= SAMPLES / SAMPLES_OF_LOOP
    rate = SAMPLES / times["ours"] * 1000
    job = f"{SAMPLES:,} lines: {rate:,.0f} rows/s, {raw.stat().st_size / SAMPLES * rate / 1e6:.0f} MB/s"
    return against(job, "ours", times)


def measure_memory(raw: Path) -> Result:
    """Measures the peak memory of preprocessing a text that is larger than `--preprocess-memory`."""
    large, limit = raw.with_name("large.txt"), 400 * 2**20
    with large.open("wb") as file:
        file.writelines([raw.read_bytes()] * (2 * limit // raw.stat().st_size))
    peak, size = most_memory(large, raw.with_name("large"), limit), large.stat().st_size
    job = f"most memory of preprocessing {size / 2**30:.2f} GiB"
    return Result(job, peak / 2**30, "--preprocess-memory", limit / 2**30, "GiB")


def measure_loading(raw: Path, batch_size: int, rounds: int) -> list[Result]:
    """Measures the loading of batches of the Kaggle recipe, beside stacked lists of rows and the training step."""
    options = Options(
        data_generation="dataset", raw_data_file=str(raw), arch_sparse_feature_size=16, device="cpu",
        arch_mlp_bot=(13, 512, 256, 64, 16), arch_mlp_top=(512, 256, 1), mini_batch_size=batch_size,
        num_batches=min(BATCHES, SAMPLES * 6 // 7 // batch_size),
    )  # fmt: skip
    data_set = open_data_set(options)
    data = data_set.training_data()
    rows = [*np.load(raw.parent / "train_processed" / "day_0.npy")[:batch_size]]
    trainer = Trainer(data_set, select_backend(data_set.options))
    batches = trainer.prepared(data)
    prepared = next(batches)
    batches.close()

    def load_batches() -> None:
        with one_core_for_new_threads():  # the trainer's host thread has one core
            for _ in data:
                pass

    def stack_rows() -> None:
        with one_core_for_new_threads():
            for _ in range(len(data)):
                torch.log(torch.tensor(np.array([row[1:14] for row in rows]), dtype=torch.float) + 1)
                torch.tensor(np.array([row[14:] for row in rows]), dtype=torch.long)
                torch.tensor([int(row[0]) for row in rows], dtype=torch.float)

    def train() -> None:
        for _ in range(len(data)):
            trainer.train_step(prepared)

    candidates = {"ours": load_batches, "lists of rows, stacked": stack_rows, "the training step": train}
    times = {name: ms / len(data) for name, ms in median_ms(candidates, rounds).items()}
    rate = 1000 * batch_size / times["ours"]
    return against(f"a batch of {batch_size}: {rate:,.0f} samples/s", "ours", times)
