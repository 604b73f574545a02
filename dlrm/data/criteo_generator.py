"""Makes click logs in Criteo's format with a signal to learn, for tests and first steps. Nothing is downloaded.

    python -m dlrm.data.criteo_generator input/train.txt --samples=100000
    python -m dlrm.data.criteo_generator input/day --data-set=terabyte --samples=240000 --gzip
    python -m dlrm.data.criteo_generator input/bags --multi-hot

The probability of a click depends on three columns of categories and one dense feature, each of which is drawn
uniformly from a few values. It is the sigmoid of a bias plus one weight for each of the four values. The other columns
are noise; their categories are skewed, as those of real logs are.

With `--multi-hot`, the files are those of MLPerf's DLRM-dcnv2, with several lookups per bag. Each of the two lookups in
a column that matters then has its weight, divided by the square root of two.

No model has a higher AUC on average than the one that knows the weights. As there are few combinations of the values
that matter, this optimal AUC is known exactly. It is printed, and `optimal_auc()` returns it.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dlrm.data.bag_files import path_of
from dlrm.data.criteo_rows import DAYS, NUM_DENSE
from dlrm.errors import RunError
from dlrm.options import integer
from dlrm.system.endings import end_by, mend_streams
from dlrm.system.files import reason_of

SIGNAL_CATEGORIES = (0, 5, 20)  # columns of categories that matter
SIGNAL_DENSE = 2  # the dense feature that matters
SIGNAL_VALUES = 8  # values of each column that matters
BIAS = -1.0
# One row of weights per column that matters; the last one is for the dense feature.
WEIGHTS = np.random.RandomState(7).normal(0, 0.9, (len(SIGNAL_CATEGORIES) + 1, SIGNAL_VALUES))
WEIGHTS[-1].sort()
# Number of categories of each column.
CARDINALITIES = (8, 500, 2000, 2000, 30, 8, 1000, 60, 3, 1000, 500, 2000, 300, 20, 700, 2000, 10, 400, 200, 4, 8, 10,
                 15, 1000, 50, 800)  # fmt: skip
# Lookups per bag of each column, with --multi-hot.
BAG_SIZES = (2, 2, 1, 2, 6, 2, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 2, 27, 10, 3, 1, 1)
SIGNAL_BAG = 2  # of a column that matters
LINES_PER_BLOCK = 50_000


def logistic(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def click_probability(signal: np.ndarray) -> np.ndarray:
    """Returns the probability of a click, (n,), for values from 0 to 7 of the columns that matter, (n, 4)."""
    return logistic(BIAS + sum(weights[values] for weights, values in zip(WEIGHTS, signal.T, strict=True)))


def click_probability_of_bags(bags: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Returns the probability of a click, (n,), for values from 0 to 7 of the bags that matter, (3, n, 2), and of the
    dense feature that matters, (n,)."""
    weights = sum(weights[bag].sum(1) for weights, bag in zip(WEIGHTS, bags, strict=False)) / SIGNAL_BAG**0.5
    return logistic(BIAS + weights + WEIGHTS[-1][dense])


def optimal_auc(multi_hot: bool = False) -> float:
    """Returns the probability that a random click has a higher click probability than a random non-click, where ties
    count half. `multi_hot`: in the files with bags."""
    matter = len(SIGNAL_CATEGORIES) * (SIGNAL_BAG if multi_hot else 1) + 1
    combinations = np.stack(np.meshgrid(*[np.arange(SIGNAL_VALUES)] * matter), -1).reshape(-1, matter)
    if multi_hot:
        bags = combinations[:, :-1].reshape(len(combinations), -1, SIGNAL_BAG).transpose(1, 0, 2)
        clicks = np.sort(click_probability_of_bags(bags, combinations[:, -1]))
    else:
        clicks = np.sort(click_probability(combinations))
    no_clicks = 1 - clicks
    no_clicks_below = np.cumsum(no_clicks) - no_clicks
    return float((clicks * (no_clicks_below + no_clicks / 2)).sum() / (clicks.sum() * no_clicks.sum()))


def text_blocks(samples: int, rng: np.random.Generator) -> Iterator[str]:
    """Yields `samples` lines of a click log, in blocks of LINES_PER_BLOCK."""
    for begin in range(0, samples, LINES_PER_BLOCK):
        size = min(LINES_PER_BLOCK, samples - begin)
        signal = rng.integers(0, SIGNAL_VALUES, (size, len(WEIGHTS)))
        labels = rng.random(size) < click_probability(signal)
        dense = np.floor(rng.lognormal(2, 1.5, (NUM_DENSE, size))).astype(int) - 2  # some are negative
        dense[SIGNAL_DENSE] = 2 ** signal[:, -1] - 1  # even steps for log(x + 1)
        fields = [labels.astype(int).astype(str)]
        for feature, numbers in enumerate(dense):
            missing = rng.random(size) < (0 if feature == SIGNAL_DENSE else 0.15)
            fields.append(np.where(missing, "", numbers.astype(str)))
        for column, cardinality in enumerate(CARDINALITIES):
            categories = (cardinality * rng.random(size) ** 3).astype(int)  # small numbers are frequent
            if column in SIGNAL_CATEGORIES:
                categories = signal[:, SIGNAL_CATEGORIES.index(column)]
            fields.append(category_names(column, cardinality)[categories])
        yield "\n".join(map("\t".join, zip(*(field.tolist() for field in fields), strict=True))) + "\n"


def category_names(column: int, cardinality: int) -> np.ndarray:
    """Returns hexadecimal names that differ as hashes do. In a column of noise, one category is the missing value."""
    names = [
        f"{(1 + column + len(CARDINALITIES) * category) * 2654435761 % 2**32:08x}" for category in range(cardinality)
    ]
    if column not in SIGNAL_CATEGORIES:
        names[1] = ""
    return np.array(names)


def write_log(path: Path, samples: int, seed: int, compressed: bool) -> None:
    """Writes one file of text, or `path`.gz if `compressed`, with one line per sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with gzip.open(f"{path}.gz", "wt") if compressed else path.open("w") as file:
        file.writelines(text_blocks(samples, rng))


def write_bags(folder: Path, day: int, samples: int, seed: int) -> None:
    """Writes a day of MLPerf's files of DLRM-dcnv2."""
    rng = np.random.default_rng(seed)
    bags = [(cardinality * rng.random((samples, size)) ** 3).astype(np.int32)
            for cardinality, size in zip(CARDINALITIES, BAG_SIZES, strict=True)]  # fmt: skip
    for column in SIGNAL_CATEGORIES:
        bags[column] = rng.integers(0, SIGNAL_VALUES, bags[column].shape, dtype=np.int32)
    dense = rng.normal(2, 1.5, (samples, NUM_DENSE)).clip(0).astype(np.float32)
    signal = rng.integers(0, SIGNAL_VALUES, samples)
    dense[:, SIGNAL_DENSE] = signal
    clicks = rng.random(samples) < click_probability_of_bags([bags[column] for column in SIGNAL_CATEGORIES], signal)
    np.save(path_of(folder, day, "labels.npy"), clicks[:, None].astype(np.int32))
    np.save(path_of(folder, day, "dense.npy"), dense)
    np.savez(path_of(folder, day, "sparse_multi_hot.npz"), **{str(table): bag for table, bag in enumerate(bags)})


def generate_bags(folder: str, samples: int, data_set: str = "kaggle", seed: int = 123) -> None:
    """Writes the files of each day of the data set to a folder, with `samples` samples in all."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    smaller, extra = divmod(samples, DAYS[data_set])
    for day in range(DAYS[data_set]):
        write_bags(Path(folder), day, smaller + (day < extra), seed + day)


def generate(raw: str, samples: int, data_set: str = "kaggle", seed: int = 123, compressed: bool = False) -> None:
    """Writes the file `raw`, or for terabyte the 24 files `raw`_0, `raw`_1, ..., with `samples` lines in all."""
    if data_set == "kaggle":
        write_log(Path(raw), samples, seed, compressed)
        return
    smaller, extra = divmod(samples, DAYS["terabyte"])
    for day in range(DAYS["terabyte"]):
        write_log(Path(f"{raw}_{day}"), smaller + (day < extra), seed + day, compressed)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the click logs that the command line asks for. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dlrm.data.criteo_generator", description=__doc__.splitlines()[0])
    parser.add_argument("raw", help="kaggle: the file to write; terabyte: the files' names without _0, _1, ...; with "
                                    "--multi-hot: the folder")  # fmt: skip
    parser.add_argument("--data-set", choices=("kaggle", "terabyte"), default="kaggle")
    parser.add_argument("--samples", type=integer(1), default=100_000)
    parser.add_argument("--seed", type=integer(0, 2**32 - DAYS["terabyte"]), default=123)
    parser.add_argument("--gzip", action="store_true", help="compress the files, as Criteo's own days are")
    parser.add_argument("--multi-hot", action="store_true", help="write the files of MLPerf's DLRM-dcnv2, with bags")
    mend_streams()
    arguments = parser.parse_args(argv)
    if arguments.multi_hot and arguments.gzip:
        parser.error("--gzip compresses text; leave it out with --multi-hot")
    try:
        if arguments.multi_hot:
            generate_bags(arguments.raw, arguments.samples, arguments.data_set, arguments.seed)
        else:
            generate(arguments.raw, arguments.samples, arguments.data_set, arguments.seed, arguments.gzip)
    except OSError as error:
        return end_by(parser.prog, RunError(f"{arguments.raw}: {reason_of(error)}"))
    auc = optimal_auc(arguments.multi_hot)
    print(f"{arguments.samples:,} samples; the AUC of the model that made them is {auc:.4f}")
    if arguments.multi_hot:
        rows = "-".join(map(str, CARDINALITIES))
        print(f"Train with --processed-data-file={arguments.raw} --arch-embedding-size={rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
