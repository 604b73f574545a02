"""Our script in turn with the reference script, facebookresearch/dlrm's dlrm_s_pytorch.py, with the same flags.

`--path` names the folder of the reference script. An iteration takes the median time from one printed line to the next,
after warm-up. That includes data and preprocessing, which the ms/it that the reference script prints leaves out. The
reference script has no bf16, so our bf16 is compared with its fp32. If polars is installed, its preprocessing of click
logs is compared as well.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import demo_dlrm
from benchmarks import criteo_reference
from benchmarks.measure import Result
from dlrm.options import to_argv

ROOT = Path(__file__).resolve().parent.parent
RUNS = {  # configuration -> settings that make the run short
    "single_node_dlrm_eager_medium_fp32": {"num_batches": 7},
    "single_node_dlrm_eager_medium_bf16": {"num_batches": 7},
    "embedding_heavy": {"num_batches": 30},
    "criteo_kaggle_random": {"num_batches": 60},
    "mlperf_random": {"num_batches": 16},
}
FLAGS_OF_OURS_ALONE = ("mode", "data_type", "device", "world_size")


def measure(rounds: int, path: str) -> list[Result]:
    rounds = min(rounds, 3)
    results = [measure_config(name, settings, rounds, path) for name, settings in RUNS.items()]
    return [*results, criteo_reference.measure(rounds, path)] if importlib.util.find_spec("polars") else results


def measure_config(name: str, settings: dict, rounds: int, path: str) -> Result:
    config = demo_dlrm.read_config(demo_dlrm.find_config(name))
    given = config.given | {"print_freq": 1, "loss_function": "bce"} | settings
    shared = {key: value for key, value in given.items() if key not in FLAGS_OF_OURS_ALONE}
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(median_ms(ROOT, to_argv(given | {"device": "cpu", "num_batches": 3 * settings["num_batches"]})))
        theirs.append(median_ms(Path(path).resolve(), to_argv(shared)))
    job = f"whole iteration, {name.removeprefix('single_node_dlrm_')}"
    return Result(job, statistics.median(ours), "reference script, fp32", statistics.median(theirs))


def median_ms(folder: Path, flags: list[str]) -> float:
    """Returns the median ms per iteration of the dlrm_s_pytorch.py in `folder`. Raises SystemExit if it fails."""
    flags = [flag.removesuffix("=True") if flag.startswith("--print-time") else flag for flag in flags]
    command = [sys.executable, "-u", str(folder / "dlrm_s_pytorch.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    stamps = []
    with (
        tempfile.TemporaryDirectory() as scratch,  # the reference script leaves files where it runs
        subprocess.Popen(
            command, cwd=scratch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as run,
    ):
        stamps += [time.perf_counter() for line in run.stdout if line.startswith(b"Finished training")]
    if run.returncode:
        raise SystemExit(f"exit status {run.returncode} of {shlex.join(command)}")
    times = [1000 * (after - before) for before, after in pairwise(stamps)]
    return statistics.median(times[len(times) // 3 :])
