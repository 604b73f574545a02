"""What a run measures, for the eyes: TensorBoard and a plot.

The trainer tells an `Observer` what it prints, when it prints it, so that watching costs no wait for the device.
TensorBoard and matplotlib are imported when they are asked for; nothing else needs them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from dlrm.errors import UsageError
from dlrm.options import Options
from dlrm.system.files import check_writable, written_whole

PLOT_FORMATS = (".png", ".svg", ".pdf")
LABELS = {"Acc": "accuracy, %", "Accuracy": "accuracy, %", "Loss": "loss", "ms_per_it": "ms/it"}  # of quantities


class Observer:
    """Is told numbers by tag, such as `{"Train/Loss": 0.69}`, after so many iterations of the run."""

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        """What is after the last slash of a tag names the quantity."""

    def close(self) -> None:
        """No more is to come. Also called when a run fails: what was seen is kept."""


class Observers(Observer):
    """Tells each of several."""

    def __init__(self, *observers: Observer):
        self._observers = observers

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        for observer in self._observers:
            observer.observe(step, values)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for observer in self._observers:
                stack.callback(observer.close)


class TensorBoard(Observer):
    """Event files in a folder, for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: str):
        require("--tensor-board-filename", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(folder)
        except OSError as error:
            raise UsageError(f"--tensor-board-filename: cannot write to {folder!r}: {error.strerror}") from None

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class Plot(Observer):
    """A file with a panel for each quantity, and in it a curve for each tag."""

    def __init__(self, path: str):
        require("--plot", "matplotlib")
        if Path(path).suffix.lower() not in PLOT_FORMATS:
            raise UsageError(f"--plot: expected a name that ends in {', '.join(PLOT_FORMATS)}, got {path!r}")
        check_writable("--plot", path)
        self._path = path
        self._panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            quantity = tag.split("/")[-1]
            self._panels[LABELS.get(quantity, quantity)][tag].append((step, value))

    def close(self) -> None:
        if not self._panels:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1 + 2 * len(self._panels)), layout="constrained")
        all_axes = figure.subplots(len(self._panels), sharex=True, squeeze=False)[:, 0]
        for axes, (label, curves) in zip(all_axes, self._panels.items(), strict=True):
            for tag, points in curves.items():
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=tag)
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            axes.legend()
        all_axes[-1].set_xlabel("iteration")
        with written_whole("--plot", self._path) as temporary:
            figure.savefig(temporary, format=Path(self._path).suffix[1:].lower())


def require(flag: str, *packages: str) -> None:
    """UsageError, saying what to install, unless all the packages are there."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"{flag} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


@contextlib.contextmanager
def observers(options: Options) -> Iterator[Observer]:
    """Whoever the flags ask for."""
    wanted = [TensorBoard(options.tensor_board_filename)] if options.tensor_board_filename else []
    try:
        wanted += [Plot(options.plot)] if options.plot else []
        yield Observers(*wanted)
    finally:
        Observers(*wanted).close()
