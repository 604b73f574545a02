"""Lookups after a trace of accesses: profiles the trace, and draws traces like it.

    python -m dlrm.data.trace --trace-file=input/trace.log --dist-file=input/dist_emb_0.log

The profile of a trace is the distribution of its stack distances (Mattson et al., 1970). The distance of an access is 0
if its row is new, 1 if its row was accessed last, and d if d - 1 other rows have been accessed since. A profile is a
file of three lines: the rows in order of first access, the distances that occur in ascending order, and the cumulative
probability of each distance.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlrm.data.uniform_stream import DrawLookups, UniformStream, bag_sizes
from dlrm.errors import RunError, UsageError
from dlrm.options import Options, boolean, integer
from dlrm.system.endings import end_by, mend_streams
from dlrm.system.files import reason_of

LARGEST_ROW = 2**63 - 1


class TraceProfile(NamedTuple):
    """The rows of a trace, and how its stack distances are distributed."""

    rows: list[int]  # in order of first access
    distances: list[int]  # ascending, from 0
    cumulative: list[float]  # the probability of each distance or a smaller one

    @classmethod
    def read(cls, path: Path) -> TraceProfile:
        """Reads a profile. Raises UsageError if the file cannot be read, and RunError if it holds something else."""
        try:
            rows, distances, cumulative = (line.split(", ") for line in path.read_text().splitlines())
            profile = cls(list(map(int, rows)), list(map(int, distances)), list(map(float, cumulative)))
        except OSError as error:
            raise UsageError(f"--data-trace-file: {path}: {error.strerror}") from None
        except ValueError:
            raise RunError(f"{path}: expected three lines of numbers: rows, distances, probabilities") from None
        profile._check(path)
        return profile

    def _check(self, path: Path) -> None:
        wrong = ""
        if self.distances[0] != 0 or self.distances != sorted(set(self.distances)):
            wrong = "distances must ascend from 0"
        elif self.distances[-1] > len(self.rows):
            wrong = f"there is a distance of {self.distances[-1]} among {len(self.rows)} rows"
        elif len(self.cumulative) != len(self.distances) or self.cumulative != sorted(self.cumulative):
            wrong = "each distance needs a cumulative probability, which may not fall"
        elif not all(0 < probability < 1 + 1e-6 for probability in self.cumulative) or self.cumulative[-1] < 1 - 1e-6:
            wrong = "cumulative probabilities must start above 0 and end in 1"
        elif min(self.rows) < 0 or max(self.rows) > LARGEST_ROW:
            wrong = f"expected rows from 0 to {LARGEST_ROW}"
        if wrong:
            raise RunError(f"{path}: {wrong}")

    def write(self, path: Path) -> None:
        """Writes the three lines of the profile."""
        path.write_text("".join(", ".join(map(str, line)) + "\n" for line in self))


def profile_trace(trace: Sequence[int], padding: bool = False) -> TraceProfile:
    """Returns the profile of a trace of rows. With `padding`, one first access is added for every d accesses, d being
    the longest distance."""
    last_access: dict[int, int] = {}
    stack: list[int] = []  # the time of the last access to each row, ascending
    distances = Counter()
    for time, row in enumerate(trace):
        if row in last_access:
            position = bisect_left(stack, last_access[row])
            distances[len(stack) - position] += 1
            del stack[position]
        else:
            distances[0] += 1
        stack.append(time)
        last_access[row] = time
    if padding:
        distances[0] += -(-len(trace) // max(1, *distances))
    ascending, total = sorted(distances), distances.total()
    cumulative = list(itertools.accumulate(distances[distance] / total for distance in ascending))
    return TraceProfile(list(last_access), ascending, cumulative)


class TraceGenerator:
    """Draws a trace that has a given profile. Each call goes on where the last one ended."""

    def __init__(self, profile: TraceProfile, padding: bool):
        """With `padding`, draws no new rows once all rows have been drawn."""
        self._distances, self._cumulative = profile.distances, profile.cumulative
        self._stack = list(profile.rows)  # the next new row first, the row accessed last at the end
        self._padding, self._new_rows_drawn = padding, 0

    def draw_rows(self, uniforms: np.ndarray) -> np.ndarray:
        """Returns one row for each uniform, int64."""
        return np.fromiter(map(self._next_row, uniforms.tolist()), np.int64, len(uniforms))

    def _next_row(self, uniform: float) -> int:
        distance = self._distance(uniform)
        self._new_rows_drawn += distance == 0
        row = self._stack.pop(-distance if distance else 0)
        self._stack.append(row)
        return row

    def _distance(self, uniform: float) -> int:
        cumulative = self._cumulative
        if self._new_rows_drawn < self._distances[-1]:  # no distance beyond the rows drawn so far
            uniform *= cumulative[bisect_right(self._distances, self._new_rows_drawn) - 1]
        elif self._padding:
            uniform = (1 - cumulative[0]) * uniform + cumulative[0]
            if len(cumulative) > 1:
                return self._distances[max(1, self._position(uniform))]
        return self._distances[self._position(uniform)]

    def _position(self, uniform: float) -> int:
        """Returns which of the distances a uniform stands for."""
        return min(bisect_left(self._cumulative, uniform), len(self._cumulative) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Lookups in training
# ---------------------------------------------------------------------------------------------------------------------


def profile_path(pattern: str, table: int) -> Path:
    """Returns the profile of a table: `input/dist_emb_j.log` -> `input/dist_emb_3.log`. The last j of the file's name
    is replaced; its ending and its folder are left alone."""
    path = Path(pattern)
    before, j, after = path.stem.rpartition("j")
    return path.with_name(f"{before}{table}{after}{path.suffix}") if j else path


def read_profiles(options: Options) -> list[TraceProfile]:
    """Returns one profile per table. Raises as `TraceProfile.read` does."""
    tables = range(len(options.arch_embedding_size))
    return [TraceProfile.read(profile_path(options.data_trace_file, table)) for table in tables]


def trace_tensors(options: Options) -> tuple[list[Tensor], list[Tensor]]:
    """Returns two tensors per table for `dlrm::draw_random_batch`.

    The first is the state of the trace, (rows + 2,) int64, which the op changes: before the first access, the rows in
    order and two zeros. The second holds the distances and their cumulative probabilities, (2, distances) float64.
    """
    profiles = read_profiles(options)
    states = [torch.tensor([*profile.rows, 0, 0]) for profile in profiles]
    return states, [torch.tensor([each.distances, each.cumulative], dtype=torch.float64) for each in profiles]


def trace_draw_function(stream: UniformStream, options: Options) -> DrawLookups:
    """Returns a function that goes on with the trace of another table at each call, all tables in turn.

    A bag takes one uniform for its size, unless the size is fixed, and then one per lookup. Equal rows of a bag count
    once.
    """
    generators = [TraceGenerator(profile, options.data_trace_enable_padding) for profile in read_profiles(options)]
    generator_of_next_table = itertools.cycle(generators)

    def draw(rows: int, largest: int, bags: int) -> tuple[np.ndarray, np.ndarray]:
        generator, drawn = next(generator_of_next_table), []
        for _ in range(bags):
            fixed = options.num_indices_per_lookup_fixed
            size = largest if fixed else int(bag_sizes(stream.take(1), min(rows, largest))[0])
            drawn.append(np.unique(generator.draw_rows(stream.take(size)) % rows))
        return np.concatenate(drawn), np.array([len(bag) for bag in drawn])

    return draw


def warn_of_large_rows(options: Options) -> None:
    """Prints one line for each table that has fewer rows than its profile."""
    for table, (profile, rows) in enumerate(zip(read_profiles(options), options.arch_embedding_size, strict=True)):
        if max(profile.rows) >= rows:
            path = profile_path(options.data_trace_file, table)
            print(f"WARNING: {path} has row {max(profile.rows)}, table {table} has {rows} rows: taken modulo {rows}")


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def read_trace(path: Path, binary: bool) -> list[int]:
    """Returns the rows of a trace file: one line of text such as `3, 1, 3`, or uint64 numbers. Raises UsageError if
    the file cannot be read, and RunError if it holds something else."""
    try:
        trace = np.fromfile(path, np.uint64).tolist() if binary else list(map(int, path.read_text().split(",")))
    except OSError as error:
        raise UsageError(f"--trace-file: {path}: {error.strerror}") from None
    except ValueError:
        raise RunError(f"{path}: expected integers joined by commas, or --trace-file-binary-type") from None
    if not trace:
        raise RunError(f"{path}: there is no access in it")
    for number, row in enumerate(trace, start=1):
        if not 0 <= row <= LARGEST_ROW:
            raise RunError(f"{path}: access {number:,} is to row {row}; expected rows from 0 to {LARGEST_ROW}")
    return trace


def write_trace(path: Path, trace: np.ndarray, binary: bool) -> None:
    """Writes rows as `read_trace` reads them."""
    if binary:
        trace.astype(np.uint64).tofile(path)
    else:
        path.write_text(", ".join(map(str, trace.tolist())))


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the profile of --trace-file to --dist-file, and a drawn trace of the same length to --synthetic-file."""
    parser = argparse.ArgumentParser(prog="python -m dlrm.data.trace", description=main.__doc__)
    parser.add_argument("--trace-file", type=Path, default=Path("./input/trace.log"))
    for name in ("--trace-file-binary-type", "--trace-enable-padding"):
        parser.add_argument(name, type=boolean, nargs="?", const=True, default=False)
    parser.add_argument("--dist-file", type=Path, default=Path("./input/dist.log"))
    parser.add_argument("--synthetic-file", type=Path, default=Path("./input/trace_synthetic.log"))
    parser.add_argument("--numpy-rand-seed", type=integer(0, 2**32 - 1), default=123)
    parser.add_argument("--print-precision", type=int, default=5, help="accepted for old command lines")
    mend_streams()
    arguments = parser.parse_args(argv)
    try:
        trace = read_trace(arguments.trace_file, arguments.trace_file_binary_type)
        profile = profile_trace(trace, arguments.trace_enable_padding)
        profile.write(arguments.dist_file)
        uniforms = np.random.RandomState(arguments.numpy_rand_seed).random_sample(len(trace))
        drawn = TraceGenerator(profile, arguments.trace_enable_padding).draw_rows(uniforms)
        write_trace(arguments.synthetic_file, drawn, arguments.trace_file_binary_type)
        return 0
    except OSError as error:
        return end_by(parser.prog, RunError(f"{error.filename or arguments.dist_file.parent}: {reason_of(error)}"))
    except Exception as error:
        return end_by(parser.prog, error)


if __name__ == "__main__":
    sys.exit(main())
