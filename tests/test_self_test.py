"""The self-test passes on the CPU and on an emulated Gaudi, and fails if something is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hpu_emulator.process import environment, on_gaudi

from dlrm import self_test
from dlrm.kernels.embedding import SparseAdagrad
from dlrm.kernels.static_embedding import StaticEmbeddingBags
from dlrm.options import Options
from dlrm_s_pytorch import select_backend

GIB = 2**30


def test_passes_on_the_cpu(launcher):
    result = launcher("--self-test --device=cpu")
    assert result.returncode == 0, result.stdout
    assert "checks passed" in result.stdout
    assert "FAILED" not in result.stdout


def self_test_on_gaudi(*flags: str, memory: int = GIB // 4) -> subprocess.CompletedProcess:
    """Runs the self-test on an emulated Gaudi of little memory, so that its largest tables are left out."""
    command = [sys.executable, str(ROOT / "demo_dlrm.py"), "--self-test", "--device=hpu", *flags]
    variables = environment(None, HPU_EMULATOR_MEMORY=str(memory))
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("mode", ["eager", "lazy", "compile"])
def test_passes_on_an_emulated_gaudi(mode):
    result = self_test_on_gaudi(f"--mode={mode}", "--optimizer=adagrad")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Self-test of hpu in {mode} mode and fp32" in result.stdout
    for line in ("operators on the host             none", "new compilations                  none"):
        assert f"ok      {line}" in result.stdout
    assert re.search(
        r"rows beyond 4 GiB +not tried: needs 4\.8 GiB on the host and the device; 0\.2 are free", result.stdout
    )
    assert re.search(r"time of a table's step, adagrad +.* ms \(10,000 rows\), .* ms \(100,000 rows\): ", result.stdout)


def test_the_report_has_what_was_found_in_the_users_type(tmp_path):
    result = self_test_on_gaudi("--data_type=bf16", f"--report={tmp_path}/report.json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [report[name] for name in ("device", "name", "mode", "data_type")] == ["hpu", "GAUDI2", "eager", "bf16"]
    assert report["versions"]["habana-torch-plugin"] == "1.23.0"
    assert report["environment"]["PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST"].endswith("ops_bf16_dlrm.txt")
    assert report["environment"]["PT_HPU_LAZY_MODE"] == "0"
    assert report["metrics"]["cpu_fallback"]["TotalNumber"] == 0
    assert report["metrics"]["graph_compilation"]["TotalNumber"] > 0
    for check in report["checks"]:
        assert f"ok      {check['name']:32}  {check['found']}\n" in result.stdout
        assert check["passed"] is True


@on_gaudi("eager", "lazy")
def test_the_last_rows_of_large_tables_are_checked(mode):
    options = Options(device="hpu", mode=mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_test, "LARGE_BYTES", 2**20)
        backend = select_backend(options)
        assert self_test.rows_beyond_32_bits(options, backend) == "the last rows of 0.0 GiB are read and written"
        index_copy = torch.Tensor.index_copy_
        patch.setattr(torch.Tensor, "index_copy_", lambda self, dim, at, rows: index_copy(self, dim, at % 2**12, rows))
        with pytest.raises(self_test.CheckError, match="differs by"):
            self_test.rows_beyond_32_bits(options, backend)


@on_gaudi("eager", "lazy")
def test_a_step_that_compiles_anew_is_found(mode):
    options = Options(device="hpu", mode=mode)
    backend = select_backend(options)
    assert self_test.no_new_compilation(options, backend) == "none in steps 11 to 30"
    sizes = iter(range(1, 1000))
    with pytest.MonkeyPatch.context() as patch:
        read = StaticEmbeddingBags.read
        patch.setattr(
            StaticEmbeddingBags,
            "read",
            lambda self, lookups: (self.stacked[: next(sizes)].neg().add(1), read(self, lookups))[1],
        )
        with pytest.raises(self_test.CheckError, match="compilations in steps 11 to 30"):
            self_test.no_new_compilation(options, backend)


@pytest.mark.parametrize(
    ("times", "verdict"), [((1, 1.5, 2, 4), "does not grow with the table"), ((1, 1, 2, 6), "GROWS WITH THE TABLE")]
)
def test_a_time_that_grows_with_the_table_is_told(times, verdict, monkeypatch):
    measured = iter(times)
    monkeypatch.setattr(self_test, "milliseconds", lambda *_: next(measured))
    monkeypatch.setattr(self_test, "free_memory", lambda: 2**40)
    options = Options(device="cpu")
    backend = select_backend(options)
    monkeypatch.setattr(backend, "memory_limit", lambda: 2**40)
    found = self_test.time_by_table_rows(lambda *_: None)(options, backend)
    assert found.endswith(f"{times[-1]} ms (10,000,000 rows): {verdict}")


def test_a_report_that_cannot_be_written_is_a_usage_error(launcher):
    result = launcher("--self-test --device=cpu --report=/nowhere/report.json")
    assert result.returncode == 2
    assert "--report: cannot write '/nowhere/report.json'" in result.stderr


@on_gaudi("lazy", PT_HPU_PLACE_ON_CPU="none", HPU_EMULATOR_MEMORY=str(GIB // 4))
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
