"""Kills runs at random moments, repeats their command, and compares the result with that of an undisturbed run.

    python -m tests.stress.kills --count=500

Training on one rank, on two and three, where a rank or all of them are killed, and under the launcher, which is killed
alone or with its ranks; preprocessing; and the writing of MLPerf's binary files. Nothing may be lost that was reported
as saved, no process may be left after 10 s, and the repeated command must end as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import dlrm_s_pytorch
from dlrm.checkpoint.checkpoint import latest
from dlrm.data import criteo_generator, criteo_preprocess
from tests.stress.forked import Ended, Forked, Tally, run, stress

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = (
    "--mini-batch-size=12 --num-batches=60 --round-targets --learning-rate=0.1 --arch-sparse-feature-size=4 "
    "--arch-mlp-bot=5-6-4 --arch-mlp-top=8-1 --arch-embedding-size=40-30-20 --device=cpu --optimizer=adagrad "
    "--print-freq=5 --save-every=5 --test-freq=30 --resume"
)
SAVE_EVERY = 5
SECONDS_TO_END = 10  # for ranks whose launcher was killed


def training(path: Path) -> list[str]:
    return [*MODEL.split(), f"--save-model={path}"]


def state_of(path: Path) -> dict[str, Any]:
    """Returns all tensors and numbers of a checkpoint, a file or a folder."""
    path = Path(latest(str(path)))
    if path.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            dcp_to_torch_save(path, f"{scratch}/whole.pt")
            return torch.load(f"{scratch}/whole.pt", weights_only=False)
    return torch.load(path, weights_only=True)


def same(left: Any, right: Any) -> bool:
    """Says whether nested data are equal, bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left if key != "options")
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or left != left


def lines_of(out: str) -> list[str]:
    """Returns the lines on training and tests, without times."""
    return re.findall(r"^(?:Finished|Testing at).*", re.sub(r"[\d.-]+ ms/it", "", out), re.MULTILINE)


def saved_iteration(out: str) -> int:
    """Returns the last iteration that certainly was saved. Its line is printed before its checkpoint is written."""
    iterations = [int(number) for number in re.findall(r"^Finished training it (\d+)/", out, re.MULTILINE)]
    return iterations[-2] if len(iterations) > 1 else 0


class Training:
    """Training on one rank, in a file."""

    def __init__(self, folder: Path):
        self.path, self.folder = folder / "killed.pt", folder
        start = time.monotonic()
        self.whole = run(dlrm_s_pytorch.main, training(folder / "whole.pt"))
        self.seconds, self.state = time.monotonic() - start, state_of(folder / "whole.pt")

    def attack(self, generator: random.Random) -> str:
        remove_all(self.path)
        victim = Forked(dlrm_s_pytorch.main, training(self.path))
        time.sleep(generator.uniform(0, self.seconds))
        victim.kill()
        saved = saved_iteration(victim.wait().out)
        return self.check(saved, run(dlrm_s_pytorch.main, training(self.path)))

    def check(self, saved: int, again: Ended) -> str:
        """Returns what is wrong with the run that went on, after one that had reported `saved` iterations as saved."""
        if fault := again.fault or (again.status and again.err.strip()):
            return fault
        lines = lines_of(again.out)
        if lines and lines != lines_of(self.whole.out)[-len(lines) :]:
            return "other losses"
        went_on_at = int(re.search(r" (\d+)/", lines[0])[1]) - SAVE_EVERY if lines else saved
        if went_on_at < saved:
            return f"iteration {saved} was saved, but the run went on at {went_on_at}"
        return "" if same(state_of(self.path), self.state) else "another checkpoint"


class Ranks(Training):
    """Training on several ranks, in a folder. A rank or all of them are killed."""

    def __init__(self, folder: Path, size: int):
        self.path, self.size = folder / f"killed-{size}", size
        start = time.monotonic()
        self.whole = self.finish(self.start(folder / f"whole-{size}"))
        self.seconds, self.state = time.monotonic() - start, state_of(folder / f"whole-{size}")

    def start(self, path: Path) -> list[Forked]:
        variables = {"WORLD_SIZE": self.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        each = [{**variables, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1} for rank in range(self.size)]
        texts = [{name: str(value) for name, value in rank.items()} for rank in each]
        return [Forked(dlrm_s_pytorch.main, training(path), environment) for environment in texts]

    def finish(self, ranks: list[Forked]) -> Ended:
        ended = [rank.wait() for rank in ranks]
        fault = next((rank.fault for rank in ended if rank.status < 0), "")
        return ended[0]._replace(err=ended[0].err + fault)

    def attack(self, generator: random.Random) -> str:
        remove_all(self.path)
        ranks = self.start(self.path)
        time.sleep(generator.uniform(0, self.seconds))
        for rank in ranks if generator.random() < 0.5 else [generator.choice(ranks)]:
            rank.kill()
        saved = saved_iteration(self.finish(ranks).out)
        return self.check(saved, self.finish(self.start(self.path)))


class Launched(Ranks):
    """Training on two ranks that the launcher starts. It is killed, alone or with its ranks."""

    def __init__(self, folder: Path):
        self.path = folder / "launched"
        start = time.monotonic()
        self.whole = self.finish(self.start(folder / "whole-launched"))
        self.seconds, self.state = time.monotonic() - start, state_of(folder / "whole-launched")

    def start(self, path: Path) -> subprocess.Popen:
        self.mark = uuid.uuid4().hex
        command = [sys.executable, str(ROOT / "demo_dlrm.py"), "--world_size=2", *training(path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen(command, env=os.environ | {"DLRM_STRESS": self.mark}, **pipes)

    def finish(self, process: subprocess.Popen) -> Ended:
        out, err = process.communicate()
        return Ended(process.returncode, out, err)

    def attack(self, generator: random.Random) -> str:
        remove_all(self.path)
        process = self.start(self.path)
        time.sleep(generator.uniform(0, self.seconds))
        kill = os.killpg if generator.random() < 0.5 else os.kill
        with contextlib.suppress(ProcessLookupError):
            kill(process.pid, signal.SIGKILL)
        ending = time.monotonic() + SECONDS_TO_END
        while (orphans := list(marked_processes(self.mark))) and time.monotonic() < ending:
            time.sleep(0.2)
        for orphan in orphans:
            os.kill(orphan, signal.SIGKILL)
        saved = saved_iteration(self.finish(process).out)
        if orphans:
            return f"{len(orphans)} processes were left after {SECONDS_TO_END} s"
        return self.check(saved, self.finish(self.start(self.path)))


def marked_processes(mark: str) -> Iterator[int]:
    """Yields the processes that have this mark in their environment."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                yield int(entry.name)


class Files:
    """A program that writes files, in a folder of its own."""

    def __init__(self, folder: Path, name: str, main: Callable, argv: Callable[[Path], list[str]]):
        self.name, self.main, self.argv = name, main, argv
        self.text, self.folder = folder / "train.txt", folder / name
        if not self.text.exists():
            criteo_generator.generate(str(self.text), 3000)
        start = time.monotonic()
        ended = self.run_in(folder / f"whole-{name}")
        assert not ended.status, ended.err
        self.seconds, self.whole = time.monotonic() - start, contents(folder / f"whole-{name}")

    def prepare(self, folder: Path) -> None:
        remove_all(folder)
        folder.mkdir()
        (folder / "train.txt").symlink_to(self.text)

    def run_in(self, folder: Path) -> Ended:
        self.prepare(folder)
        return run(self.main, self.argv(folder))

    def attack(self, generator: random.Random) -> str:
        self.prepare(self.folder)
        victim = Forked(self.main, self.argv(self.folder))
        time.sleep(generator.uniform(0, self.seconds))
        victim.kill()
        victim.wait()
        again = run(self.main, self.argv(self.folder))
        if fault := again.fault or (again.status and again.err.strip()):
            return fault
        return "" if contents(self.folder) == self.whole else "other files"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def preprocessing(folder: Path) -> list[str]:
    return [f"--raw-data-file={folder / 'train.txt'}", "--preprocess-memory=1M"]


def binaries(folder: Path) -> list[str]:
    data = f"--data-generation=dataset --raw-data-file={folder / 'train.txt'} --mlperf-bin-loader --num-batches=1"
    return [*data.split(), "--arch-mlp-bot=13-4-2", "--arch-mlp-top=4-1", "--mini-batch-size=8", "--device=cpu"]


def remove_all(path: Path) -> None:
    """Removes a file or a folder, and all whose names begin with its name."""
    for other in path.parent.glob(f"{path.name}*"):
        shutil.rmtree(other) if other.is_dir() and not other.is_symlink() else other.unlink()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def attack(count: int, generator: random.Random, tally: Tally) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        victims = {
            "training": (50, lambda: Training(folder)),
            "two ranks": (10, lambda: Ranks(folder, 2)),
            "three ranks": (6, lambda: Ranks(folder, 3)),
            "launcher": (4, lambda: Launched(folder)),
            "preprocessing": (18, lambda: Files(folder, "preprocessed", criteo_preprocess.main, preprocessing)),
            "binary files": (12, lambda: Files(folder, "binaries", dlrm_s_pytorch.main, binaries)),
        }
        weights = [weight for weight, _ in victims.values()]
        chosen = generator.choices(list(victims), weights, k=count)
        for name, (_, make) in victims.items():
            if name in chosen:
                victim = make()
                for number in range(chosen.count(name)):
                    tally.note(f"{name} {number}", victim.attack(generator))
                print(f"{name}: {tally}", flush=True)


if __name__ == "__main__":
    sys.exit(stress(__doc__.splitlines()[0], 500, attack))
