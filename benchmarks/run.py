"""Benchmarks that run us and a peer side by side in one run.

python -m benchmarks.run --list
python -m benchmarks.run step --rounds 7
python -m benchmarks.run --json results.json --plot ratios.png       all but dcnv2 and reference
python -m benchmarks.run --from-json results.json --plot ratios.png  the same table and plot, without measuring again
python -m benchmarks.run reference --path FOLDER                     beside the reference script in that folder
python -m benchmarks.run embedding --ipex-python PYTHON              also beside the IPEX that this Python has
python -m benchmarks.run dcnv2 --torchrec-python PYTHON              also beside the torchrec that this Python has
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from benchmarks import ipex
from benchmarks.measure import Result
from benchmarks.peer_process import check_python
from benchmarks.torchrec_losses import check_torchrec
from dlrm.errors import RunError, UsageError
from dlrm.options import Options
from dlrm.output.plots import check_plot_file, save_figure
from dlrm.system.files import check_writable
from dlrm_s_pytorch import select_backend

# Modules of this folder that have a function measure(rounds, ...) -> list[Result], and their headings in the plot.
BENCHMARKS = {
    "datagen": "Random data",
    "preprocess": "Host preprocessing",
    "embedding": "Embedding bags",
    "gemm": "fp32 matrix products",
    "optimizer": "Dense optimizers",
    "step": "Training step",
    "memory": "Peak memory",
    "scaling": "Scaling of embedding bags",
    "criteo": "Criteo data",
    "distributed": "Several ranks",
}
# They run only if they are named: one needs `--path`, the other 20 GB of memory.
ONLY_IF_NAMED = {"dcnv2": "DLRM-dcnv2", "reference": "Reference script"}
# The flag that is another argument of the module's `measure`.
FLAGS = {"reference": "path", "embedding": "ipex_python", "dcnv2": "torchrec_python"}


def table(results: Sequence[Result]) -> str:
    """Returns the results as a table in Markdown."""
    rows = [("job", "ours", "peer", "peer's value", "unit", "ratio")]
    rows += [(r.job, f"{r.ours:.2f}", r.peer, f"{r.theirs:.2f}", r.unit, f"{r.ratio:.2f}") for r in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the benchmarks to run [all but dcnv2 and reference]")
    parser.add_argument("--list", action="store_true", help="print the names and descriptions of the benchmarks")
    parser.add_argument("--rounds", type=int, default=5, help="the number of turns that each candidate takes [5]")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file as well")
    parser.add_argument("--from-json", metavar="FILE", help="show the results that --json wrote; measure nothing")
    parser.add_argument("--plot", metavar="FILE", help="draw the results to this .png, .svg or .pdf; needs matplotlib")
    parser.add_argument("--path", metavar="FOLDER", help="reference: the folder of the reference dlrm_s_pytorch.py")
    parser.add_argument(
        "--ipex-python", metavar="PYTHON", help="embedding: a Python that has torch and intel-extension-for-pytorch"
    )
    parser.add_argument(
        "--torchrec-python", metavar="PYTHON", help="dcnv2: a Python that has torch, torchrec and fbgemm-gpu-cpu"
    )
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for wrong arguments, before anything is measured."""
    known = (*BENCHMARKS, *ONLY_IF_NAMED)
    for name in arguments.names:
        if name not in known:
            raise UsageError(f"there is no benchmark {name!r}; there are {', '.join(known)}")
    if arguments.rounds < 1:
        raise UsageError("--rounds: expected at least 1")
    if "reference" in arguments.names and not (arguments.path and Path(arguments.path, "dlrm_s_pytorch.py").is_file()):
        raise UsageError("reference: --path must name the folder of the reference dlrm_s_pytorch.py")
    if arguments.ipex_python:
        check_python(ipex.FLAG, arguments.ipex_python, "intel_extension_for_pytorch", "intel-extension-for-pytorch")
    if arguments.torchrec_python:
        check_torchrec(arguments.torchrec_python)
    if arguments.from_json and (arguments.names or arguments.json):
        raise UsageError("--from-json measures nothing: leave out --json and the names of benchmarks")
    if arguments.json:
        check_writable("--json", arguments.json)
    if arguments.plot:
        check_plot_file("--plot", arguments.plot)


def measure(arguments: argparse.Namespace) -> list[Result]:
    """Runs the named benchmarks."""
    results = []
    for name in arguments.names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr)
        settings = {FLAGS[name]: getattr(arguments, FLAGS[name])} if name in FLAGS else {}
        measured = import_module(f"benchmarks.{name}").measure(arguments.rounds, **settings)
        results += [replace(result, benchmark=name) for result in measured]
    return results


def machine() -> str:
    """Returns the processor and the version of torch, in words."""
    return f"{select_backend(Options(device='cpu')).name}, torch {version('torch')}"


def write_json(path: str, machine_name: str, results: Sequence[Result]) -> None:
    rows = [asdict(result) | {"ratio": result.ratio} for result in results]
    Path(path).write_text(json.dumps({"machine": machine_name, "results": rows}, indent=2) + "\n")


def read_json(path: str) -> tuple[str, list[Result]]:
    """Returns the machine and the results that `write_json` wrote. Raises UsageError if `path` does not hold them."""
    try:
        stored = json.loads(Path(path).read_text())
        results = [
            Result(
                row["job"], float(row["ours"]), row["peer"], float(row["theirs"]), row["unit"], row.get("benchmark", "")
            )
            for row in stored["results"]
        ]
        return stored["machine"], results
    except OSError as error:
        raise UsageError(f"--from-json: cannot read {path!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--from-json: {path!r} is not a file that --json wrote") from None


def run(arguments: argparse.Namespace) -> None:
    """Does what the arguments ask for. Raises UsageError or RunError if that cannot be done."""
    check(arguments)
    if arguments.list:
        for name in (*BENCHMARKS, *ONLY_IF_NAMED):
            print(f"{name:12} {import_module(f'benchmarks.{name}').__doc__.splitlines()[0]}")
        return
    if arguments.from_json:
        machine_name, results = read_json(arguments.from_json)
    else:
        results = measure(arguments)
        machine_name = machine()
    print(f"{machine_name}\n\n{table(results)}")
    if arguments.json:
        write_json(arguments.json, machine_name, results)
    if arguments.plot and results:
        from benchmarks import plot  # needs matplotlib

        save_figure("--plot", arguments.plot, plot.draw(results, BENCHMARKS | ONLY_IF_NAMED))


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    try:
        run(parser.parse_args(argv))
    except UsageError as error:
        parser.error(str(error))
    except RunError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
