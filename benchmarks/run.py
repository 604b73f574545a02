"""Benchmarks, each of us and a peer side by side in one run.

python -m benchmarks.run --list
python -m benchmarks.run step --rounds 7
python -m benchmarks.run --json results.json --plot ratios.png         all of them
python -m benchmarks.run reference --path FOLDER     the public dlrm_s_pytorch.py in that folder, in turn with ours
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import Result
from dlrm.options import Options
from dlrm_s_pytorch import select_backend

# Modules with a function measure(rounds) -> list[Result].
BENCHMARKS = (
    "datagen", "preprocess", "embedding", "gemm", "optimizer", "step", "memory", "scaling", "criteo", "distributed",
)  # fmt: skip


def table(results: Sequence[Result]) -> str:
    rows = [("job", "ours", "peer", "peer's", "unit", "ratio")]
    rows += [(r.job, f"{r.ours:.2f}", r.peer, f"{r.theirs:.2f}", r.unit, f"{r.ratio:.2f}") for r in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def plot(results: Sequence[Result], path: str) -> None:
    """A bar for each ratio, on a logarithmic axis."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1 + 0.3 * len(results)), layout="constrained")
    bars = axes.barh([f"{r.job}  |  {r.peer}" for r in results], [r.ratio for r in results])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="peer's time / ours")
    axes.invert_yaxis()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all but reference if none is named")
    parser.add_argument("--list", action="store_true", help="print names and descriptions")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate [5]")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file as well")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios to this PNG (needs matplotlib)")
    parser.add_argument("--path", metavar="FOLDER", help="reference: where the public dlrm_s_pytorch.py is")
    arguments = parser.parse_args(argv)
    known = (*BENCHMARKS, "reference")
    for name in arguments.names:
        if name not in known:
            parser.error(f"there is no benchmark {name!r}; there are {', '.join(known)}")
    if arguments.rounds < 1:
        parser.error("--rounds: expected at least 1")
    if "reference" in arguments.names and not Path(arguments.path or "", "dlrm_s_pytorch.py").is_file():
        parser.error("reference: --path must name the folder of the public dlrm_s_pytorch.py")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if arguments.list:
        for name in known:
            print(f"{name:12} {import_module(f'benchmarks.{name}').__doc__.splitlines()[0]}")
        return 0
    results = []
    for name in arguments.names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr)
        settings = {"path": arguments.path} if name == "reference" else {}
        results += import_module(f"benchmarks.{name}").measure(arguments.rounds, **settings)
    print(f"{machine()}\n\n{table(results)}")
    if arguments.json:
        rows = [asdict(result) | {"ratio": result.ratio} for result in results]
        Path(arguments.json).write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)
    return 0


def machine() -> str:
    return f"{select_backend(Options(device='cpu')).name}, torch {version('torch')}"


if __name__ == "__main__":
    sys.exit(main())
