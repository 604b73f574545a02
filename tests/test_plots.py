"""TensorBoard logs and the plot: they hold what was printed, or say what is missing."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest

from dlrm.options import Options
from dlrm.output import plots
from dlrm.output.plots import Observer, Observers, Plot

FLAGS = "--mini-batch-size=4 --num-batches=6 --nepochs=2 --print-freq=4 "


def read_scalars(folder) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_what_was_printed(script, tmp_path):
    pytest.importorskip("tensorboard")
    status, output, _ = script(FLAGS + f"--print-time --tensor-board-filename={tmp_path}/logs")
    printed = np.array(re.findall(r"([\d.]+) ms/it, loss ([\d.]+), accuracy ([\d.]+) %", output), float)
    scalars = read_scalars(tmp_path / "logs")
    assert status == 0
    assert set(scalars) == {"Train/Loss", "Train/Accuracy", "Train/ms_per_it"}
    for column, (tag, digits) in enumerate([("Train/ms_per_it", 2), ("Train/Loss", 6), ("Train/Accuracy", 3)]):
        steps, values = zip(*scalars[tag], strict=True)
        assert steps == (4, 6, 10, 12)
        np.testing.assert_allclose(values, printed[:, column], atol=0.6 * 10**-digits, rtol=1e-6)


def test_inference_is_told_from_training(script, tmp_path):
    pytest.importorskip("tensorboard")
    script(FLAGS + f"--inference-only --tensor-board-filename={tmp_path}")
    assert [step for step, _ in read_scalars(tmp_path)["Test/Accuracy"]] == [4, 6, 10, 12]


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_a_plot_is_written_whole(suffix, begin, script, tmp_path):
    pytest.importorskip("matplotlib")
    status, *_ = script(FLAGS + f"--plot={tmp_path}/run.{suffix}")
    assert status == 0
    assert [file.name for file in tmp_path.iterdir()] == [f"run.{suffix}"]
    assert (tmp_path / f"run.{suffix}").read_bytes().startswith(begin)


def test_a_panel_holds_a_quantity_of_training_and_test(tmp_path):
    pytest.importorskip("matplotlib")
    plot = Plot(str(tmp_path / "run.svg"))
    for step in (1, 2):
        plot.observe(step, {"Train/Loss": 0.7, "Train/Accuracy": 50.0, "Test/Acc": 60.0, "Test/Loss": float("nan")})
    plot.close()
    assert {label: set(curves) for label, curves in plot._panels.items()} == {
        "loss": {"Train/Loss", "Test/Loss"},
        "accuracy, %": {"Train/Accuracy", "Test/Acc"},
    }
    assert (tmp_path / "run.svg").exists()


def test_a_run_that_fails_leaves_the_plot_of_what_it_did(script, tmp_path):
    pytest.importorskip("matplotlib")
    status, output, _ = script(
        "--mini-batch-size=4 --num-batches=9 --loss-function=mse --learning-rate=1e30 " + f"--plot={tmp_path}/run.png"
    )
    assert status == 1
    assert "Finished" in output
    assert (tmp_path / "run.png").exists()


@pytest.mark.parametrize(
    ("flag", "package"), [("--tensor-board-filename=logs", "tensorboard"), ("--plot=run.png", "matplotlib")]
)
def test_a_missing_package_is_named(flag, package, script, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    status, output, errors = script(FLAGS + flag)
    assert status == 2
    assert f"{flag.split('=')[0]} needs {package}: pip install {package}\n" in errors
    assert "Finished" not in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--plot=run.bmp", "--plot: expected a name that ends in .png, .svg, .pdf, got 'run.bmp'"),
        ("--plot=/nowhere/run.png", "--plot: cannot write '/nowhere/run.png': No such file or directory"),
        ("--tensor-board-filename=/dev/null/logs", "--tensor-board-filename: cannot write to '/dev/null/logs': Not a"),
    ],
)
def test_what_can_not_be_written_is_refused_before_training(flags, message, script):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    status, output, errors = script(FLAGS + flags)
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert "Finished" not in output


def test_all_observers_are_closed_whatever_one_of_them_does():
    class Fails(Observer):
        def close(self):
            raise OSError

    class Counts(Observer):
        closed = 0

        def close(self):
            self.closed += 1

    counting = [Counts(), Counts()]
    with pytest.raises(OSError):  # noqa: PT011 - the one above
        Observers(counting[0], Fails(), counting[1]).close()
    assert [observer.closed for observer in counting] == [1, 1]


def test_no_flag_no_observer():
    with plots.observers(Options()) as observer:
        observer.observe(1, {"Train/Loss": 0.5})
