"""The self-test passes on the CPU and on an emulated Gaudi, and fails if something is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hpu_emulator.process import environment, on_gaudi

from dlrm import self_test
from dlrm.kernels.embedding import SparseAdagrad


def test_passes_on_the_cpu(launcher):
    result = launcher("--self-test --device=cpu")
    assert result.returncode == 0, result.stdout
    assert "checks passed" in result.stdout
    assert "FAILED" not in result.stdout


@pytest.mark.parametrize("mode", ["eager", "lazy", "compile"])
def test_passes_on_an_emulated_gaudi(mode):
    result = subprocess.run(
        [sys.executable, str(ROOT / "demo_dlrm.py"), "--self-test", "--device=hpu", f"--mode={mode}"],
        env=environment(None), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Self-test of hpu in {mode} mode" in result.stdout
    assert "operators on the host" in result.stdout


@on_gaudi("lazy", PT_HPU_PLACE_ON_CPU="none")
def test_passes_with_a_recorded_step():
    assert self_test.main(["--device=hpu", "--mode=lazy", "--hpu-graphs"]) == 0


def test_a_wrong_kernel_is_found(monkeypatch, capsys):
    def update_with_half_the_rate(self, rows, lookups):
        weights, half_the_rate = self.embeddings.weights, self.param_groups[0]["lr"] / 2
        torch.ops.dlrm.sparse_adagrad_(weights, self.moments, rows.grad, *lookups.grouped(), half_the_rate, 1e-10)

    monkeypatch.setattr(SparseAdagrad, "update", update_with_half_the_rate)
    assert self_test.main(["--device=cpu"]) == 1
    output = capsys.readouterr().out
    assert "FAILED  tables, adagrad" in output
    assert "ok      tables, sgd" in output


def test_a_device_that_is_not_there_is_a_usage_error(launcher):
    result = launcher("--self-test --device=hpu")
    assert result.returncode == 2
    assert "habana-torch-plugin is not installed" in result.stderr
