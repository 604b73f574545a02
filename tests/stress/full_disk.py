"""Fills the disk while each kind of file is written.

    python -m tests.stress.full_disk

No file can grow beyond a limit, which is a share of the size that it should have. Nothing that was there before and
nothing that was reported as saved may be lost, and the run must end in one line, or go on without what watches it.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import dlrm_s_pytorch
from dlrm.data import criteo_generator, criteo_preprocess, trace
from tests.stress.forked import Ended, Tally, run, stress
from tests.stress.kills import MODEL, contents, remove_all
from tests.stress.mutations import SHAPE

SHARES = (0.001, 0.25, 0.5, 0.75, 0.99)  # of the size of the largest file


@dataclass
class Writer:
    """A run that writes files to a folder."""

    name: str
    main: Callable[[Sequence[str]], int]
    argv: Callable[[Path], list[str]]
    only_watches: bool = False  # so that its failure does not end the run
    package: str = "torch"  # without which it writes nothing

    def attack(self, folder: Path, prepare: Callable[[Path], None], share: float) -> str:
        prepare(folder)
        before = contents(folder)
        whole = run(self.main, self.argv(folder))
        if whole.status:
            return f"it fails on an empty disk: {whole.err}"
        written = {name: content for name, content in contents(folder).items() if content != before.get(name)}
        prepare(folder)
        limit = max(1, int(share * max(map(len, written.values()))))
        ended = run(self.main, self.argv(folder), largest_file=limit)
        return self.fault_of(ended, folder, before, prepare)

    def fault_of(self, ended: Ended, folder: Path, before: dict[str, bytes], prepare: Callable) -> str:
        if ended.fault:
            return ended.fault
        if self.only_watches and ended.status == 1:  # with 2, it was refused before it began
            return f"it ended the run: {ended.err}"
        after = contents(folder)
        lost = [name for name, content in before.items() if not any(content == other for other in after.values())]
        if lost:
            return f"{lost} was lost"
        again = run(self.main, self.argv(folder))
        return "" if not again.status else f"the next run fails: {again.err}"


def writers() -> list[Writer]:
    """Returns a run for each kind of file that can be written here."""
    train = dlrm_s_pytorch.main

    def training(flags: str) -> Callable[[Path], list[str]]:
        model = MODEL.replace("--save-every=5", "").replace("--resume", "")
        return lambda folder: [*model.split(), *flags.format(folder=folder).split()]

    def data(flags: str) -> Callable[[Path], list[str]]:
        text = "--data-generation=dataset --raw-data-file={folder}/train.txt "
        return lambda folder: [*SHAPE.split(), *(text + flags).format(folder=folder).split()]

    watching = "--output-folder={folder} "
    found = [
        Writer("checkpoint", train, training("--save-model={folder}/m.pt --save-every=5")),
        Writer("report", train, training("--print-time --report={folder}/report.json")),
        Writer("plot", train, training("--plot={folder}/run.png"), only_watches=True),
        Writer("tensorboard", train, training("--tensor-board-filename={folder}/logs"), only_watches=True),
        Writer("profile", train, training(watching + "--enable-profiling"), only_watches=True),
        Writer("MLPerf's log", train, training(watching + "--mlperf-logging"), True, "mlperf_logging"),
        Writer("compute graph", train, training(watching + "--plot-compute-graph")),
        Writer("ONNX model", train, training(watching + "--save-onnx")),
        Writer("preprocessed data", train, data("")),
        Writer("binary files", train, data("--mlperf-bin-loader")),
        Writer("preprocessing", criteo_preprocess.main, lambda folder: [f"--raw-data-file={folder / 'train.txt'}"]),
        Writer("click logs", criteo_generator.main, lambda folder: [str(folder / "new.txt"), "--samples=300"]),
        Writer("trace", trace.main, lambda folder: [
            f"--trace-file={folder / 'trace.log'}", f"--dist-file={folder / 'dist.log'}",
            f"--synthetic-file={folder / 'drawn.log'}",
        ]),
    ]  # fmt: skip
    return [writer for writer in found if importlib.util.find_spec(writer.package)]


def attack(count: int, generator: random.Random, tally: Tally) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder, text = Path(scratch, "disk"), Path(scratch, "train.txt")
        criteo_generator.generate(str(text), 300)
        saved = run(dlrm_s_pytorch.main, [*MODEL.split(), f"--save-model={scratch}/saved.pt", "--num-batches=10"])
        assert not saved.status, saved.err

        def prepare(folder: Path) -> None:
            remove_all(folder)
            folder.mkdir()
            (folder / "train.txt").write_bytes(text.read_bytes())
            (folder / "trace.log").write_text("3, 1, 3, 2, 1, 1")
            (folder / "m.pt").write_bytes(Path(scratch, "saved.pt").read_bytes())

        cases = [(writer, share) for share in SHARES for writer in writers()]
        for writer, share in cases[:count]:
            tally.note(f"{writer.name}, {share}", writer.attack(folder, prepare, share))


if __name__ == "__main__":
    sys.exit(stress(__doc__.splitlines()[0], len(SHARES) * len(writers()), attack))
