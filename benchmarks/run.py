"""Benchmarks, each of us and a peer side by side in one run.

python -m benchmarks.run --list
python -m benchmarks.run datagen
python -m benchmarks.run --json results.json            all of them
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from benchmarks.measure import Result

BENCHMARKS = ("datagen", "preprocess", "embedding", "criteo")  # modules with a function measure(rounds) -> list[Result]


def table(results: Sequence[Result]) -> str:
    rows = [("job", "ours, ms", "peer", "peer, ms", "ratio")]
    rows += [(r.job, f"{r.ours_ms:.2f}", r.peer, f"{r.peer_ms:.2f}", f"{r.ratio:.2f}") for r in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all of them if none is named")
    parser.add_argument("--list", action="store_true", help="print names and descriptions")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate [5]")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file as well")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if arguments.rounds < 1:
        parser.error("--rounds: expected at least 1")
    modules = {name: import_module(f"benchmarks.{name}") for name in arguments.names or BENCHMARKS}
    if arguments.list:
        print("\n".join(f"{name:12} {module.__doc__.splitlines()[0]}" for name, module in modules.items()))
        return 0
    results = []
    for name, module in modules.items():
        print(f"{name} ...", file=sys.stderr)
        results += module.measure(arguments.rounds)
    print(table(results))
    if arguments.json:
        rows = [asdict(result) | {"ratio": result.ratio} for result in results]
        Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
