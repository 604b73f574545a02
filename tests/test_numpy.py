"""The trainer under older releases of numpy, as Gaudi containers have them, each in a folder in front of the path."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
from conftest import ROOT

QUICKSTART = "--config=quickstart --num-batches=40"
TINY = (
    "--mini-batch-size=4 --num-batches=6 --round-targets --learning-rate=0.1 --optimizer=adagrad --print-freq=1 "
    "--nepochs=2 --resume"
)
REFERENCE_CHECKPOINT = ROOT / "tests" / "reference_checkpoints" / "adagrad.pt"


class OldNumpy(NamedTuple):
    version: str
    folder: str


@pytest.fixture(scope="module", params=["1.24.4", "1.26.4"])
def old_numpy(request, tmp_path_factory) -> OldNumpy:
    folder = str(tmp_path_factory.mktemp("numpy"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", f"--target={folder}"]
    done = subprocess.run([*pip, f"numpy=={request.param}"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip has no numpy {request.param} for this Python: {done.stderr.strip().splitlines()[-1]}")
    return OldNumpy(request.param, folder)


def trained(flags: str, numpy: OldNumpy | None = None) -> str:
    """Returns what the launcher prints, under the given numpy or under the installed one."""
    environment = dict(os.environ, PYTHONPATH=numpy.folder) if numpy else None
    command = [sys.executable, str(ROOT / "demo_dlrm.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def losses(output: str) -> list[str]:
    return re.findall(r"loss ([\d.]+)", output)


def test_quickstart_has_the_same_losses(old_numpy):
    output = trained(QUICKSTART, old_numpy)
    assert f"numpy {old_numpy.version}\n" in output
    assert losses(output) == losses(trained(QUICKSTART))


def test_checkpoints_are_read_by_old_and_new_numpy(old_numpy, tmp_path):
    """A run goes on from the reference script's checkpoint, and a second one from what the first has saved."""
    by_old, by_new = tmp_path / "old.pt", tmp_path / "new.pt"
    first = [
        trained(f"{TINY} --load-model={REFERENCE_CHECKPOINT} --save-model={by_old}", old_numpy),
        trained(f"{TINY} --load-model={REFERENCE_CHECKPOINT} --save-model={by_new}"),
    ]
    second = [
        trained(f"{TINY} --nepochs=3 --load-model={by_new}", old_numpy),
        trained(f"{TINY} --nepochs=3 --load-model={by_old}"),
    ]
    for old, new in (first, second):
        assert len(losses(old)) >= 6
        assert losses(old) == losses(new)
