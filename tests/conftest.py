"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Workers share the cores. With more OpenMP threads than cores, every parallel loop would wait for a turn.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // WORKERS)))

import pytest
import torch
from hypothesis import HealthCheck, settings

from dlrm.kernels.native import load_kernels

ROOT = Path(__file__).resolve().parent.parent

# A slow machine must not fail a test.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
load_kernels()  # before all tests, so that no test depends on which ones ran before it


@pytest.fixture(autouse=True)
def compiled_afresh():
    """Lets each test compile afresh, although torch stops recompiling a function after a few times."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def script(capsys):
    """A function that runs the trainer in this process: `script("--flag=value")` -> (exit status, stdout, stderr)."""
    from dlrm_s_pytorch import main

    def call(flags: str) -> tuple[int, str, str]:
        status = main(flags.split())
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of a given size: `small_disk("80k")` -> its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size: str) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a small tmpfs cannot be mounted here")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def launcher():
    """A function that runs the launcher as a user does: `launcher("--flag=value")` -> the finished process."""

    def call(flags: str, **settings) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "demo_dlrm.py"), *flags.split()]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)

    return call
