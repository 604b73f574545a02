"""Most memory of a run, against what its model needs: weights, moments, and the gradients of the dense part."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from benchmarks.measure import Result
from benchmarks.step import config_options, top_input

CONFIGS = ("single_node_dlrm_eager_medium_fp32", "single_node_dlrm_eager_medium_bf16", "embedding_heavy")


def measure(rounds: int) -> list[Result]:
    return [measure_config(name) for name in CONFIGS]


def measure_config(name: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        flags = ["--num-batches=6", "--device=cpu", f"--report={report}"]
        command = [sys.executable, "demo_dlrm.py", f"--config={name}", *flags]
        subprocess.run(command, check=True, capture_output=True)
        peak = json.loads(report.read_text())["peak_memory"]
    return Result(f"most memory, {name.removeprefix('single_node_dlrm_')}", peak / 2**30, "needed", needed(name), "GiB")


def needed(name: str) -> float:
    """GiB, with Adagrad."""
    options = config_options(name)
    widths = [*pairwise(options.arch_mlp_bot), *pairwise((top_input(options), *options.arch_mlp_top))]
    dense = sum(n * m + n for m, n in widths)
    tables = 8 * sum(options.arch_embedding_size) * options.arch_sparse_feature_size
    return (12 * dense + tables) / 2**30  # weight, moment and gradient; in bf16 shadow and gradient take 4 together
