"""TensorBoard logs and plots hold the printed numbers. What cannot be written is refused before the run."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import run
from benchmarks.measure import Result
from dlrm.options import Options
from dlrm.output import plots
from dlrm.output.plots import COLORS, INFERENCE, TEST, TRAINING, Observer, Observers, Plot

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


def test_inference_is_logged_as_a_test(script, tmp_path):
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


def curves_by_panel(figure) -> dict[str, dict[str, list[tuple[int, float]]]]:
    return {
        axes.get_title("left"): {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for axes in figure.axes
    }


def test_a_panel_holds_a_quantity_of_training_and_test(tmp_path):
    pytest.importorskip("matplotlib")
    plot = Plot(str(tmp_path / "run.svg"))
    for step in (1, 2):
        plot.observe(step, {"Train/Loss": 0.7, "Train/Accuracy": 50.0, "Test/Acc": 60.0, "Test/Loss": float("inf")})
    figure = plot.draw()
    assert curves_by_panel(figure) == {
        "loss": {TRAINING: [(1, 0.7), (2, 0.7)], TEST: [(1, float("inf")), (2, float("inf"))]},
        "accuracy, %": {TRAINING: [(1, 50), (2, 50)], TEST: [(1, 60), (2, 60)]},
    }
    assert all(line.get_color() == COLORS[line.get_label()] for axes in figure.axes for line in axes.lines)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [TRAINING, TEST]
    plot.close()
    assert (tmp_path / "run.svg").exists()


def test_inference_has_a_curve_of_parts_and_a_point_for_the_whole_test_set(tmp_path):
    pytest.importorskip("matplotlib")
    plot = Plot(str(tmp_path / "run.svg"))
    for step in (4, 6):
        plot.observe(step, {"Test/Loss": 0.1 * step, "Test/Accuracy": 50.0})
    plot.observe(6, {"Test/Acc": 60.0, "Test/AUC": 0.5, "Test/Loss": 0.5})
    assert curves_by_panel(plot.draw()) == {
        "loss": {INFERENCE: [(4, 0.4), (6, pytest.approx(0.6))], TEST: [(6, 0.5)]},
        "accuracy, %": {INFERENCE: [(4, 50), (6, 50)], TEST: [(6, 60)]},
        "AUC": {TEST: [(6, 0.5)]},
    }


def test_a_full_disk_ends_observers_and_not_the_run(small_disk, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    folder = small_disk("64k")
    (folder / "filler").write_bytes(bytes(44 * 1024))
    watched = f"--tensor-board-filename={folder}/logs --plot={folder}/run.png --enable-profiling"
    flags = f"--mini-batch-size=4 --num-batches=400 {watched} --output-folder={folder} --save-model={tmp_path / 'm.pt'}"
    command = [sys.executable, str(ROOT / "dlrm_s_pytorch.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert (tmp_path / "m.pt").is_file()
    of_profiler = re.compile("USDT|ERROR:.* gpuGetDeviceCount failed")  # torch with CUDA, on a machine without a GPU
    lines = [line for line in done.stderr.splitlines() if not of_profiler.match(line)]
    assert sorted(line.split(": ")[0] for line in lines) == ["--enable-profiling", "--plot", "--tensor-board-filename"]
    assert all(line.endswith("No space left on device; the run goes on without it") for line in lines)


@pytest.mark.parametrize(("points", "marker"), [(1, "o"), (50, "o"), (51, "None")])
def test_points_have_markers_unless_they_are_many(points, marker, tmp_path):
    pytest.importorskip("matplotlib")
    plot = Plot(str(tmp_path / "run.svg"))
    for step in range(points):
        plot.observe(step, {"Train/Loss": 0.5})
    assert plot.draw().axes[0].lines[0].get_marker() == marker


@pytest.mark.parametrize(
    ("tag", "values", "scale"),
    [
        ("Train/ms_per_it", (1.0, 30.0), "log"),
        ("Train/ms_per_it", (1.0, 29.0), "linear"),
        ("Train/ms_per_it", (0.0, 29.0), "linear"),
        ("Train/Loss", (0.5, 1e30, float("inf"), float("nan")), "log"),
        ("Train/Accuracy", (1.0, 99.0), "linear"),
    ],
)
def test_the_axis_is_logarithmic_where_a_linear_one_would_hide_most_values(tag, values, scale, tmp_path):
    pytest.importorskip("matplotlib")
    plot = Plot(str(tmp_path / "run.svg"))
    for step, value in enumerate(values):
        plot.observe(step, {tag: value})
    assert plot.draw().axes[0].get_yscale() == scale
    plot.close()


def test_a_panel_without_a_finite_value_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    plot = Plot(str(tmp_path / "run.svg"))
    plot.observe(1, {"Test/AUC": float("nan")})
    assert [text.get_text() for text in plot.draw().axes[0].texts] == ["no finite value"]


def test_a_run_that_fails_leaves_a_plot_of_its_iterations(script, tmp_path):
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
def test_a_path_that_cannot_be_written_is_refused_before_training(flags, message, script):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    status, output, errors = script(FLAGS + flags)
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert "Finished" not in output


def test_all_observers_are_closed_even_if_one_raises(capsys):
    class Fails(Observer):
        flag = "--fails"

        def close(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Counts(Observer):
        closed = 0

        def close(self):
            self.closed += 1

    counting = [Counts(), Counts()]
    Observers(counting[0], Fails(), counting[1]).close()
    assert [observer.closed for observer in counting] == [1, 1]
    assert capsys.readouterr().err == "--fails: No space left on device; the run goes on without it\n"


def test_without_a_flag_the_observer_ignores_its_numbers():
    with plots.observers(Options()) as observer:
        observer.observe(1, {"Train/Loss": 0.5})


# ---------------------------------------------------------------------------------------------------------------------
# The plot of benchmarks
# ---------------------------------------------------------------------------------------------------------------------

RESULTS = [
    *(Result(f"step {n}", 2.0, peer, 5.0, benchmark="step") for n in range(4) for peer in ("plain", "bound: products")),
    Result("step alone", 2.0, "plain", 500.0, benchmark="step"),
    Result("most memory", 3.0, "ours, in bf16", 1.5, "GiB", benchmark="memory"),
]


def test_stored_results_are_shown_without_measuring(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run.write_json(str(tmp_path / "results.json"), "a machine", RESULTS)
    assert run.read_json(str(tmp_path / "results.json")) == ("a machine", RESULTS)
    assert run.main([f"--from-json={tmp_path}/results.json", f"--plot={tmp_path}/ratios.png"]) == 0
    assert capsys.readouterr().out == f"a machine\n\n{run.table(RESULTS)}\n"
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_of_panels_holds_jobs_with_the_same_peers():
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    rows = list(plot.rows_of_panels(RESULTS, run.BENCHMARKS))
    assert [(row.heading, [panel.job for panel in row.panels]) for row in rows] == [
        ("Training step", ["step 0", "step 1"]),
        ("", ["step 2", "step 3"]),
        ("", ["step alone"]),
        ("Peak memory", ["most memory"]),
    ]
    assert [row.names for row in rows[-2:]] == [["ours", "plain"], ["ours", "ours, in bf16"]]


def test_texts_of_the_benchmark_plot_do_not_overlap():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from benchmarks import plot

    figure = plot.draw(RESULTS, run.BENCHMARKS)
    FigureCanvasAgg(figure).draw()
    texts = [*figure.texts, *figure.legends[0].get_texts()]
    texts += [text for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels())]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) == 39
    for position, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:position])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("speed", "there is no benchmark 'speed'; there are datagen, preprocess, "),
        ("--rounds=0", "--rounds: expected at least 1"),
        ("reference", "reference: --path must name the folder of the reference dlrm_s_pytorch.py"),
        ("--ipex-python=/nowhere", "--ipex-python: cannot run '/nowhere': No such file or directory"),
        (f"--ipex-python={sys.executable}", "has no intel-extension-for-pytorch: ModuleNotFoundError: "),
        ("--torchrec-python=/nowhere", "--torchrec-python: cannot run '/nowhere': No such file or directory"),
        (f"--torchrec-python={sys.executable}", "has no torchrec and fbgemm-gpu-cpu: ModuleNotFoundError: "),
        ("--from-json=/nowhere.json", "--from-json: cannot read '/nowhere.json': No such file or directory"),
        (f"--from-json={__file__}", f"--from-json: {__file__!r} is not a file that --json wrote"),
        ("--from-json=results.json step", "--from-json measures nothing: leave out --json and the names"),
        ("--json=/nowhere/results.json", "--json: cannot write '/nowhere/results.json': No such file or directory"),
        ("--plot=ratios.bmp", "--plot: expected a name that ends in .png, .svg, .pdf, got 'ratios.bmp'"),
    ],
)
def test_wrong_arguments_of_the_benchmarks_are_refused_before_measuring(flags, message, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("it measures"))
    with pytest.raises(SystemExit) as exit_info:
        run.main(flags.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
