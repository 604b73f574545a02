"""The self-test and the losses of each mode on a real Gaudi, where there is one, against those of the CPU."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("habana_frameworks") is None, reason="there is no Gaudi here (no habana-torch-plugin)"
)
MODES = ("eager", "lazy", "lazy --hpu-graphs", "compile")
FLAGS = (
    "--mini-batch-size=64 --num-batches=50 --arch-embedding-size=10000-300-5 --arch-sparse-feature-size=16 "
    "--arch-mlp-bot=13-64-16 --arch-mlp-top=64-1 --num-indices-per-lookup=9 --learning-rate=0.01 "
)


def losses(output: str) -> np.ndarray:
    return np.array(re.findall(r"it, loss ([\d.]+)", output), float)


@pytest.mark.parametrize("mode", MODES)
def test_the_self_test_passes(mode, launcher):
    result = launcher(f"--self-test --device=hpu --mode={mode}")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize(("data_type", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_losses_equal_the_cpus(mode, optimizer, data_type, tolerance, launcher):
    flags = f"{FLAGS} --optimizer={optimizer} "
    gaudi = launcher(flags + f"--device=hpu --mode={mode} --data_type={data_type}")
    assert gaudi.returncode == 0, gaudi.stderr
    cpu = launcher(flags + "--device=cpu")
    np.testing.assert_allclose(losses(gaudi.stdout), losses(cpu.stdout), rtol=0, atol=tolerance)
