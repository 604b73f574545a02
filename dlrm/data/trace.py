"""Lookups after a trace: profiles a trace of accesses, and draws traces like it.

    python -m dlrm.data.trace --trace-file=input/trace.log --dist-file=input/dist_emb_0.log

What is kept of a trace is the distribution of its stack distances (Mattson et al., 1970): 0 for a row that is new, 1
for the row that was accessed last, d for the one before d - 1 others. A file of three lines holds the rows in order of
first access, the distances that occur, ascending, and the cumulative probability of each.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlrm.batch import bag_sizes
from dlrm.errors import RunError, UsageError
from dlrm.options import Options, boolean


class Distribution(NamedTuple):
    rows: list[int]  # in order of first access
    distances: list[int]  # ascending, from 0
    cumulative: list[float]

    @classmethod
    def read(cls, path: Path) -> Distribution:
        try:
            rows, distances, cumulative = (line.split(", ") for line in path.read_text().splitlines())
            found = cls(list(map(int, rows)), list(map(int, distances)), list(map(float, cumulative)))
        except OSError as error:
            raise UsageError(f"--data-trace-file: {path}: {error.strerror}") from None
        except ValueError:
            raise RunError(f"{path}: expected three lines of numbers: rows, distances, probabilities") from None
        found._check(path)
        return found

    def _check(self, path: Path) -> None:
        wrong = ""
        if self.distances[0] != 0 or self.distances != sorted(set(self.distances)):
            wrong = "distances must ascend from 0"
        elif self.distances[-1] > len(self.rows):
            wrong = f"there is a distance of {self.distances[-1]} among {len(self.rows)} rows"
        elif len(self.cumulative) != len(self.distances) or self.cumulative != sorted(self.cumulative):
            wrong = "each distance needs a cumulative probability, which may not fall"
        elif not (self.cumulative[0] > 0 and abs(self.cumulative[-1] - 1) < 1e-6):
            wrong = "cumulative probabilities must start above 0 and end in 1"
        elif min(self.rows) < 0:
            wrong = "rows must not be negative"
        if wrong:
            raise RunError(f"{path}: {wrong}")

    def write(self, path: Path) -> None:
        path.write_text("".join(", ".join(map(str, line)) + "\n" for line in self))


def profile(trace: Sequence[int], padding: bool = False) -> Distribution:
    """With `padding`, first accesses count as if there were one more for each longest distance of accesses."""
    last_access: dict[int, int] = {}
    stack: list[int] = []  # times of the last access to each row, ascending
    distances = Counter()
    for time, row in enumerate(trace):
        if row in last_access:
            place = bisect_left(stack, last_access[row])
            distances[len(stack) - place] += 1
            del stack[place]
        else:
            distances[0] += 1
        stack.append(time)
        last_access[row] = time
    if padding:
        distances[0] += -(-len(trace) // max(1, *distances))
    ascending, total = sorted(distances), distances.total()
    cumulative = list(itertools.accumulate(distances[distance] / total for distance in ascending))
    return Distribution(list(last_access), ascending, cumulative)


class TraceGenerator:
    """Draws accesses one after the other; the stack goes on from call to call."""

    def __init__(self, distribution: Distribution, padding: bool):
        self._distances, self._cumulative = distribution.distances, distribution.cumulative
        self._stack = list(distribution.rows)  # the next new row first, the row accessed last at the end
        self._padding, self._new = padding, 0

    def rows(self, uniforms: np.ndarray) -> np.ndarray:
        """A row for each uniform, int64."""
        return np.fromiter(map(self._next, uniforms.tolist()), np.int64, len(uniforms))

    def _next(self, uniform: float) -> int:
        distance = self._distance(uniform)
        self._new += distance == 0
        row = self._stack.pop(-distance if distance else 0)
        self._stack.append(row)
        return row

    def _distance(self, uniform: float) -> int:
        cumulative = self._cumulative
        if self._new < self._distances[-1]:  # no distance beyond what has been accessed
            uniform *= cumulative[bisect_right(self._distances, self._new) - 1]
        elif self._padding:  # no new rows once all have been seen
            uniform = (1 - cumulative[0]) * uniform + cumulative[0]
            if len(cumulative) > 1:
                return self._distances[max(1, self._place(uniform))]
        return self._distances[self._place(uniform)]

    def _place(self, uniform: float) -> int:
        return min(bisect_left(self._cumulative, uniform), len(self._cumulative) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# In training
# ---------------------------------------------------------------------------------------------------------------------


def distribution_path(pattern: str, table: int) -> Path:
    """`input/dist_emb_j.log` -> `input/dist_emb_3.log`: the last j of the name, its ending and folder left alone."""
    path = Path(pattern)
    before, j, after = path.stem.rpartition("j")
    return path.with_name(f"{before}{table}{after}{path.suffix}") if j else path


def read_distributions(options: Options) -> list[Distribution]:
    tables = range(len(options.arch_embedding_size))
    return [Distribution.read(distribution_path(options.data_trace_file, table)) for table in tables]


def trace_tensors(options: Options) -> tuple[list[Tensor], list[Tensor]]:
    """For each table the state of its trace before the first access (rows in order, two zeros), int64, which
    `dlrm::draw_random_batch` changes; and distances and their cumulative probabilities, (2, n) float64."""
    found = read_distributions(options)
    states = [torch.tensor([*distribution.rows, 0, 0]) for distribution in found]
    return states, [torch.tensor([each.distances, each.cumulative], dtype=torch.float64) for each in found]


def synthetic_lookups(stream, options: Options) -> Callable:
    """A function (rows, bags) -> (indices, bag lengths), to be called for each table in turn, as those of
    `random_data.py`. A bag takes a uniform for its size, if that varies, then one for each lookup; a row counts
    once in a bag."""
    generators = [TraceGenerator(found, options.data_trace_enable_padding) for found in read_distributions(options)]
    turn = itertools.cycle(generators)
    largest = options.num_indices_per_lookup

    def draw(rows: int, bags: int = options.mini_batch_size) -> tuple[np.ndarray, np.ndarray]:
        generator, drawn = next(turn), []
        for _ in range(bags):
            fixed = options.num_indices_per_lookup_fixed
            size = largest if fixed else int(bag_sizes(stream.take(1), min(rows, largest))[0])
            drawn.append(np.unique(generator.rows(stream.take(size)) % rows))
        return np.concatenate(drawn), np.array([len(bag) for bag in drawn])

    return draw


def warn_of_large_rows(options: Options) -> None:
    """One line for each table that is smaller than its distribution's rows."""
    for table, (found, rows) in enumerate(zip(read_distributions(options), options.arch_embedding_size, strict=True)):
        if max(found.rows) >= rows:
            path = distribution_path(options.data_trace_file, table)
            print(f"WARNING: {path} has row {max(found.rows)}, table {table} has {rows} rows: taken modulo {rows}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def read_trace(path: Path, binary: bool) -> list[int]:
    """Text of one line, `3, 1, 3`, or uint64."""
    try:
        trace = np.fromfile(path, np.uint64).tolist() if binary else list(map(int, path.read_text().split(",")))
    except OSError as error:
        raise UsageError(f"--trace-file: {path}: {error.strerror}") from None
    except ValueError:
        raise RunError(f"{path}: expected integers joined by commas, or --trace-file-binary-type") from None
    if not trace:
        raise RunError(f"{path}: there is no access in it")
    return trace


def write_trace(path: Path, trace: np.ndarray, binary: bool) -> None:
    if binary:
        trace.astype(np.uint64).tofile(path)
    else:
        path.write_text(", ".join(map(str, trace.tolist())))


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles --trace-file into --dist-file, and draws a trace as long into --synthetic-file."""
    parser = argparse.ArgumentParser(prog="python -m dlrm.data.trace", description=main.__doc__)
    parser.add_argument("--trace-file", type=Path, default=Path("./input/trace.log"))
    for name in ("--trace-file-binary-type", "--trace-enable-padding"):
        parser.add_argument(name, type=boolean, nargs="?", const=True, default=False)
    parser.add_argument("--dist-file", type=Path, default=Path("./input/dist.log"))
    parser.add_argument("--synthetic-file", type=Path, default=Path("./input/trace_synthetic.log"))
    parser.add_argument("--numpy-rand-seed", type=int, default=123)
    parser.add_argument("--print-precision", type=int, default=5, help="accepted for old command lines")
    arguments = parser.parse_args(argv)
    try:
        trace = read_trace(arguments.trace_file, arguments.trace_file_binary_type)
        found = profile(trace, arguments.trace_enable_padding)
        found.write(arguments.dist_file)
        uniforms = np.random.RandomState(arguments.numpy_rand_seed).random_sample(len(trace))
        drawn = TraceGenerator(found, arguments.trace_enable_padding).rows(uniforms)
        write_trace(arguments.synthetic_file, drawn, arguments.trace_file_binary_type)
        return 0
    except (UsageError, RunError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        print(f"{parser.prog}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
