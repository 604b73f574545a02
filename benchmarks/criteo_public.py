"""Preprocessing by the public script's own data_utils.py, beside ours, of the same text; both must say the same."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.measure import Result
from dlrm.data.criteo_generator import generate
from dlrm.data.criteo_preprocess import Manifest, PreprocessJob, preprocess

LINES = 200_000
MAX_IND_RANGE = 10_000_000


def measure(rounds: int, path: str) -> Result:
    """`path` is the folder of the public script."""
    spec = importlib.util.spec_from_file_location("public_data_utils", Path(path, "data_utils.py"))
    public = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(public)
    ours, theirs = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            raw, out = Path(name, "train.txt"), Path(name, "ours")
            generate(str(raw), LINES)
            size = raw.stat().st_size
            ours.append(
                seconds(lambda raw=raw, out=out: preprocess(PreprocessJob("kaggle", str(raw), out, MAX_IND_RANGE)))
            )
            theirs.append(seconds(lambda raw=raw: public.getCriteoAdData(str(raw), "theirs", MAX_IND_RANGE)))
            check_equal(out, Path(name, "theirs.npz"))
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    return Result(
        f"preprocessing text, {rates(size, ours)}", 1000 * ours, f"public script, {rates(size, theirs)}", 1000 * theirs
    )


def seconds(call: Callable[[], object]) -> float:
    """What it prints is lost: the public script prints the number of each line."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def rates(size: int, taken: float) -> str:
    return f"{LINES / taken:,.0f} rows/s, {size / taken / 1e6:.1f} MB/s"


def check_equal(ours: Path, theirs: Path) -> None:
    manifest = Manifest.read(ours)
    rows = np.concatenate([np.load(ours / f"day_{day}.npy") for day in range(len(manifest.rows))])
    with np.load(theirs) as arrays:
        equal = np.array_equal(rows, np.column_stack([arrays["y"], arrays["X_int"], arrays["X_cat"]]))
        equal &= manifest.counts == arrays["counts"].tolist()
    if not equal:
        raise SystemExit("our rows are not those of the public script")
