"""Curves of a run: TensorBoard logs and a plot.

TensorBoard and matplotlib are imported only if a flag asks for them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm.errors import UsageError
from dlrm.options import Options
from dlrm.output.observer import Observer, Observers
from dlrm.system.files import check_writable, written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FORMATS = (".png", ".svg", ".pdf")
PANEL_TITLES = {"Loss": "loss", "Accuracy": "accuracy, %", "Acc": "accuracy, %", "ms_per_it": "ms/it"}
TRAINING, TEST, INFERENCE = "training", "test set", "inference, a part of the test set"
COLORS = {TRAINING: "#1f77b4", TEST: "#d95f02", INFERENCE: "#7a68a6"}
TICK_STEPS = (1, 2, 2.5, 5, 10)
MOST_MARKED_POINTS = 50  # a longer curve is a line without markers
LEAST_RATIO_ON_LOG_AXIS = 30  # of the largest to the smallest value


class TensorBoard(Observer):
    """Writes event files to a folder, for `tensorboard --logdir FOLDER`.

    Raises UsageError if the package is missing or the folder is not writable.
    """

    flag = "--tensor-board-filename"

    def __init__(self, folder: str):
        require(self.flag, "tensorboard")
        from tensorboard.summary.writer.record_writer import RecordWriter

        # torch's SummaryWriter has a thread, which prints a traceback of its own if the disk is full.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        try:
            os.makedirs(folder, exist_ok=True)
            self._records = RecordWriter(open(Path(folder, name), "wb"))  # noqa: SIM115 - closed by `close`
            self._write(file_version="brain.Event:2")
        except OSError as error:
            raise UsageError(f"{self.flag}: cannot write to {folder!r}: {error.strerror}") from None

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step=step, summary={"value": [{"tag": tag, "simple_value": values[tag]} for tag in values]})

    def close(self) -> None:
        self._records.close()

    def _write(self, **event: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **event).SerializeToString())
        self._records.flush()


class Plot(Observer):
    """Draws a file with one panel per quantity and, in each panel, one curve per phase of the run.

    Raises the errors of `check_plot_file`.
    """

    flag = "--plot"

    def __init__(self, path: str):
        check_plot_file("--plot", path)
        self._path = path
        self._panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        # An inference run passes "Test/Loss" for the batches of each line and, at its end, for the whole test set.
        test_curve = INFERENCE if "Test/Accuracy" in values else TEST
        for tag, value in values.items():
            phase, quantity = tag.split("/")
            curve = TRAINING if phase == "Train" else test_curve
            self._panels[PANEL_TITLES.get(quantity, quantity)][curve].append((step, value))

    def close(self) -> None:
        if self._panels:
            save_figure("--plot", self._path, self.draw())

    def draw(self) -> Figure:
        """Returns the figure of all numbers received so far."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(8, 0.9 + 1.75 * len(self._panels)), layout="constrained")
        all_axes = figure.subplots(len(self._panels), sharex=True, squeeze=False)[:, 0]
        for axes, (title, curves) in zip(all_axes, self._panels.items(), strict=True):
            draw_panel(axes, title, curves)
        all_axes[-1].set_xlabel("iteration")
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, steps=TICK_STEPS, integer=True, min_n_ticks=1))
        all_axes[-1].xaxis.set_major_formatter("{x:,.0f}")
        handles = {curve.get_label(): curve for axes in all_axes for curve in axes.get_lines()}
        figure.legend(handles=[handles[name] for name in COLORS if name in handles], ncols=3, frameon=False,
                      loc="outside upper left")  # fmt: skip
        return figure


def draw_panel(axes: Axes, title: str, curves: Mapping[str, list[tuple[int, float]]]) -> None:
    """Draws the curves of one quantity, each a list of (iteration, value). Leaves out values that are not finite."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    finite = [value for points in curves.values() for _, value in points if math.isfinite(value)]
    for name, points in curves.items():
        iterations, values = zip(*points, strict=True)
        # A line alone would not show a single point.
        style = "o-" if sum(map(math.isfinite, values)) <= MOST_MARKED_POINTS else "-"
        axes.plot(iterations, values, style, color=COLORS[name], label=name, markersize=4, linewidth=1.2)
    if title in ("loss", "ms/it") and finite and 0 < min(finite) * LEAST_RATIO_ON_LOG_AXIS <= max(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=TICK_STEPS))
    axes.set_title(title, loc="left", fontsize="medium")
    axes.margins(x=0.02)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not finite:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center")


def check_plot_file(flag: str, path: str) -> None:
    """Raises UsageError if matplotlib is missing, the ending of `path` is no known format, or it cannot be written."""
    require(flag, "matplotlib")
    if Path(path).suffix.lower() not in PLOT_FORMATS:
        raise UsageError(f"{flag}: expected a name that ends in {', '.join(PLOT_FORMATS)}, got {path!r}")
    check_writable(flag, path)


def save_figure(flag: str, path: str, figure: Figure) -> None:
    """Writes the figure in the format that `path` ends in. Raises RunError if `path` cannot be written."""
    with written_whole(flag, path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower())


def require(flag: str, *packages: str) -> None:
    """Raises UsageError that names the packages to install, unless all of them are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"{flag} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


@contextlib.contextmanager
def observers(options: Options) -> Iterator[Observer]:
    """Returns a context of one observer that passes the numbers on to those that the flags ask for."""
    all_of_them = Observers()
    try:
        if options.tensor_board_filename:
            all_of_them.add(TensorBoard(options.tensor_board_filename))
        if options.plot:
            all_of_them.add(Plot(options.plot))
        yield all_of_them
    finally:
        all_of_them.close()
