"""Several ranks give the results of one rank, whatever their number and the placement, and a fault is one line."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from distributed_worker import options_of, train
from hpu_emulator.process import environment
from test_criteo_data import COUNTS, random_rows, write_npz
from torch.distributed.launcher.api import LaunchConfig

from benchmarks.distributed import bytes_by_formula
from dlrm.data.criteo_generator import generate
from dlrm.data.data_set import open_data_set
from dlrm.devices.cpu import CpuBackend
from dlrm.distributed.exchange import AllToAll
from dlrm.distributed.gradients import DenseGradients
from dlrm.distributed.launch import (
    Launch,
    LaunchJob,
    commands,
    find_launch,
    master,
    mpirun,
    set_patience,
    slurm_master,
)
from dlrm.distributed.placement import Plan, make_plan
from dlrm.distributed.ranks import ManyRanks, OneRank, Ranks, from_json, to_json
from dlrm.distributed.rendezvous import check_same, digest_of_source, rank_fingerprint
from dlrm.errors import LocalError, RunError, UsageError
from dlrm.kernels.dense import FusedLayer, PlainLayer
from dlrm.options import Options
from dlrm.output.report import embedding_bytes_per_iteration
from dlrm.system.signals import ANNOUNCEMENT, StopSignals
from dlrm_s_pytorch import Trainer, select_backend

WORKER = Path(__file__).with_name("distributed_worker.py")
SHAPES = {
    "three tables": "--arch-embedding-size=40-30-20",
    "seven uneven tables, dot and itself": "--arch-embedding-size=500-3-1-77-12-200-9 --arch-interaction-itself "
    "--num-indices-per-lookup=4",
    "lookups per table": "--arch-embedding-size=40-9-30-1 --num-indices-per-lookup=7-1-3-2 "
    "--num-indices-per-lookup-fixed",
    "one table, cat": "--arch-embedding-size=50 --arch-interaction-op=cat --num-indices-per-lookup=7",
    "cross layers": "--arch-embedding-size=40-30 --arch-interaction-op=dcn --dcn-num-layers=2 --dcn-low-rank-dim=3",
    "a table of one row": "--arch-embedding-size=1 --loss-function=wbce --loss-weights=0.3-1.7 --round-targets",
    "two tables, mse, fixed lookups": "--arch-embedding-size=60-5 --loss-function=mse --num-indices-per-lookup-fixed",
}  # fmt: skip
COMMON = (
    "--mini-batch-size=24 --num-batches=5 --arch-sparse-feature-size=4 --arch-mlp-bot=5-6-4 --arch-mlp-top=8-1 "
    "--device=cpu --learning-rate=0.05 "
)
CASES = [
    f"{COMMON}{shape} --optimizer={optimizer} --sharding={sharding}"
    for shape in SHAPES.values()
    for optimizer in ("sgd", "adagrad")
    for sharding in ("auto", "row", "column")
]
EXTRA = [
    COMMON + "--arch-embedding-size=40-30-20-10 --sharding=table --print-freq=3 --print-dist-loss",
    COMMON + "--arch-embedding-size=40-30-20 --measure-perf --rand-data-dist=gaussian --rand-data-max=19",
]
TESTED = "--arch-embedding-size=40-30-20 --round-targets --test-mini-batch-size=50 "  # 50, 50 and 20 samples
EVALUATIONS = [
    COMMON + TESTED + f"--test-freq=2 --mlperf-logging --output-folder={tempfile.gettempdir()}",
    COMMON + TESTED + "--test-freq=1 --mlperf-auc-threshold=0.55 --optimizer=adagrad --sharding=column",
    COMMON + TESTED + "--inference-only --print-freq=2 --nepochs=2 --sharding=row --mini-batch-size=25",
]
STEPS = [  # optimizers and steps that have code of their own
    COMMON + "--arch-embedding-size=90-3-20-1 --optimizer=rwsadagrad --sharding=row",
    COMMON + "--arch-embedding-size=40-30-20 --optimizer=rwsadagrad --mlperf-grad-accum-iter=2 --test-freq=2",
    COMMON + "--arch-embedding-size=40-3 --mlperf-grad-accum-iter=5 --sharding=column",
    COMMON + "--arch-embedding-size=90-3-20-1 --optimizer=adagrad --sharding=row --table-data-type=bf16",
    COMMON + "--arch-embedding-size=40-30-20 --optimizer=rwsadagrad --test-freq=2 --table-data-type=bf16",
]
QUIET = os.environ | {"OMP_NUM_THREADS": "1"}
WHY_NO_MPI = "mpi4py or mpirun is not installed" if find_spec("mpi4py") is None or mpirun() is None else ""
NEEDS_MPI = pytest.mark.skipif(bool(WHY_NO_MPI), reason=WHY_NO_MPI)


def run_ranks(job: LaunchJob, cases: list[str], folder: Path, **settings) -> list[dict]:
    """Runs `distributed_worker.py` on all ranks, and returns what rank 0 saved for each case."""
    cases_file, results_file = folder / "cases.json", folder / "results.pt"
    cases_file.write_text(json.dumps(cases))
    (command,) = commands(job, [str(WORKER), str(cases_file), str(results_file)], {})
    result = subprocess.run(command, env=QUIET | settings, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(results_file)


def check_equal(several: dict, one: dict) -> None:
    torch.testing.assert_close(several["losses"], one["losses"], rtol=0, atol=2e-6)
    torch.testing.assert_close(several["scores"], one["scores"], rtol=0, atol=2e-6)
    assert several["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(several["weights"][name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)
    torch.testing.assert_close(several["moments"], one["moments"], rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, dict]:
    return {case: train(options_of(case)) for case in CASES + EXTRA + EVALUATIONS + STEPS}


# ---------------------------------------------------------------------------------------------------------------------
# The same results
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_train_as_one(size, one_rank, tmp_path):
    cases = CASES + EXTRA + EVALUATIONS + STEPS if size > 1 else CASES[:3]
    results = run_ranks(LaunchJob(size), cases, tmp_path)
    for case, result in zip(cases, results, strict=True):
        check_equal(result, one_rank[case])
        assert result["lines"].count("Distributed Loss :: ") == (2 if "dist-loss" in case else 0)


@NEEDS_MPI
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_train_as_one_under_mpirun(size, one_rank, tmp_path):
    cases = CASES[size::9] + (EVALUATIONS if size > 1 else [])
    for case, result in zip(cases, run_ranks(LaunchJob(size, "mpirun"), cases, tmp_path), strict=True):
        check_equal(result, one_rank[case])


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_emulated_gaudis_train_as_one_cpu(mode, one_rank, tmp_path):
    cases = CASES[::5] + EXTRA[:2] + EVALUATIONS + STEPS[:3]
    on_gaudi = [case.replace("--device=cpu", f"--device=hpu --mode={mode}") for case in cases]
    results = run_ranks(LaunchJob(2), on_gaudi, tmp_path, **environment(mode))
    for case, result in zip(cases, results, strict=True):
        check_equal(result, one_rank[case])


def test_bf16_and_compile_mode_run_on_two_ranks(one_rank, tmp_path):
    cases = [CASES[0] + " --data_type=bf16", CASES[1] + " --mode=compile"]
    bf16, compiled = run_ranks(LaunchJob(2), cases, tmp_path)
    check_equal(compiled, one_rank[CASES[1]])
    torch.testing.assert_close(bf16["losses"], one_rank[CASES[0]]["losses"], rtol=0, atol=2e-2)


class Watch(DenseGradients):
    """Records which layers have a gradient when the model calls `start_top`."""

    def __init__(self, layers):
        self.layers, self.complete = layers, None

    def start_top(self) -> None:
        self.complete = [all(g is not None and bool(g.any()) for g in layer.gradients) for layer in self.layers]

    def start_bottom(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("layer_type", [FusedLayer, PlainLayer])
def test_the_top_mlps_gradients_are_summed_before_the_bottom_mlp_has_any(layer_type, monkeypatch):
    def to_itself(into, rows, *_, **__):
        into.copy_(rows)
        return Mock()

    monkeypatch.setattr(torch.distributed, "all_to_all_single", to_itself)
    monkeypatch.setattr(CpuBackend, "layer", lambda _, weight, bias, relu: layer_type(weight, bias, relu))
    options = options_of(COMMON + "--arch-embedding-size=40-30-20 --arch-mlp-bot=5-16-4 --arch-mlp-top=16-1")
    trainer = Trainer(open_data_set(options), select_backend(options))
    ranks = ManyRanks(options, Launch(), make_plan(options, 1), trainer.backend, None)
    watch = Watch(trainer.model.dense_layers())
    trainer.model.exchange = ranks.exchange(trainer.backend.device)
    trainer.model.exchange.call_when_gradient_arrives(watch.start_top)
    for batch in itertools.islice(trainer.batches(), 1):
        trainer.train_step(batch)
    assert watch.complete == [False, False, True, True]


@pytest.mark.parametrize("bags", ["", "--multi-hot-sizes=" + "-".join(map(str, [3, 1, 5, 2] * 6 + [1, 4]))])
def test_a_data_set_is_preprocessed_once_and_shared(bags, launcher, script, tmp_path):
    pytest.importorskip("polars")
    generate(str(tmp_path / "train.txt"), 500)
    flags = (
        f"--data-generation=dataset --raw-data-file={tmp_path / 'train.txt'} --mlperf-bin-loader --mini-batch-size=30 "
        "--arch-mlp-bot=13-8-4 --arch-sparse-feature-size=4 --device=cpu --print-freq=5 --test-freq=9 "
        f"--mlperf-grad-accum-iter=2 --test-mini-batch-size=7 {bags} --world_size="
    )
    several = launcher(flags + "2")
    assert several.returncode == 0, several.stderr
    assert several.stderr.count("Preprocessing") == 1
    outputs = several.stdout, script(flags + "1")[1]
    ours, ones = (list(map(float, re.findall(r"(?:loss|accuracy|auc) (\d+\.\d+)", output))) for output in outputs)
    assert len(ones) == 3 * 2 + 2 * 4  # in lines of training and of tests
    torch.testing.assert_close(ours, ones, rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Placement
# ---------------------------------------------------------------------------------------------------------------------


def covered(plan: Plan) -> bool:
    """Says whether every number of every table lies in exactly one piece."""
    seen = [torch.zeros(rows, plan.dim, dtype=torch.int32) for rows in plan.table_rows]
    for piece in plan.pieces:
        piece.cut_from(seen[piece.table]).add_(1)
    return all(bool((table == 1).all()) for table in seen)


@pytest.mark.parametrize("sharding", ["auto", "row", "column"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("tables", ["1", "7", "1-1-1", "1000-10-10-10", "5-900-4-33-1-8-2-6-70"])
def test_plans_cover_each_table_once(tables, ranks, sharding):
    options = options_of(f"{COMMON}--arch-embedding-size={tables} --sharding={sharding}")
    plan = make_plan(options, ranks)
    assert len(plan.ranks) == ranks
    assert covered(plan)
    assert len({piece.columns for piece in plan.pieces}) == 1


def test_whole_tables_are_balanced():
    tables = "-".join(["1000"] * 8 + ["500"] * 8)
    plan = make_plan(options_of(f"{COMMON}--arch-embedding-size={tables}"), 4)
    assert {plan.bytes(rank) for rank in range(4)} == {4 * 4 * 3000}
    assert all(piece.rows in (500, 1000) for piece in plan.pieces)


def test_a_table_larger_than_a_ranks_memory_is_cut_by_rows():
    options = options_of(f"{COMMON}--arch-embedding-size=1000-10-10-10 --optimizer=adagrad")
    plan = make_plan(options, 4, memory=16_000)  # the table has 1000 * 4 * 4 bytes, and its moments as many
    assert [piece.rows for piece in plan.pieces if piece.table == 0] == [500, 500]
    assert max(plan.bytes(rank) for rank in range(4)) <= 16_500


def test_the_plan_is_printed_instead_of_training(launcher):
    result = launcher(f"{COMMON}--arch-embedding-size=40-30-20-4 --world_size=3 --sharding=row --print-plan")
    lines = result.stdout.splitlines()
    assert result.returncode == 0
    assert re.split(r"\s{2,}", lines[0]) == ["rank", "tables", "bytes", "expected lookups a batch"]
    assert len(lines) == 4
    assert "0[0:13]" in result.stdout


def test_the_printed_plan_is_made_for_the_memory_that_a_rank_will_have(monkeypatch, script):
    monkeypatch.setattr(CpuBackend, "memory_limit", lambda _: 4 * 16_000)  # as in the test above
    flags = f"{COMMON}--arch-embedding-size=1000-10-10-10 --optimizer=adagrad --world_size=4 --print-plan"
    status, output, _ = script(flags)
    assert status == 0
    assert "0[0:500]" in output


@pytest.mark.parametrize(("flags", "ranks"), [("--arch-embedding-size=9-8-7-6", 2), ("--arch-embedding-size=5-5-5", 3)])
def test_each_rank_sends_what_the_formula_says(flags, ranks):
    """Compares with the bytes sent in one direction, by the sizes that the exchange gives to the all-to-all."""
    options = options_of(COMMON + flags)
    plan = make_plan(options, ranks)
    for rank in range(ranks):
        exchange = AllToAll(plan, rank, torch.device("cpu"))
        to_each = exchange.rows_by_piece(options.mini_batch_size // ranks)
        sent = 4 * plan.width * (sum(to_each) - to_each[rank])
        assert 2 * sent == bytes_by_formula(options, ranks, 0)["all-to-all"]


def test_no_rank_sends_or_receives_nothing():
    """hccl skips a collective on a rank that sends nothing, while the other ranks wait for it."""
    plan = make_plan(options_of(COMMON + "--arch-embedding-size=1"), 3)
    assert sorted(map(len, plan.ranks)) == [0, 0, 1]
    for rank in range(3):
        exchange = AllToAll(plan, rank, torch.device("cpu"))
        assert exchange.rows_by_piece(8) == exchange.rows_by_sample(8) == [8, 8, 8]


def test_values_of_ranks_travel_as_json():
    def to_others(value):
        return json.loads(json.dumps(value, default=to_json), object_hook=from_json)

    plain = [None, -(2**60), 0.1, "\u00e9", {"--learning-rate": "0.1", "torch": "2.5"}]
    assert to_others(plain) == plain
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool):
        tensors = {"scalar": torch.tensor(1, dtype=dtype) / 3, "matrix": (10 * torch.rand(3, 2)).to(dtype)}
        torch.testing.assert_close(to_others(tensors), tensors, rtol=0, atol=0)
    not_finite = torch.tensor([math.nan, math.inf])
    torch.testing.assert_close(to_others(not_finite), not_finite, equal_nan=True)
    for error in (UsageError("--flag: wrong"), RunError("disk full"), LocalError("rank 1 is gone")):
        received = to_others(error)
        assert (type(received), str(received)) == (type(error), str(error))


@pytest.mark.parametrize("sharding", ["table", "column"])
def test_reports_of_all_ranks_count_the_bytes_of_one(sharding):
    options = options_of(f"{COMMON}--arch-embedding-size=40-30-20 --sharding={sharding}")
    plan = make_plan(options, 2)
    several = [ManyRanks(options, Launch("", 2, rank), plan, None, None) for rank in (0, 1)]

    def moved(ranks: Ranks) -> float:
        lookups = sum(100 + piece.table for piece in ranks.held_pieces)
        return embedding_bytes_per_iteration(options, ranks, lookups, lookups / 2)

    assert sum(map(moved, several)) == pytest.approx(moved(OneRank(options)))


# ---------------------------------------------------------------------------------------------------------------------
# The launcher
# ---------------------------------------------------------------------------------------------------------------------

SMALL = COMMON + "--arch-embedding-size=40-30-20 "
STORED = "--data-generation=dataset --arch-mlp-bot=13-6-4 --nepochs=1000000 --test-freq=7"
ENDLESS = SMALL.replace("--num-batches=5", "--num-batches=10000000") + "--print-freq=50 "


def test_the_launcher_prints_rank_0s_lines_alone(launcher, tmp_path):
    file = tmp_path / "report.json"
    result = launcher(f"{SMALL}--world_size=2 --print-time --report={file}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("world size: 2, current rank: 0, local rank: 0") == 1
    assert "Running on 2 ranks using gloo backend" in result.stdout
    assert result.stdout.count("Finished training") == 5
    assert result.stdout.count("Report of") == 1
    assert "  device      2 x cpu (" in result.stdout
    assert json.loads(file.read_text())["ranks"] == 2
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--world_size=5",
            "--mini-batch-size=24 is the batch of all ranks, and does not divide over 5 of them; use 20",
        ),
        ("--world_size=4 --sharding=table", "--sharding=table: there are 3 tables for 4 ranks"),
        ("--hosts=a,b", "--hosts needs --world_size of 2 or more"),
        ("--world_size=3 --hosts=a,b", "--world_size=3 does not divide over the 2 hosts"),
        ("--world_size=2 --hosts=a,,b", "--hosts: expected names joined by commas"),
        ("--world_size=2 --hosts=a,a", "--hosts=a,a names a host twice"),
        ("--world_size=2 --hosts=a,b --node-rank=2", "--node-rank=2: --hosts names 2, counted from 0"),
        ("--world_size=2 --node-rank=0", "--node-rank has no effect without --hosts"),
        ("--world_size=2 --master-addr=a", "--master-addr has no effect without --hosts"),
        ("--world_size=2 --master-port=29500", "--master-port has no effect without --hosts"),
        (
            "--world_size=2 --launcher=mpirun --hosts=a --node-rank=0",
            "--node-rank has no effect with --launcher=",
        ),
        ("--world_size=2 --launcher=mpirun --hosts=a --master-port=1", "--master-port has no effect with --launcher="),
        ("--world_size=2 --launcher=ssh", "--launcher: expected one of torchrun, mpirun"),
        (
            "--world_size=2 --sharding=column --optimizer=rwsadagrad",
            "--optimizer=rwsadagrad has one moment for a row, which --sharding=column would cut",
        ),
        ("--world_size=2 --sharding=hash", "--sharding: expected one of auto, table, row, column"),
        ("--world_size=2 --master-port=0", "--master-port: expected an integer from 1 to 65535"),
        ("--dist-timeout=0", "--dist-timeout: expected an integer from 1"),
        ("--distributed", "--distributed: start it by demo_dlrm.py, torchrun, mpirun or srun"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, launcher):
    result = launcher(SMALL + flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_to_run_on_each_host_is_printed(launcher):
    output = launcher(SMALL + "--world_size=4 --hosts=one,two --master-port=1234").stdout
    assert re.search(r"^one: env .*--nproc-per-node=2 --nnodes=2 --master-addr=one .*=1234 .*-rank=0", output, re.M)
    assert re.search(r"^two: env .* --node-rank=1 ", output, re.M)
    output = launcher(SMALL + "--world_size=2 --hosts=elsewhere").stdout
    assert re.search(r"^elsewhere: env .*--nproc-per-node=2 --nnodes=1 --master-addr=elsewhere .*-rank=0", output, re.M)
    assert "Finished" not in output


OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MVAPICH = {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_SIZE": "4", "PMI_RANK": "3"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
KUBEFLOW = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # of `salloc -n 4`


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, ("", 1, 0, 0, 1, True)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ("mpirun", 4, 3, 1, 2, False)),
        (MVAPICH | {"MV2_COMM_WORLD_LOCAL_SIZE": "4"}, ("MVAPICH", 4, 3, 1, 4, True)),
        (PMI | {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, ("mpiexec", 4, 3, 1, 2, False)),
        (PMI | {"PMI_LOCAL_RANK": "3", "PMI_LOCAL_SIZE": "4"}, ("mpiexec", 4, 3, 3, 4, True)),
        (PMI | STEP, ("srun", 16, 9, 1, 16, False)),
        (STEP, ("srun", 16, 9, 1, 16, False)),
        (STEP | {"SLURM_TASKS_PER_NODE": "8(x2)"}, ("srun", 16, 9, 1, 8, False)),
        (STEP | {"SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_TASKS_PER_NODE": "16"}, ("srun", 16, 9, 1, 16, True)),
        (STEP | {"SLURM_NTASKS": "20", "SLURM_STEP_NUM_TASKS": "16"}, ("srun", 16, 9, 1, 16, False)),
        (ALLOCATION, ("", 1, 0, 0, 1, True)),
        (ALLOCATION | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, ("", 1, 0, 0, 1, True)),
        (ELASTIC | STEP, ("torchrun", 2, 1, 0, 1, False)),
        (KUBEFLOW, ("environment", 4, 3, 0, 1, False)),
        (KUBEFLOW | {"MASTER_ADDR": "localhost"}, ("environment", 4, 3, 3, 4, True)),
        (KUBEFLOW | {"LOCAL_RANK": "1"}, ("environment", 4, 3, 1, 4, False)),
    ],
)
def test_ranks_are_known_by_the_variables_of_their_launcher(environment, launch):
    assert find_launch(environment) == launch
    assert find_launch(environment | Launch(*launch).environment()) == launch  # as a rank sets them for torch


def test_slurms_tasks_per_node_are_read():
    for tasks, nodes in {"8(x2)": [8, 8], "9,7": [9, 7], "5(x3),1": [5, 5, 5, 1], "16": [16]}.items():
        for node, local_size in enumerate(nodes):
            there = {"SLURM_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
            assert find_launch(STEP | there).local_size == local_size
    assert slurm_master({"SLURM_STEP_NODELIST": "gaudi[03-07,12]", "MASTER_PORT": "9"}) == ("gaudi03", 9)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ELASTIC | {"RANK": "7"}, "RANK=7 is no rank of WORLD_SIZE=2"),
        (ELASTIC | {"RANK": "-1"}, "RANK=-1: expected an integer from 0 to 65535"),
        (ELASTIC | {"WORLD_SIZE": ""}, "WORLD_SIZE=: expected an integer from 1 to 65536"),
        (ELASTIC | {"WORLD_SIZE": "9" * 5000}, "expected an integer from 1 to 65536"),
        (ELASTIC | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3: expected an integer from 1 to 2"),
        (ELASTIC | {"LOCAL_RANK": "1"}, "LOCAL_RANK=1: expected an integer from 0 to 0"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE=two: expected an integer"),
        (STEP | {"SLURM_NTASKS": "0"}, "SLURM_NTASKS=0: expected an integer from 1"),
        (STEP | {"SLURM_LOCALID": "1e3"}, "SLURM_LOCALID=1e3: expected an integer from 0 to 15"),
        (STEP | {"SLURM_TASKS_PER_NODE": "8(2)"}, "SLURM_TASKS_PER_NODE=8(2): expected the numbers of ranks"),
        (STEP | {"SLURM_TASKS_PER_NODE": "x"}, "SLURM_TASKS_PER_NODE=x: expected the numbers of ranks"),
        (STEP | {"SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "2"}, "SLURM_NODEID=2: expected an integer from 0"),
        (PMI, "PMI_SIZE=4 says that there are several ranks"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 says that there are several ranks"),
        ({"RANK": "1"}, "RANK=1 says that there are several ranks"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 says that there are several ranks"),
    ],
)
def test_variables_that_cannot_be_are_named(environment, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        find_launch(environment)


@pytest.mark.parametrize("port", ["auto", "", "0", "99999", "-1"])
def test_a_port_that_is_none_is_named(port):
    for find_master in (master, slurm_master):
        with pytest.raises(UsageError, match=f"^MASTER_PORT={port}: expected an integer from 1 to 65535$"):
            find_master({"MASTER_PORT": port})
    with pytest.raises(UsageError, match="MASTER_ADDR=: expected the address of the host of rank 0"):
        master({"MASTER_ADDR": ""})


def test_a_rank_names_the_variable_in_one_line(rank, script, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "auto")
    status, _, errors = script(SMALL)
    assert status == 2
    assert errors.endswith("MASTER_PORT=auto: expected an integer from 1 to 65535\n")
    assert errors.count("\n") == 1


@pytest.fixture(params=[0, 1])
def rank(request, monkeypatch) -> int:
    """Makes this process rank 0 or 1 of two, as a launcher does that knows no `--world_size`. Nothing sleeps."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for name, value in {"WORLD_SIZE": 2, "RANK": request.param, "LOCAL_RANK": request.param}.items():
        monkeypatch.setenv(name, str(value))
    return request.param


@pytest.mark.parametrize("flag", ["--qr-flag", "--weighted-pooling=fixed", "--plot-compute-graph"])
def test_what_works_on_one_device_alone_is_refused_whoever_starts_ranks(flag, rank, script):
    status, _, errors = script(SMALL + flag + " --dist-timeout=1")
    assert status == 2
    assert f"error: {'rank 1: ' if rank else ''}{flag.split('=')[0]}" in errors
    assert "--world_size=1\n" in errors


def test_rank_0_alone_prints_from_the_start(rank, script):
    assert len(script(SMALL + "--print-plan")[1].splitlines()) == (0 if rank else 3)


def start_as_mpirun(program: str) -> subprocess.Popen:
    """Starts a Python program in the place of the mpirun that `run_mpirun` starts."""
    wrapper = (
        "import sys; from dlrm.distributed.launch import run_mpirun; "
        "sys.exit(run_mpirun([sys.executable, '-c', sys.argv[1]]))"
    )
    pipes = {"stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", wrapper, program], cwd=ROOT, **pipes)


@pytest.mark.parametrize(
    ("number", "status"), [("SIGUSR1", 130), ("SIGUSR2", 143), ("SIGKILL", 137), ("SIGINT", 0), ("SIGTERM", 0)]
)
def test_exit_status_where_mpirun_is_ended_by_a_signal(number, status):
    """SIGINT and SIGTERM are blocked in mpirun, which would end ranks before they have saved."""
    run = start_as_mpirun(f"import os, signal; os.kill(os.getpid(), signal.{number})")
    assert run.wait(timeout=60) == status


@pytest.mark.parametrize(
    ("sent", "stand_in"),
    [("SIGINT", "SIGUSR1"), ("SIGTERM", "SIGUSR2"), ("SIGUSR1", "SIGUSR1"), ("SIGUSR2", "SIGUSR2")],
)
def test_mpirun_is_sent_a_stand_in_and_at_the_second_signal_its_end(sent, stand_in):
    program = f"""
import os, signal, time
# No print, which a signal may reach while it prints "ready".
signal.signal(signal.{stand_in}, lambda *_: os.write(1, b"{stand_in}\\n"))
print("ready", flush=True)
while True: time.sleep(1)
"""
    run = start_as_mpirun(program)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(getattr(signal, sent))
    assert run.stdout.readline() == f"{stand_in}\n"
    time.sleep(1.2)  # a signal within one second would count as the first one
    run.send_signal(getattr(signal, sent))
    assert run.wait(timeout=60) == 128 + signal.SIGHUP


@pytest.mark.parametrize(("has_option", "seconds"), [(True, 5), (False, 600)])
def test_how_long_torchrun_waits_after_a_death(has_option, seconds, monkeypatch):
    """An older torch has one time for a death and for a signal. It must be long enough for saving."""

    class Context:
        def close(self, death_sig=None, timeout=30):
            return timeout

    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    config = Mock(spec=["shutdown_timeout"] if has_option else [])
    set_patience(Mock(LaunchConfig=config), Mock(**{"api.PContext": Context}))
    assert Context().close() == seconds


# ---------------------------------------------------------------------------------------------------------------------
# Two hosts
# ---------------------------------------------------------------------------------------------------------------------


def ip(*arguments: str) -> int:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode


@pytest.fixture
def two_hosts():
    """Makes two network namespaces that a virtual cable joins. Yields for each the words to put before a command, and
    the address."""
    names = [f"dlrm-{os.getpid()}-{host}" for host in (0, 1)]
    if os.geteuid() or shutil.which("ip") is None or ip("netns", "add", names[0]):
        pytest.skip("network namespaces need root and the program ip")
    ip("netns", "add", names[1])
    try:
        end = ("name", "eth0", "netns")
        if ip("link", "add", *end, names[0], "type", "veth", "peer", *end, names[1]):
            pytest.skip("this kernel has no veth")
        addresses = ["10.111.0.1", "10.111.0.2"]
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield [(("ip", "netns", "exec", name), address) for name, address in zip(names, addresses, strict=True)]
    finally:
        for name in names:
            ip("netns", "del", name)


def start_on(host, node_rank: int, hosts, flags: str) -> subprocess.Popen:
    addresses = ",".join(address for _, address in hosts)
    command = [*host[0], sys.executable, str(ROOT / "demo_dlrm.py"), *flags.split(), f"--hosts={addresses}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, f"--node-rank={node_rank}"], env=QUIET, **pipes)


def test_two_hosts_train_as_one_rank(two_hosts, script):
    processes = [start_on(host, rank, two_hosts, SMALL + "--world_size=4") for rank, host in enumerate(two_hosts)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    one = re.findall(r"it, loss ([\d.]+)", script(SMALL)[1])
    several = re.findall(r"it, loss ([\d.]+)", outputs[0][0])
    torch.testing.assert_close(list(map(float, several)), list(map(float, one)), rtol=0, atol=2e-6)
    assert "Finished" not in outputs[1][0]


def test_a_cable_that_is_cut_ends_the_run_on_both_hosts(two_hosts):
    flags = ENDLESS + "--world_size=2 --dist-timeout=8"
    runs = [start_on(host, rank, two_hosts, flags) for rank, host in enumerate(two_hosts)]
    wait_for_line(runs[0])
    ip("-n", two_hosts[0][0][-1], "link", "set", "eth0", "down")
    for rank, run in enumerate(runs):
        status, errors = finish(run)
        assert status == 1
        assert errors.endswith(f"rank {rank}: rank {1 - rank} no longer answered, so the run can't go on\n")


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_rank(rank: int, size: int, port: int, flags: str) -> subprocess.Popen:
    """Starts the trainer as one of several ranks without a launcher that ends the others when one dies."""
    variables = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return start_program("dlrm_s_pytorch.py", flags.split(), {name: str(value) for name, value in variables.items()})


def start_program(name: str, flags: list[str], variables: dict[str, str]) -> subprocess.Popen:
    command, pipes = [sys.executable, str(ROOT / name), *flags], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=QUIET | variables, text=True, **pipes)


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    """Waits for a process. Returns its exit status and what it printed on stderr."""
    try:
        errors = process.communicate(timeout=timeout)[1]
    finally:
        process.kill()
    return process.returncode, errors


def test_ranks_with_different_flags_are_refused():
    port = free_port()
    ranks = [start_rank(rank, 2, port, SMALL + f"--learning-rate=0.{rank + 1}") for rank in (0, 1)]
    (status, errors), (other_status, other_errors) = map(finish, ranks)
    assert (status, other_status) == (2, 2)
    assert "--learning-rate is 0.2 on rank 1, but 0.1 on rank 0; ranks must be alike" in errors
    assert errors.count("\n") == 1
    assert other_errors == ""


def test_ranks_with_different_preprocessed_data_are_refused(tmp_path):
    path, prints = tmp_path / "train_processed.npz", []
    write_npz(path, random_rows(70), counts=np.array(COUNTS))
    manifest = path.with_suffix("") / "manifest.json"
    manifest.parent.mkdir()
    options = Options(data_generation="dataset", processed_data_file=str(path), arch_mlp_bot=(13, 2))
    for checksum in (1, 1, 2):
        manifest.write_text(f'{{"checksums": [{checksum}]}}')
        prints.append(rank_fingerprint(open_data_set(options)))
    check_same(prints[:2])
    with pytest.raises(UsageError, match=r"the preprocessed data is .* on rank 2, but .* on rank 0; ranks must"):
        check_same(prints)


def test_any_source_file_that_differs_changes_the_digest(tmp_path):
    shutil.copytree(ROOT / "dlrm", tmp_path / "dlrm", ignore=shutil.ignore_patterns("__pycache__"))
    for program in ROOT.glob("*.py"):
        shutil.copy(program, tmp_path)
    undisturbed, digests = digest_of_source(tmp_path), set()
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    assert {".py", ".cpp", ".h"} == {file.suffix for file in files}
    for file in files:
        text = file.read_text()
        file.write_text(text + "\n")
        digests.add(digest_of_source(tmp_path))
        file.write_text(text)
    assert len(digests | {undisturbed}) == len(files) + 1
    files[0].rename(files[0].with_name("renamed.py"))
    assert digest_of_source(tmp_path) != undisturbed


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_said():
    status, errors = finish(start_rank(0, 2, free_port(), SMALL + "--dist-timeout=3"))
    assert status == 1
    assert "the 2 ranks did not meet" in errors
    assert errors.count("\n") == 1


NOWHERE = "192.0.2.1"  # nobody has this address: it is one for examples (RFC 5737)
RANK_1 = {
    "environment": {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": NOWHERE},
    "srun": {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
             "SLURM_STEP_NODELIST": f"{NOWHERE},here"},
}  # fmt: skip


def test_a_host_out_of_reach_is_named_whoever_starts_ranks():
    flags = (SMALL + "--dist-timeout=2").split()
    demo = [*flags, "--world_size=2", f"--hosts={NOWHERE},here", "--node-rank=1"]
    runs = {by: start_program("dlrm_s_pytorch.py", flags, variables) for by, variables in RANK_1.items()}
    runs["torchrun"] = start_program("demo_dlrm.py", demo, {})
    for by, (status, errors) in {by: finish(process) for by, process in runs.items()}.items():
        assert (by, status, errors.count("\n")) == (by, 1, 1), errors
        assert NOWHERE in errors


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, errors = finish(start_rank(0, 2, taken.getsockname()[1], SMALL + "--dist-timeout=5"))
    assert status == 2
    assert "MASTER_PORT is in use" in errors
    assert errors.count("\n") == 1


def wait_for_line(process: subprocess.Popen) -> None:
    while not process.stdout.readline().startswith("Finished"):
        assert process.poll() is None


def children(pid: int) -> dict[int, int]:
    """Returns {rank: process id} of the ranks that a launcher has started."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    environments = {int(p): Path(f"/proc/{p}/environ").read_bytes().decode().split("\0") for p in pids}
    return {
        int(setting.removeprefix("RANK=")): p
        for p, settings in environments.items()
        for setting in settings
        if setting.startswith("RANK=")
    }


@pytest.mark.skipif(
    not hasattr(LaunchConfig, "shutdown_timeout"),
    reason="this torch has one time for saving and for the end after a death, which is too long to wait for",
)
def test_a_rank_that_is_killed_ends_the_run_and_is_named():
    """Another rank is stopped, so that it ignores SIGTERM, as a rank does that hangs in gloo."""
    launcher = start_program("demo_dlrm.py", [*ENDLESS.split(), "--world_size=3"], {})
    wait_for_line(launcher)
    ranks = children(launcher.pid)
    os.kill(ranks[2], signal.SIGSTOP)
    os.kill(ranks[1], signal.SIGKILL)
    status, errors = finish(launcher, timeout=25)  # by itself, torch would give the other ranks 30 s
    assert status == 1
    assert errors == f"demo_dlrm.py: error: rank 1 (process {ranks[1]}) was ended by SIGKILL\n"


def test_all_ranks_print_if_told_to_and_ctrl_c_ends_them_with_one_line():
    launcher = start_program("demo_dlrm.py", [*ENDLESS.split(), "--world_size=2", "--print-all-ranks"], {})
    output = "".join(itertools.takewhile(lambda line: "it 100/" not in line, launcher.stdout))
    launcher.send_signal(signal.SIGINT)
    assert finish(launcher) == (130, ANNOUNCEMENT + "dlrm_s_pytorch.py: interrupted\n")
    assert output.count("Finished training it 50/") == 2
    assert "world size: 2, current rank: 1, local rank: 1" in output


def test_ctrl_c_is_answered_at_once(capfd):
    for number, announces, expected in (
        (signal.SIGINT, True, ANNOUNCEMENT),
        (signal.SIGINT, False, ""),
        (signal.SIGTERM, True, ""),
    ):
        with StopSignals(announces) as signals:
            signal.raise_signal(number)
            signal.raise_signal(number)  # within a second, it is the same one
            assert capfd.readouterr().err == expected
            assert signals.received == number


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loss-function=mse --learning-rate=1e30 --print-freq=2", "error: the loss of iteration 2 of epoch 0 is nan"),
        ("--rand-data-dist=gaussian --rand-data-max=99 --rand-data-sigma=99", "the table's rows are 0 to "),
        ("--device=cuda", "error: --device=cuda: torch finds no CUDA GPU here"),
        ("--dist-backend=mpi", "error: --dist-backend=mpi: torch has no such back end here; cpu takes gloo"),
        ("--arch-embedding-size=2147483647-2147483647", "error: rank 0: this run needs"),
    ],
)
def test_what_goes_wrong_in_a_run_is_one_line(flags, message, launcher):
    result = launcher(f"{SMALL}--world_size=2 {flags}", env=QUIET | {"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == (1 if "--rand" in flags or "--loss" in flags else 2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_that_nobody_watches_over_name_the_one_that_is_gone(killed, tmp_path):
    """The run with random data loses rank 0. The run that reads a data set and exchanges lookups loses rank 1."""
    port, flags = free_port(), ENDLESS + "--print-all-ranks --dist-timeout=30"  # which ends a hang in gloo
    if killed:
        write_npz(tmp_path / "kaggle_processed.npz", random_rows(590), counts=COUNTS)
        flags += f" {STORED} --processed-data-file={tmp_path / 'kaggle_processed.npz'}"
    ranks = [start_rank(rank, 2, port, flags) for rank in (0, 1)]
    wait_for_line(ranks[0])
    ranks[killed].kill()
    status, errors = finish(ranks[1 - killed])
    finish(ranks[killed])
    assert status == 1
    assert errors.endswith(f"rank {1 - killed}: rank {killed} no longer answered, so the run can't go on\n")
    assert errors.count("\n") == 1
