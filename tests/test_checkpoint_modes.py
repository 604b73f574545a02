"""Checkpoints of every mode and number of ranks, on a CPU and on emulated Gaudis, go on in every other one."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT
from distributed_worker import options_of, train
from hpu_emulator.process import environment
from test_checkpoint import SECOND_EPOCH
from test_distributed import run_ranks

from dlrm.distributed.launch import LaunchJob

FLAGS = (
    "--mini-batch-size=8 --num-batches=4 --arch-sparse-feature-size=4 --arch-mlp-bot=4-3-4 --arch-mlp-top=5-1 "
    "--arch-embedding-size=30-4-9 --optimizer=adagrad --learning-rate=0.1 "
)
PUBLIC = "--mini-batch-size=4 --num-batches=6 --nepochs=2 --round-targets --learning-rate=0.1 "
MODES = {"cpu": ("cpu",), "not lazy": ("eager", "compile"), "lazy": ("lazy",)}  # of processes


class Kind(NamedTuple):
    """Where a checkpoint is written, or read."""

    mode: str  # "cpu", or that of a Gaudi
    ranks: int

    @property
    def flags(self) -> str:
        return "--device=cpu" if self.mode == "cpu" else f"--device=hpu --mode={self.mode}"


KINDS = [Kind(mode, ranks) for modes in MODES.values() for mode in modes for ranks in (1, 2)]


def run(processes: str, ranks: int, cases: list[str], folder) -> list[dict]:
    """Trains each case on so many ranks, in processes that have the modes of `MODES[processes]`."""
    if processes == "cpu":
        return [train(options_of(case)) for case in cases] if ranks == 1 else run_ranks(LaunchJob(2), cases, folder)
    return run_ranks(LaunchJob(ranks), cases, folder, **environment(MODES[processes][0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of each kind, after the first of two epochs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for (processes, modes), ranks in itertools.product(MODES.items(), (1, 2)):
        kinds = [Kind(mode, ranks) for mode in modes]
        run(processes, ranks, [f"{FLAGS} {kind.flags} --save-model={path_of(folder, kind)}" for kind in kinds], folder)
    return folder


def path_of(folder, kind: Kind):
    return folder / f"{kind.mode}-{kind.ranks}"


@pytest.fixture(scope="module")
def second_epoch() -> dict:
    return train(options_of(f"{FLAGS} --device=cpu --nepochs=2"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("processes", MODES)
def test_every_kind_goes_on_from_every_other(processes, ranks, folder, second_epoch, tmp_path):
    pairs = [(Kind(mode, ranks), written) for mode in MODES[processes] for written in KINDS]
    cases = [f"{FLAGS} {kind.flags} --nepochs=2 --resume --load-model={path_of(folder, w)}" for kind, w in pairs]
    for pair, result in zip(pairs, run(processes, ranks, cases, tmp_path), strict=True):
        assert len(result["losses"]) == 4, pair
        np.testing.assert_allclose(result["losses"], second_epoch["losses"][4:], rtol=0, atol=2e-6, err_msg=str(pair))
        for moment, expected in zip(result["moments"], second_epoch["moments"], strict=True):
            np.testing.assert_allclose(moment.cpu(), expected, rtol=1e-4, atol=1e-7, err_msg=str(pair))


@pytest.mark.parametrize("processes", ["not lazy", "lazy"])
def test_the_reference_scripts_checkpoints_go_on_in_every_mode(processes, tmp_path):
    """Their losses and accuracies are numpy's numbers, which the reader of lazy mode does not know."""
    runs = list(itertools.product(MODES[processes], SECOND_EPOCH))
    cases = [
        f"{PUBLIC} --device=hpu --mode={mode} --optimizer={optimizer} --resume "
        f"--load-model={ROOT / 'tests/reference_checkpoints' / optimizer}.pt"
        for mode, optimizer in runs
    ]
    for (_, optimizer), result in zip(runs, run(processes, 1, cases, tmp_path), strict=True):
        ours = [float(loss) for loss in re.findall(r"epoch 1, .*loss ([\d.]+)", result["lines"])]
        assert ours == pytest.approx([float(loss) for loss in SECOND_EPOCH[optimizer].split()], abs=1.5e-6)
