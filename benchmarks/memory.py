"""Peak memory of a run beside the memory that its model needs for weights, moments and gradients of the dense part."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Result
from benchmarks.step import config_options, layer_widths

CONFIGS = (
    "single_node_dlrm_eager_medium_fp32",
    "single_node_dlrm_eager_medium_bf16",
    "embedding_heavy",
    "dcnv2_random",
)


def measure(rounds: int) -> list[Result]:
    return [measure_config(name) for name in CONFIGS]


def measure_config(name: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        flags = ["--num-batches=6", "--device=cpu", f"--report={report}"]
        command = [sys.executable, "demo_dlrm.py", f"--config={name}", *flags]
        subprocess.run(command, check=True, capture_output=True)
        peak = json.loads(report.read_text())["peak_memory"]
    job = f"most memory, {name.removeprefix('single_node_dlrm_')}"
    return Result(job, peak / 2**30, "bound: needed by the model", needed_by_model(name), "GiB")


def needed_by_model(name: str) -> float:
    """Returns the GiB of the model's weights, Adagrad moments and dense gradients."""
    options = config_options(name)
    dense = sum(n * m + n for m, n in layer_widths(options))
    tables = sum(options.arch_embedding_size) * options.arch_sparse_feature_size
    # Bytes per number: 4 for the weight and 4 for the moment. A dense weight has 4 more: an fp32 gradient, or in bf16
    # the bf16 copy of the weight and its gradient.
    return (12 * dense + 8 * tables) / 2**30
