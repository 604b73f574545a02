"""Runs of the trainer from its command line: losses, output, report, and errors that end a run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn import functional

import dlrm_s_pytorch
from dlrm.batch import Batch
from dlrm.data import random_data
from dlrm.data.data_set import open_data_set
from dlrm.data.random_data import RandomData
from dlrm.kernels.embedding import EmbeddingBags, SparseSGD
from dlrm.options import Options
from dlrm.pipeline import BatchPipeline
from dlrm_s_pytorch import DLRM_Net, Trainer, select_backend

# Losses that facebookresearch/dlrm (commit 090956e) printed: `python dlrm_s_pytorch.py FLAGS`, torch 2.13, Intel Xeon
# with AMX. `with_other_sums` are those that it printed, where they differ, on an AMD EPYC with AVX2, and there with
# MKL_CBWR=COMPATIBLE. MKL adds up in another order on each; Adagrad makes a whole step of a rounding error near zero.
REFERENCE = json.loads(Path(__file__).with_name("reference_losses.json").read_text())
SMALL = "--mini-batch-size=4 --num-batches=6 "
LINE = re.compile(
    r"Finished (training|inference) it (\d+)/(\d+) of epoch (\d+), (-?\d+\.\d\d) ms/it, loss (\d+\.\d{6}|nan|inf), "
    r"accuracy (\d+\.\d{3}) %"
)


def losses(output: str) -> list[str]:
    return re.findall(r"it, loss ([\d.]+)", output)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: case["flags"].replace("--", ""))
def test_losses_equal_the_reference_script(case, script):
    status, output, _ = script(case["flags"])
    assert status == 0
    theirs = np.array([line.split() for line in (case["losses"], *case.get("with_other_sums", ()))], float)
    moves = np.ptp(theirs, axis=0)  # of the script itself, from one order of sums to another
    rounding = 1.5e-6  # of the sixth digit
    difference = np.abs(np.array(losses(output), float) - theirs).min(axis=0)
    assert (difference <= rounding + moves).all(), difference


def test_gradients_of_all_weights_equal_those_of_plain_torch():
    """A step of SGD moves every parameter, tables included, by the learning rate times the gradient of plain torch."""
    options = Options(mini_batch_size=3, num_batches=1, loss_function="mse", arch_interaction_op="cat")
    trainer = Trainer(open_data_set(options), select_backend(options))
    batch = next(iter(RandomData(options)))
    before = {name: p.detach().clone().double().requires_grad_() for name, p in trainer.model.named_parameters()}

    def plain_torch_loss(parameters):
        dense = batch.dense.double()
        for layer in (0, 2):
            dense = torch.relu(dense @ parameters[f"bot_l.{layer}.weight"].T + parameters[f"bot_l.{layer}.bias"])
        pooled = [
            torch.nn.functional.embedding_bag(
                batch.indices[t],
                parameters[f"emb_l.{t}.weight"],
                batch.offsets[t],
                mode="sum",
                include_last_offset=True,
            )
            for t in range(3)
        ]
        x = torch.cat([dense, *pooled], dim=1)
        for layer in (0, 2, 4):
            x = x @ parameters[f"top_l.{layer}.weight"].T + parameters[f"top_l.{layer}.bias"]
            x = torch.relu(x) if layer < 4 else torch.sigmoid(x)
        return (x - batch.target.double()).square().mean()

    gradients = torch.autograd.grad(plain_torch_loss(before), list(before.values()))
    trainer.train_step(next(trainer.prepared([batch])))
    for (name, old), gradient in zip(before.items(), gradients, strict=True):
        new = dict(trainer.model.named_parameters())[name].detach().double()
        torch.testing.assert_close((old - new) / options.learning_rate, gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_weights_are_drawn_as_by_the_reference_script():
    model = DLRM_Net(Options(), select_backend(Options()))
    expected = [[0.19647, -0.21386], [-0.27315, 0.05131], [0.21947, -0.07689], [0.48076, 0.18483]]
    torch.testing.assert_close(model.emb_l[0].weight.data, torch.tensor(expected), atol=6e-6, rtol=0)
    assert list(model.state_dict()) == [
        *(f"emb_l.{t}.weight" for t in range(3)),
        *(f"bot_l.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
        *(f"top_l.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
    ]


class LearnableClicks(RandomData):
    """Random data in which a sample is a click if most of its rows are in the second half of their tables."""

    def batches(self, *which):
        for batch in super().batches(*which):
            balances = [  # (B, 1) per table: lookups in the second half less lookups in the first half
                functional.embedding_bag(rows, torch.linspace(-1, 1, size)[:, None].sign(), starts, mode="sum",
                                         include_last_offset=True)
                for rows, starts, size in zip(batch.indices, batch.offsets, self.table_rows, strict=True)
            ]  # fmt: skip
            yield dataclasses.replace(batch, target=(sum(balances) > 0).float())


LEARNABLE = (
    "--arch-sparse-feature-size=8 --arch-embedding-size=100-200-300 --num-indices-per-lookup=3 --arch-mlp-bot=4-16-8 "
    "--arch-mlp-top=32-16-1 --mini-batch-size=128 --num-batches=400 --print-freq=20 --optimizer=adagrad "
    "--learning-rate=0.05 "
)


@pytest.mark.parametrize("types", ["--data_type=bf16", "--table-data-type=bf16", "--data_type=bf16 --mode=compile"])
def test_bf16_learns_as_fp32_does(types, script, monkeypatch):
    monkeypatch.setattr(random_data, "RandomData", LearnableClicks)
    curves = [np.array(losses(script(LEARNABLE + flags)[1]), float) for flags in ("", types)]
    assert curves[0][0] > 0.6
    assert curves[0][-1] < 0.3
    np.testing.assert_allclose(*curves, rtol=0, atol=0.01)
    assert (curves[0] != curves[1]).any()


def test_steps_too_small_for_bf16_tables_add_up():
    """A weight of 1 takes steps of 2^-12, too small for bfloat16, and still ends where fp32 would end."""
    model = EmbeddingBags([torch.ones(8, 64).bfloat16()])
    optimizer = SparseSGD(model, lr=2.0**-12)
    options = Options(arch_embedding_size=(8,), mini_batch_size=8, num_batches=1)
    lookups = Batch(torch.zeros(8, 4), [torch.arange(8)], torch.arange(9)[None], torch.zeros(8, 1))
    prepared = next(BatchPipeline(RandomData(options), select_backend(options)).run([lookups]))
    for _ in range(1024):
        model(prepared.lookups).sum().backward()
        optimizer.step(prepared.lookups)
    assert model.weights[0].float().mean().item() == pytest.approx(0.75, abs=0.01)


def test_only_equal_seeds_give_equal_losses(script):
    first, again, other = (losses(script(SMALL + f"--numpy-rand-seed={seed}")[1]) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("mode", ["lazy", "compile"])
def test_all_modes_give_the_same_losses(mode, script):
    flags = SMALL + "--arch-interaction-op=dot --optimizer=adagrad "
    eager, other = (script(flags + f"--mode={m}") for m in ("eager", mode))
    np.testing.assert_allclose(np.array(losses(eager[1]), float), np.array(losses(other[1]), float), rtol=0, atol=1e-5)
    assert ("here it equals eager mode" in other[1]) == (mode == "lazy")


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


def test_printed_lines_keep_the_format_that_other_scripts_parse(script):
    status, output, errors = script(SMALL + "--print-freq=4 --nepochs=2")
    lines = [LINE.fullmatch(line) for line in output.splitlines() if line.startswith("Finished")]
    assert status == 0
    assert all(lines)
    assert [match.groups()[:5] for match in lines] == [
        ("training", it, "6", epoch, "-1.00") for epoch in "01" for it in "46"
    ]
    assert "time/loss/accuracy (if enabled):" in output
    assert "world size: 1, current rank: 0, local rank: 0" in output
    assert "Using CPU..." in output
    assert "No Gaudi here" in output
    assert errors == ""


def test_wall_time_is_appended(script):
    _, output, _ = script(SMALL + "--print-wall-time")
    assert re.search(r"accuracy \d+\.\d{3} % \(\d\d:\d\d\)$", output, re.MULTILINE)


def test_loss_and_accuracy_belong_to_the_iterations_since_the_last_line(script):
    flags = "--mini-batch-size=8 --num-batches=6 --round-targets --learning-rate=0.3 "
    each, pairs = (
        [LINE.match(line).groups() for line in script(flags + f"--print-freq={n}")[1].splitlines() if LINE.match(line)]
        for n in (1, 2)
    )
    for column in (5, 6):
        single = np.array([float(groups[column]) for groups in each]).reshape(3, 2).mean(axis=1)
        np.testing.assert_allclose([float(groups[column]) for groups in pairs], single, atol=2e-3)


def test_a_partial_batch_is_discarded_with_a_note(script):
    _, output, _ = script("--mini-batch-size=4 --data-size=10")
    assert "The last 2 of 10 samples are discarded" in output
    assert "it 2/2 of epoch 0" in output
    assert "discarded" not in script("--mini-batch-size=4 --data-size=8")[1]


def test_measure_perf_trains_on_the_first_batch_every_time(script):
    _, output, _ = script(SMALL + "--measure-perf --learning-rate=0")
    assert len(losses(output)) == 6
    assert len(set(losses(output))) == 1


def test_inference_changes_no_weight(script):
    _, output, _ = script(SMALL + "--inference-only --measure-perf --learning-rate=0.5")
    assert "Testing for inference only" in output
    assert output.count("Finished inference it") == 6
    assert len(set(losses(output))) == 1


def test_debug_mode_prints_model_and_data_and_trains_the_same(script):
    plain, debug = script(SMALL)[1], script(SMALL + "--debug-mode")[1]
    assert losses(plain) == losses(debug)
    for text in ("model arch:", "mini-batch: 0", "initial parameters", "updated parameters", "emb_l.2.weight"):
        assert text in debug


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def test_report_on_screen_and_as_json(script, tmp_path):
    path = tmp_path / "report.json"
    status, output, _ = script(SMALL + f"--optimizer=adagrad --print-time --report={path}")
    report = json.loads(path.read_text())
    assert status == 0
    assert "Report of" in output
    assert report["iterations"] + report["warm_up_iterations"] == 6
    times = report["ms_per_iteration"]
    assert 0 < times["min"] <= times["median"] <= times["p95"]
    assert report["samples_per_second"] == pytest.approx(4000 / times["median"])
    assert {"wait", "forward", "backward", "optimizer"} <= set(report["phase_ms"])
    assert set(report["host_ms"]) == {"data", "preprocess"}
    assert report["peak_memory"] > 2**20
    assert report["versions"]["torch"]
    # Three times 2 * B * multiplications: bottom MLP 4*3 + 3*2, top MLP 8*4 + 4*2 + 2*1, dot of 4 features 16*2.
    # The gradient of the first layer's input is not computed.
    assert report["gflop_per_iteration"] * 1e9 == pytest.approx(3 * 2 * 4 * (18 + 42 + 32) - 2 * 4 * 12)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("path", ["/nowhere/report.json", "/proc/report.json", "."])
def test_a_report_that_cannot_be_written_is_refused_before_training(path, script):
    status, output, errors = script(SMALL + f"--report={path}")
    assert status == 2
    assert "--report" in errors
    assert "Finished" not in output


# ---------------------------------------------------------------------------------------------------------------------
# Runs that end with an error
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "bce", "wbce --loss-weights=0.3-1.7"])
@pytest.mark.parametrize("how", ["", "--data_type=bf16", "--mode=compile"])
def test_a_loss_that_is_not_finite_ends_the_run(loss, how, script):
    flags = SMALL + f"--loss-function={loss} --learning-rate=1e30 --print-freq=3 {how} "
    status, _, errors = script(flags)
    assert status == 1
    assert re.search(r"the loss of iteration \d of epoch 0 is nan, with a learning rate of 1e\+30", errors)
    assert script(flags + "--allow-nan")[0] == 0


def test_inference_with_nan_weights_names_the_iteration_and_has_no_scores(script, tmp_path):
    path = tmp_path / "nan.pt"
    assert script(SMALL + f"--learning-rate=1e30 --allow-nan --save-model={path}")[0] == 0
    inference = SMALL + f"--inference-only --load-model={path} "
    status, _, errors = script(inference)
    assert status == 1
    assert "the loss of iteration 1 of epoch 0 is nan; try another --load-model" in errors
    status, output, _ = script(inference + "--allow-nan")
    assert status == 0
    assert "loss nan, accuracy nan %, best 0.000 %, auc nan, best auc 0.0000" in output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_a_million_iterations_keep_their_digits(dtype):
    total = dlrm_s_pytorch.LongSum(Mock(wide_dtype=dtype, device=torch.device("cpu")))
    term = torch.tensor(0.45)
    for _ in range(200_000):
        total.add(term)
    assert total.total.item() / 200_000 == pytest.approx(0.45, rel=1e-7)
    again = dlrm_s_pytorch.LongSum(Mock(wide_dtype=dtype, device=torch.device("cpu")))
    again.load(total.state())
    for sum_ in (total, again):
        sum_.add(term)
    assert total.state() == again.state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hits_are_counted_past_the_largest_int32(dtype):
    hits = dlrm_s_pytorch.LongSum(Mock(wide_dtype=dtype, device=torch.device("cpu")))
    for _ in range(17):
        hits.add(torch.tensor(2**27 - 1, dtype=torch.int32))
    assert hits.total.item() == pytest.approx(17 * (2**27 - 1), rel=1e-7)


@pytest.mark.parametrize("how", ["", "--data_type=bf16", "--mode=compile", "--arch-interaction-op=cat"])
def test_a_bottom_mlp_of_one_width_passes_dense_features_on(how, script):
    flags = SMALL + f"--arch-mlp-bot=2 --arch-sparse-feature-size=2 --print-time {how}"
    status, output, errors = script(flags)
    assert (status, errors) == (0, "")
    assert len(losses(output)) == 6


def test_the_first_iteration_whose_loss_is_not_finite_is_named():
    metrics = dlrm_s_pytorch.Metrics(Mock(wide_dtype=torch.float64, device=torch.device("cpu")))
    half = torch.full((2, 1), 0.5)
    for loss in (1.0, 2.0, float("nan"), 1.0):
        metrics.add(torch.tensor(loss), half, half)
    assert metrics.read()[2] == 2
    metrics.add(torch.tensor(3.0), half, half)
    assert metrics.read() == (3.0, 100.0, -1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--arch-embedding-size=2147483647-2147483647 --arch-sparse-feature-size=64 --arch-mlp-bot=4-64",
            "1,024.0 GiB",
        ),
        ("--arch-mlp-bot=900000-900000-2", "for the MLPs (--arch-mlp-bot, --arch-mlp-top)"),
        ("--device=hpu", "--device=hpu: habana-torch-plugin is not installed; use Intel's Gaudi container"),
        ("--lerning-rate=1", "did you mean --learning-rate"),
        ("--world_size=2", "--world_size=2: start it by demo_dlrm.py, torchrun, mpirun or srun"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(flags, message, script):
    status, output, errors = script(flags)
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert "Finished" not in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here, so --device=cuda works")
def test_cuda_without_a_gpu_is_refused(script):
    assert "torch finds no CUDA GPU" in script("--use-gpu")[2]


def test_lookups_outside_a_table_end_the_run(script):
    flags = (
        "--rand-data-dist=gaussian --rand-data-max=9 --rand-data-sigma=9 --arch-embedding-size=10-10-3 --num-batches=9"
    )
    status, _, errors = script(flags)
    assert status == 1
    assert re.search(r"table 2, sample 0: lookup of row \d, but the table's rows are 0 to 2", errors)


def test_loss_and_accuracy_leave_the_device_only_to_be_printed(monkeypatch):
    """Counts calls of `Tensor.item`, the only way by which the training loop reads tensors."""
    options = Options(mini_batch_size=4, num_batches=9, print_freq=3)
    trainer = Trainer(open_data_set(options), select_backend(options))
    reads = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or item(self))
    trainer.run()
    assert len(reads) == 2 * 3
