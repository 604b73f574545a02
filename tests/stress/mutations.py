"""Damages stored files at random, and lets the programs read them.

    python -m tests.stress.mutations --count=1000

Checkpoints (a file and a folder), the manifest and the days of preprocessed data, MLPerf's binary files and their
manifest, an .npz file of the reference script, the cache of kernels and of timings. A damaged file must be refused in
one line, or read with the very same result. Configurations and traces have no checksum, since people write them: they
must be refused in one line, or be read without a fault.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import demo_dlrm
import dlrm_s_pytorch
from dlrm.data import criteo_generator, criteo_preprocess
from tests.mutations import damaged_bytes, mutated_values
from tests.stress.forked import Ended, Tally, run, stress
from tests.stress.kills import Ranks, training

SHAPE = "--arch-mlp-bot=13-4-2 --arch-mlp-top=4-1 --mini-batch-size=4 --num-batches=3 --device=cpu"
PROFILE = "3, 1, 2\n0, 1, 2\n0.4, 0.7, 1.0\n"


@dataclass
class Target:
    """A stored file, and a run that reads it."""

    path: Path
    main: Callable[[Sequence[str]], int]
    argv: list[str]
    has_checksum: bool = True

    def attack(self, description: str, content: bytes, expected: list[str]) -> str:
        original, times = self.path.read_bytes(), self.path.stat()
        self.path.write_bytes(content)
        try:
            ended = run(self.main, self.argv)
        finally:
            self.path.write_bytes(original)
            os.utime(self.path, ns=(times.st_atime_ns, times.st_mtime_ns))  # which tell what is stale
        if ended.fault or ended.status:
            return ended.fault
        differs = self.has_checksum and results_of(ended) != expected
        return "accepted, with another result" if differs else ""

    def mutations(self, generator: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
        """Yields descriptions and damaged contents: bytes, and values where the file is JSON."""
        content = self.path.read_bytes()
        damaged = [*damaged_bytes(content, generator, count), ("empty", b""), ("twice", content * 2)]
        if self.path.suffix == ".json":
            for description, values in mutated_values(json.loads(content), generator, count):
                try:
                    damaged.append((description, json.dumps(values).encode()))
                except TypeError:  # a value that JSON does not have
                    continue
        generator.shuffle(damaged)
        yield from damaged[:count]


def results_of(ended: Ended) -> list[str]:
    return re.findall(r"^(?:Finished|Testing at).*", ended.out, re.MULTILINE)


def targets(folder: Path) -> list[Target]:
    """Returns all files to damage, which are made in a folder."""
    data, train = "--data-generation=dataset", dlrm_s_pytorch.main
    checkpoint = folder / "m.pt"
    made = run(train, training(checkpoint))
    assert not made.status, made.err
    loads = [*training(folder / "x")[:-2], f"--load-model={checkpoint}", "--num-batches=3", "--save-every=0"]
    found = [Target(checkpoint, train, loads)]

    shards = Ranks(folder, 2).path.with_name("whole-2")
    loads = [flag.replace(str(checkpoint), str(shards)) for flag in loads]
    some_shards = sorted(shards.glob("*.distcp"))[:3]
    found += [Target(path, train, loads) for path in (*some_shards, shards / "manifest.pt", shards / ".metadata")]

    text = folder / "train.txt"
    criteo_generator.generate(str(text), 300)
    flags = [data, *SHAPE.split(), f"--raw-data-file={text}"]
    assert not run(train, [*flags, "--mlperf-bin-loader"]).status
    verify = ["--verify", f"--processed-data-file={folder / 'train_processed'}"]
    days = sorted((folder / "train_processed").glob("day_*.npy"))
    stored = [*days[:2], *sorted(folder.glob("train_processed_*.bin"))]
    found += [Target(path, criteo_preprocess.main, verify) for path in stored]
    found += [Target(folder / "train_processed" / "manifest.json", train, flags)] * 4
    found += [Target(folder / "train_processed_bin.json", train, [*flags, "--mlperf-bin-loader"])] * 2

    rows = np.random.default_rng(0).integers(0, 2, (59, 40)).astype(np.int32)
    npz = folder / "kaggle_processed.npz"
    np.savez_compressed(npz, X_int=rows[:, 1:14], X_cat=rows[:, 14:], y=rows[:, 0], counts=np.full(26, 2))
    found.append(Target(npz, train, [data, *SHAPE.split(), f"--processed-data-file={npz}"]))

    config = folder / "mine.yaml"
    shutil.copy(demo_dlrm.find_config("quickstart"), config)
    found.append(Target(config, demo_dlrm.main, [f"--config={config}", "--dry-run"], has_checksum=False))
    (folder / "dist_0.log").write_text(PROFILE)
    synthetic = f"--data-generation=synthetic --data-trace-file={folder}/dist_j.log --arch-embedding-size=4"
    profile = [*synthetic.split(), "--num-batches=3", "--mini-batch-size=4", "--device=cpu"]
    found.append(Target(folder / "dist_0.log", train, profile, has_checksum=False))
    return found


def attack(count: int, generator: random.Random, tally: Tally) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        all_targets = targets(Path(scratch))
        each = -(-count // len(all_targets))
        for target in all_targets:
            whole = run(target.main, target.argv)
            assert not whole.status, whole.err
            for description, content in target.mutations(generator, min(each, count - tally.cases)):
                fault = target.attack(description, content, results_of(whole))
                tally.note(f"{target.path.name}, {description}", fault)
            print(f"{target.path.name}: {tally}", flush=True)


if __name__ == "__main__":
    sys.exit(stress(__doc__.splitlines()[0], 1000, attack))
