"""The public dlrm_s_pytorch.py in a folder that --path names, in turn with ours, with the same flags.

Median time from a printed line to the next, after warm-up: whole iterations, data and preprocessing included, which the
ms/it that the public script prints leaves out. It has no bf16, so its fp32 stands against our bf16 as well. Then its
preprocessing of click logs.
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
from benchmarks import criteo_public
from benchmarks.measure import Result
from dlrm.options import to_argv

ROOT = Path(__file__).resolve().parent.parent
RUNS = {  # configuration -> settings that make it short, or that the public script does not have
    "single_node_dlrm_eager_medium_fp32": {"num_batches": 7},
    "single_node_dlrm_eager_medium_bf16": {"num_batches": 7},
    "embedding_heavy": {"num_batches": 30},
    "criteo_kaggle_random": {"num_batches": 60},
    "mlperf_random": {"num_batches": 16},
}
OURS_ALONE = ("mode", "data_type", "device", "world_size")


def measure(rounds: int, path: str) -> list[Result]:
    rounds = min(rounds, 3)
    results = [measure_config(name, settings, rounds, path) for name, settings in RUNS.items()]
    return [*results, criteo_public.measure(rounds, path)] if importlib.util.find_spec("polars") else results


def measure_config(name: str, settings: dict, rounds: int, path: str) -> Result:
    config = demo_dlrm.read_config(demo_dlrm.find_config(name))
    given = config.given | {"print_freq": 1, "loss_function": "bce"} | settings
    public = {key: value for key, value in given.items() if key not in OURS_ALONE}
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(median_ms(ROOT, to_argv(given | {"device": "cpu", "num_batches": 3 * settings["num_batches"]})))
        theirs.append(median_ms(Path(path).resolve(), to_argv(public)))
    job = f"whole iteration, {name.removeprefix('single_node_dlrm_')}"
    return Result(job, statistics.median(ours), "public script, fp32", statistics.median(theirs))


def median_ms(folder: Path, flags: list[str]) -> float:
    flags = [flag.removesuffix("=True") if flag.startswith("--print-time") else flag for flag in flags]
    command = [sys.executable, "-u", str(folder / "dlrm_s_pytorch.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    stamps = []
    with (
        tempfile.TemporaryDirectory() as scratch,  # the public script leaves files where it runs
        subprocess.Popen(
            command, cwd=scratch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as run,
    ):
        stamps += [time.perf_counter() for line in run.stdout if line.startswith(b"Finished training")]
    if run.returncode:
        raise SystemExit(f"exit status {run.returncode} of {shlex.join(command)}")
    times = [1000 * (after - before) for before, after in pairwise(stamps)]
    return statistics.median(times[len(times) // 3 :])
