"""Makes click logs in Criteo's format with a signal to learn, for tests and first steps; nothing is downloaded.

    python -m dlrm.data.criteo_generator input/train.txt --samples=100000
    python -m dlrm.data.criteo_generator input/day --data-set=terabyte --samples=240000 --gzip

A click's probability depends on three categories and one dense feature, each drawn uniformly from a few values:
sigmoid(bias + the sum of the values' weights). The other columns are noise; a column of categories is skewed, as real
ones are. As the values that matter can be enumerated, the AUC of the model that knows the weights, which no model
exceeds on average, is known exactly: it is printed, and `optimal_auc()` returns it.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

SIGNAL_COLUMNS = (0, 5, 20)  # of the categories
SIGNAL_DENSE = 2
VALUES = 8  # of each of them
BIAS = -1.0
WEIGHTS = np.random.RandomState(7).normal(0, 0.9, (len(SIGNAL_COLUMNS) + 1, VALUES))  # the last for the dense feature
WEIGHTS[-1].sort()
CARDINALITIES = (8, 500, 2000, 2000, 30, 8, 1000, 60, 3, 1000, 500, 2000, 300, 20, 700, 2000, 10, 400, 200, 4, 8, 10,
                 15, 1000, 50, 800)  # fmt: skip
LINES_PER_BLOCK = 50_000  # lines


def click_probability(values: np.ndarray) -> np.ndarray:
    """(n, 4) values from 0 to 7 of the columns that matter -> (n,)."""
    logit = BIAS + sum(weights[column] for weights, column in zip(WEIGHTS, values.T, strict=True))
    return 1 / (1 + np.exp(-logit))


def optimal_auc() -> float:
    """The chance that a random click has a higher probability than a random non-click, ties counting half."""
    states = np.array(list(itertools.product(range(VALUES), repeat=len(WEIGHTS))))
    clicks = np.sort(click_probability(states))
    no_clicks = 1 - clicks
    below = np.cumsum(no_clicks) - no_clicks
    return float((clicks * (below + no_clicks / 2)).sum() / (clicks.sum() * no_clicks.sum()))


def lines(samples: int, rng: np.random.Generator) -> Iterator[str]:
    """Blocks of text."""
    for begin in range(0, samples, LINES_PER_BLOCK):
        size = min(LINES_PER_BLOCK, samples - begin)
        signal = rng.integers(0, VALUES, (size, len(WEIGHTS)))
        labels = rng.random(size) < click_probability(signal)
        dense = np.floor(rng.lognormal(2, 1.5, (13, size))).astype(int) - 2  # some are negative
        dense[SIGNAL_DENSE] = 2 ** signal[:, -1] - 1  # even steps for log(x + 1)
        columns = [labels.astype(int).astype(str)]
        for column, numbers in enumerate(dense):
            missing = rng.random(size) < (0 if column == SIGNAL_DENSE else 0.15)
            columns.append(np.where(missing, "", numbers.astype(str)))
        for column, rows in enumerate(CARDINALITIES):
            values = (rows * rng.random(size) ** 3).astype(int)  # small numbers are frequent
            if column in SIGNAL_COLUMNS:
                values = signal[:, SIGNAL_COLUMNS.index(column)]
            columns.append(category_names(column, rows)[values])
        yield "\n".join(map("\t".join, zip(*(column.tolist() for column in columns), strict=True))) + "\n"


def category_names(column: int, rows: int) -> np.ndarray:
    """Hexadecimal, as different as hashes; one category of a noise column is the missing value."""
    names = [f"{(1 + column + 26 * value) * 2654435761 % 2**32:08x}" for value in range(rows)]
    if column not in SIGNAL_COLUMNS:
        names[1] = ""
    return np.array(names)


def write(path: Path, samples: int, seed: int, compressed: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with gzip.open(f"{path}.gz", "wt") if compressed else path.open("w") as file:
        file.writelines(lines(samples, rng))


def generate(raw: str, samples: int, data_set: str = "kaggle", seed: int = 123, compressed: bool = False) -> None:
    """Writes the file `raw`, or the 24 files `raw`_0, ..., with `samples` lines in all."""
    if data_set == "kaggle":
        write(Path(raw), samples, seed, compressed)
        return
    for day in range(24):
        write(Path(f"{raw}_{day}"), samples // 24 + (day < samples % 24), seed + day, compressed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dlrm.data.criteo_generator", description=__doc__.splitlines()[0])
    parser.add_argument("raw", help="kaggle: file to write; terabyte: what comes before _0, _1, ...")
    parser.add_argument("--data-set", choices=("kaggle", "terabyte"), default="kaggle")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--gzip", action="store_true", help="compress, as Criteo's own days are")
    arguments = parser.parse_args(argv)
    if arguments.samples < 1:
        parser.error("--samples: expected an integer from 1")
    try:
        generate(arguments.raw, arguments.samples, arguments.data_set, arguments.seed, arguments.gzip)
    except OSError as error:
        print(f"criteo_generator: error: {arguments.raw}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{arguments.samples:,} samples; the AUC of the model that made them is {optimal_auc():.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
