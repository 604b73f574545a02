"""Tests of the scores, of the lines that tests print, of learning-rate schedules and of gradient accumulation."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from dlrm.batch import Batch, joined, padded
from dlrm.data.data_set import open_data_set
from dlrm.data.random_data import RandomData
from dlrm.errors import UsageError
from dlrm.evaluation import Scores
from dlrm.options import Options
from dlrm.pipeline import BatchPipeline
from dlrm_s_pytorch import LearningRateSchedule, Trainer, select_backend

SMALL = (
    "--mini-batch-size=4 --num-batches=6 --nepochs=2 --round-targets --learning-rate=0.1 --optimizer=adagrad "
    "--arch-embedding-size=30-20-5 "
)
TEST_LINE = re.compile(
    r"Testing at - (\d+)/6 of epoch (\d), loss (\d\.\d{6}), accuracy (\d+\.\d{3}) %, best (\d+\.\d{3}) %, "
    r"auc (\d\.\d{4}), best auc (\d\.\d{4})"
)


def lines_of_training(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("Finished training")]


def lines_of_tests(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("Testing at")]


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000], ids=["many ties", "few ties"])
@pytest.mark.parametrize("share_of_positives", [0.03, 0.5])
def test_scores_equal_those_of_scikit_learn(levels, share_of_positives):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(7)
    target = (generator.random(5000) < share_of_positives).astype(np.float32)
    probability = np.clip(np.rint((0.3 * target + generator.random(5000)) * levels) / levels / 1.3, 0, 1)
    probability = probability.astype(np.float32)
    predicted = probability > 0.5
    scores = Scores.of(0.25, *(torch.from_numpy(values).reshape(-1, 1) for values in (probability, target)))
    assert scores == Scores(
        loss=0.25,
        accuracy=pytest.approx(metrics.accuracy_score(target, predicted)),
        recall=pytest.approx(metrics.recall_score(target, predicted)),
        precision=pytest.approx(metrics.precision_score(target, predicted)),
        f1=pytest.approx(metrics.f1_score(target, predicted)),
        ap=pytest.approx(metrics.average_precision_score(target, probability)),
        auc=pytest.approx(metrics.roc_auc_score(target, probability)),
    )


def test_scores_if_one_class_is_missing():
    scores = Scores.of(0.5, torch.full((3, 1), 0.25), torch.zeros(3, 1))
    assert np.isnan([scores.auc, scores.ap]).all()
    assert (scores.accuracy, scores.recall, scores.precision, scores.f1) == (1, 0, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Tests in training, and inference
# ---------------------------------------------------------------------------------------------------------------------


def test_testing_does_not_change_training(script):
    plain, tested = script(SMALL)[1], script(SMALL + "--test-freq=4 --test-mini-batch-size=7")[1]
    assert lines_of_training(plain) == lines_of_training(tested)
    matches = [TEST_LINE.fullmatch(line) for line in lines_of_tests(tested)]
    assert [match.groups()[:2] for match in matches] == [("4", "0"), ("6", "0"), ("4", "1"), ("6", "1")]
    accuracy, best_accuracy, auc, best_auc = (
        [float(match[group]) for match in matches] for group in range(4, TEST_LINE.groups + 1)
    )
    assert best_accuracy == list(np.maximum.accumulate(accuracy))
    assert best_auc == list(np.maximum.accumulate(auc))


def test_a_part_of_an_epoch_is_as_good_as_its_iterations(script):
    by_iterations, by_part = (script(f"{SMALL} --test-freq={value}")[1] for value in ("2", "0.34"))
    assert lines_of_tests(by_iterations) == lines_of_tests(by_part)
    assert len(lines_of_tests(by_part)) == 6


@pytest.mark.parametrize(
    ("part", "samples", "batch_size", "iterations"),
    [
        (0.05, 4195197692, 65536, 3200),
        (0.05, 4195197692, 8192, 25605),
        (0.29, 100, 1, 29),  # 28.999999999999996 in floating point
        (0.001, 100, 10, 1),
    ],
)
def test_a_part_of_an_epoch_is_rounded_down_to_iterations(part, samples, batch_size, iterations):
    """The first two numbers of iterations are those of MLPerf's rule, floor(0.05 * samples / batch size)."""
    options = Options(test_freq=part, num_batches=0, data_size=samples, mini_batch_size=batch_size)
    assert options.iterations_between_tests == iterations


@pytest.mark.parametrize("value", ["1.5", "-0.1", "0.0", "nan", "-2", "1/20"])
def test_a_frequency_of_tests_that_is_neither_is_refused(value, script):
    status, _, error = script(f"{SMALL} --test-freq={value}")
    assert status == 2
    assert f"expected an integer from -1, or a part of an epoch between 0 and 1, such as 0.05, got '{value}'" in error


def test_each_test_follows_a_line_of_training(script):
    output = script(SMALL + "--test-freq=4 --print-freq=5")[1]
    training, testing = "Finished training", "Testing at -"
    assert re.findall(r"(Finished training|Testing at -) (?:it )?(\d)/6 of epoch 0", output) == [
        (training, "4"), (testing, "4"), (training, "5"), (training, "6"), (testing, "6")
    ]  # fmt: skip


def test_test_data_are_as_many_as_training_data_but_differ():
    options = Options(num_batches=6, mini_batch_size=4, test_mini_batch_size=7)
    train, test = RandomData(options), RandomData(options, test=True)
    assert [len(batch) for batch in test] == [7, 7, 7, 3]
    assert len(test) == 4
    train_targets, test_targets = (torch.cat([batch.target for batch in data]) for data in (train, test))
    assert len(train_targets) == len(test_targets)
    assert not torch.isin(train_targets, test_targets).any()


@pytest.mark.parametrize("loss", ["bce", "mse", "wbce"])
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_padding_changes_no_score(loss, mode):
    options = Options(num_batches=3, mini_batch_size=5, loss_function=loss, round_targets=True, mode=mode)
    trainer = Trainer(open_data_set(options), select_backend(options))
    without_padding = trainer.evaluator.evaluate(trainer.test_data)
    trainer.evaluator.pipeline = BatchPipeline(trainer.test_data, trainer.backend, batch_size=9)
    with_padding = trainer.evaluator.evaluate(trainer.test_data)
    assert with_padding.loss == pytest.approx(without_padding.loss, abs=1e-6)
    assert (with_padding.auc, with_padding.accuracy) == (without_padding.auc, without_padding.accuracy)


def test_inference_prints_each_batch_and_the_scores_of_the_test_data(script):
    trained = script(SMALL.replace("nepochs=2", "nepochs=1") + "--learning-rate=0 --test-freq=6")[1]
    output = script(SMALL.replace("nepochs=2", "nepochs=1") + "--inference-only --test-mini-batch-size=4")[1]
    assert output.count("Finished inference it") == 6
    assert lines_of_tests(output) == lines_of_tests(trained)


def test_mlperf_logging_prints_all_metrics_and_names_a_missing_package(script, tmp_path):
    output = script(SMALL + f"--mlperf-logging --test-freq=6 --output-folder={tmp_path}")[1]
    share = r"\d\.\d{4}"
    assert re.fullmatch(
        rf"Testing at - 6/6 of epoch 0, loss \d\.\d{{6}}, recall {share}, precision {share}, f1 {share}, ap {share}, "
        rf"auc {share}, best auc {share}, accuracy \d+\.\d{{3}} %, best accuracy \d+\.\d{{3}} %",
        lines_of_tests(output)[0],
    )
    if "mlperf_logging" not in sys.modules:
        assert output.count("there is no package mlperf-logging; pip install") == 1


# Keys that occur exactly once by MLPerf's rules for DLRM: mlperf_logging/compliance_checker/training_2.1.0.
KEYS_LOGGED_ONCE = (
    "submission_org", "submission_platform", "submission_division", "submission_status", "submission_benchmark",
    "init_stop", "run_start", "run_stop", "train_samples", "eval_samples", "gradient_accumulation_steps",
    "global_batch_size", "opt_base_learning_rate", "opt_learning_rate_warmup_steps", "lr_decay_start_steps",
    "sgd_opt_base_learning_rate", "sgd_opt_learning_rate_decay_poly_power", "sgd_opt_learning_rate_decay_steps",
)  # fmt: skip


@pytest.fixture
def mlperf_events(monkeypatch, tmp_path):
    """The list of what a stand-in for the package mlperf-logging is told: first the log's file, then (key, value,
    metadata) per event. Runs write to the test's own folder."""
    events = []

    def log(key, value=None, metadata=None):
        events.append((key, value, metadata))

    logger = types.SimpleNamespace(event=log, start=log, end=log, logger=logging.Logger("mllog"))
    package = types.ModuleType("mlperf_logging")
    package.mllog = types.SimpleNamespace(config=lambda filename: log("file", filename), get_mllogger=lambda: logger)
    package.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "mlperf_logging", package)
    monkeypatch.chdir(tmp_path)
    return events


@pytest.mark.parametrize(("threshold", "epochs", "status"), [("1.5", 2, "aborted"), ("0.01", 1, "success")])
def test_mlperf_events_come_in_order(script, mlperf_events, tmp_path, threshold, epochs, status):
    flags = f"--mlperf-logging --test-freq=6 --mlperf-auc-threshold={threshold} --output-folder={tmp_path}"
    assert script(SMALL + flags)[0] == 0
    file, *events = mlperf_events
    assert file == ("file", str(tmp_path / "dlrm.log"), None)
    keys = [key for key, _, _ in events]
    assert [key for key in KEYS_LOGGED_ONCE if keys.count(key) != 1] == []
    epoch = ["block_start", "epoch_start", "eval_start", "eval_accuracy", "eval_stop", "epoch_stop", "block_stop"]
    assert keys[:2] == ["cache_clear", "init_start"]
    assert keys[keys.index("init_stop") :] == ["init_stop", "run_start", *epochs * epoch, "run_stop"]
    logged = {key: (value, metadata) for key, value, metadata in events}
    assert logged["train_samples"] == logged["eval_samples"] == (24, None)
    assert logged["block_start"] == (None, {"first_epoch_num": epochs, "epoch_count": 1})
    assert logged["eval_accuracy"][1] == logged["eval_stop"][1] == {"epoch_num": epochs}
    assert 0 <= logged["eval_accuracy"][0] <= 1
    assert logged["run_stop"] == (None, {"status": status})
    tensors = [metadata["tensor"] for key, _, metadata in events if key == "weights_initialization"]
    layers = ["bottom_mlp_dense1", "bottom_mlp_dense2", "top_mlp_dense1", "top_mlp_dense2", "top_mlp_dense3"]
    assert tensors == ["embeddings", *layers]


# Flags that set what the rules of MLPerf's dlrm_dcnv2 prescribe.
DCNV2 = "--arch-interaction-op=dcn --dcn-low-rank-dim=3 --optimizer=adagrad --learning-rate=0.005 --optimizer-eps=1e-8 "


@pytest.mark.skipif(not importlib.util.find_spec("mlperf_logging"), reason="needs mlperf-logging: pip install it")
def test_the_log_of_cross_layers_passes_the_checker_of_mlperf(launcher, tmp_path):
    flags = f"{SMALL} {DCNV2} --device=cpu --mlperf-logging --test-freq=3 --mlperf-auc-threshold=0.01 "
    done = launcher(f"{flags} --output-folder={tmp_path}")
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "dlrm.log").read_text()
    # No run but the one on all of Criteo's logs can have these two right.
    as_of_criteo = re.sub(r'("key": "eval_accuracy", "value": )[^,]*', r"\g<1>0.8028", log)
    as_of_criteo = re.sub(r'("key": "eval_samples", "value": )[^,]*', r"\g<1>89137319", as_of_criteo)
    for rules in ("3.1.0", "4.1.0", "5.1.0", "6.0.0"):
        failed = re.findall(r"(?:CHECK for '|Failed checks for )(\w+)", checked_by_mlperf(log, rules, tmp_path))
        assert sorted(set(failed)) == ["eval_accuracy", "eval_samples"]
        assert "SUCCESS" in checked_by_mlperf(as_of_criteo, rules, tmp_path)


def checked_by_mlperf(log: str, rules: str, folder: Path) -> str:
    """Returns what MLPerf's checker prints about a log."""
    path = folder / "checked.log"
    path.write_text(log)
    command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--ruleset", rules, str(path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


# Keys that occur exactly once by MLPerf's rules for DLRM-dcnv2: mlperf_logging/compliance_checker/training_6.0.0.
KEYS_OF_DCNV2_LOGGED_ONCE = (
    "submission_org", "submission_platform", "submission_division", "submission_status", "submission_benchmark",
    "init_stop", "run_start", "run_stop", "train_samples", "eval_samples", "gradient_accumulation_steps",
    "global_batch_size", "opt_name", "opt_base_learning_rate", "opt_adagrad_learning_rate_decay", "opt_weight_decay",
    "opt_adagrad_initial_accumulator_value", "opt_adagrad_epsilon", "opt_learning_rate_warmup_steps",
    "opt_learning_rate_decay_start_step", "opt_learning_rate_decay_steps",
)  # fmt: skip


def test_mlperf_events_of_cross_layers(script, mlperf_events):
    assert script(f"{SMALL} {DCNV2} --mlperf-logging --test-freq=6 --mlperf-auc-threshold=0.01")[0] == 0
    keys = [key for key, _, _ in mlperf_events]
    assert [key for key in KEYS_OF_DCNV2_LOGGED_ONCE if keys.count(key) != 1] == []
    assert not {"sgd_opt_base_learning_rate", "lr_decay_start_steps", "weights_initialization"} & set(keys)
    logged = {key: value for key, value, _ in mlperf_events}
    assert logged["submission_benchmark"] == "dlrm_dcnv2"
    assert (logged["opt_name"], logged["opt_adagrad_epsilon"]) == ("adagrad", 1e-8)
    assert mlperf_events[-1] == ("run_stop", None, {"status": "success"})


@pytest.mark.parametrize(("flag", "name"), [("acc", "accuracy"), ("auc", "auc")])
def test_a_threshold_ends_training(flag, name, script):
    flags = f"{SMALL} --test-freq=2 --mlperf-{flag}-threshold="
    output = script(flags + "0.01")[1]
    assert f"MLPerf testing {name} threshold 0.01 reached, stop training" in output
    assert len(lines_of_training(output)) == 2
    assert len(lines_of_training(script(flags + "1.5")[1])) == 12


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate
# ---------------------------------------------------------------------------------------------------------------------


def rates(steps: int = 12, **settings) -> list[float]:
    """Returns the learning rates of the first steps, with a base rate of 0.8."""
    schedule = LearningRateSchedule(Options(learning_rate=0.8, **settings))
    return [schedule.rate(step) for step in range(1, steps + 1)]


def test_the_learning_rate_rises_stays_and_falls():
    assert rates() == [0.8] * 12
    assert rates(6, lr_num_warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    warm_up_and_decay = rates(8, lr_num_warmup_steps=2, lr_decay_start_step=4, lr_num_decay_steps=4)
    assert warm_up_and_decay == pytest.approx([0.4, 0.8, 0.8, 0.8, 0.45, 0.2, 0.05, 0.05])
    assert rates(2, lr_num_decay_steps=2) == pytest.approx([0.2, 0.2])
    assert rates(200, lr_num_decay_steps=10**9, lr_decay_start_step=1)[-1] < 0.8


def test_a_decay_that_begins_in_the_warm_up_is_refused():
    with pytest.raises(UsageError, match="--lr-decay-start-step=3 lies in the warm-up of --lr-num-warmup-steps=10"):
        Options(lr_num_warmup_steps=10, lr_decay_start_step=3, lr_num_decay_steps=5)


def test_a_rate_of_zero_stays_zero():
    schedule = LearningRateSchedule(Options(learning_rate=0.0, lr_num_decay_steps=4))
    assert [schedule.rate(step) for step in (1, 2, 9)] == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation
# ---------------------------------------------------------------------------------------------------------------------


def trained_parameters(batches: list[Batch], **settings) -> list[torch.Tensor]:
    """Returns the parameters of a small model after training on these batches."""
    options = Options(mini_batch_size=4, num_batches=6, learning_rate=0.5, round_targets=True, **settings)
    trainer = Trainer(open_data_set(options), select_backend(options))
    for batch in trainer.prepared(joined(batches, options.mlperf_grad_accum_iter)):
        trainer.train_step(batch)
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_a_step_takes_the_mean_gradient_of_its_batches():
    batches = list(RandomData(Options(mini_batch_size=4, num_batches=6, round_targets=True)))[:3]
    together = trained_parameters(batches, mlperf_grad_accum_iter=3)
    alone = [trained_parameters([batch]) for batch in batches]
    for parameter, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(parameter, torch.stack(parts).mean(0))


def test_joined_and_padded_batches_hold_the_same_bags():
    batches = list(RandomData(Options(mini_batch_size=3, num_batches=4)))
    whole = list(joined(batches, 2))
    assert [len(batch) for batch in whole] == [6, 6]
    for number, pair in enumerate(whole):
        for table, (indices, offsets) in enumerate(zip(pair.indices, pair.offsets, strict=True)):
            bags = [indices[begin:end].tolist() for begin, end in itertools.pairwise(offsets)]
            bags_of_parts = [
                part.indices[table][begin:end].tolist()
                for part in batches[2 * number : 2 * number + 2]
                for begin, end in itertools.pairwise(part.offsets[table])
            ]
            assert bags == bags_of_parts
    larger = padded(batches[0], 5, 5)
    assert larger.offsets[:, :4].equal(batches[0].offsets)
    assert (larger.offsets[:, 4:] == larger.offsets[:, 3:4]).all()
    assert (larger.dense[3:] == 0).all()


def test_iterations_are_batches_and_batches_that_fill_no_step_are_left_out(script):
    status, output, _ = script(
        "--mini-batch-size=4 --num-batches=7 --mlperf-grad-accum-iter=3 --print-freq=2 --print-time"
    )
    assert status == 0
    assert re.findall(r"it (\d)/6", output) == ["3", "6"]
    assert "The last 4 of 28 samples are discarded" in output
    status, _, errors = script("--num-batches=2 --mlperf-grad-accum-iter=3")
    assert (status, "--num-batches=2 is less than --mlperf-grad-accum-iter=3" in errors) == (2, True)
    assert "does not fill --mlperf-grad-accum-iter=9 batches" in script("--mlperf-grad-accum-iter=9")[2]


def test_the_report_counts_the_samples_of_a_step(script, tmp_path):
    path = tmp_path / "report.json"
    script(f"--mini-batch-size=4 --num-batches=6 --mlperf-grad-accum-iter=3 --report={path}")
    report = json.loads(path.read_text())
    assert report["samples_per_second"] == pytest.approx(12000 / report["ms_per_iteration"]["median"])


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("dist", ["uniform", "gaussian"])
def test_random_data_can_start_at_any_batch(first, dist):
    data = RandomData(Options(num_batches=6, mini_batch_size=3, rand_data_dist=dist))
    for ours, theirs in zip(data.batches(first), list(data)[first:], strict=True):
        assert torch.equal(ours.dense, theirs.dense)
        assert all(map(torch.equal, ours.indices, theirs.indices))
