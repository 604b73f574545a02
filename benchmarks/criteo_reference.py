"""Our preprocessing beside data_utils.py of the reference script, on the same text. Both must yield the same rows."""

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
    """Measures the preprocessing of a text. `path` is the folder of the reference script.

    Raises SystemExit if the rows differ.
    """
    spec = importlib.util.spec_from_file_location("reference_data_utils", Path(path, "data_utils.py"))
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    ours, theirs = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            raw, out = Path(name, "train.txt"), Path(name, "ours")
            generate(str(raw), LINES)
            size = raw.stat().st_size
            ours.append(seconds(preprocess, PreprocessJob("kaggle", str(raw), out, MAX_IND_RANGE)))
            theirs.append(seconds(reference.getCriteoAdData, str(raw), "theirs", MAX_IND_RANGE))
            check_equal(out, Path(name, "theirs.npz"))
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    job, peer = f"preprocessing text, {rates(size, ours)}", f"reference script, {rates(size, theirs)}"
    return Result(job, 1000 * ours, peer, 1000 * theirs)


def seconds(function: Callable, *arguments: object) -> float:
    """Returns the seconds that a call takes. Discards what the call prints."""
    # The reference script prints the number of each line.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        start = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - start


def rates(size: int, duration: float) -> str:
    return f"{LINES / duration:,.0f} rows/s, {size / duration / 1e6:.1f} MB/s"


def check_equal(ours: Path, theirs: Path) -> None:
    """Raises SystemExit unless our folder and the reference script's file hold the same rows and category counts."""
    manifest = Manifest.read(ours)
    rows = np.concatenate([np.load(ours / f"day_{day}.npy") for day in range(len(manifest.rows))])
    with np.load(theirs) as arrays:
        equal = np.array_equal(rows, np.column_stack([arrays["y"], arrays["X_int"], arrays["X_cat"]]))
        equal &= manifest.counts == arrays["counts"].tolist()
    if not equal:
        raise SystemExit("our rows are not those of the reference script")
