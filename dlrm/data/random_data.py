"""Batches for the trainer. Knows nothing of devices.

Random data follows the public DLRM script draw by draw: the same seed gives the same numbers. That script loops over
samples in Python and calls the generator for each; here a table's lookups are computed at once from a block of the
same stream of uniforms (numpy's legacy MT19937), although where a sample's draws start depends on the draws before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dlrm.batch import Batch, Share, bag_sizes, batch_sizes, joined
from dlrm.data.trace import synthetic_lookups, trace_tensors, warn_of_large_rows
from dlrm.kernels import ops  # noqa: F401 - registers the op that draws
from dlrm.kernels.native import load_kernels
from dlrm.options import Options


class RandomDataSet:
    """Random data for training and for tests."""

    def __init__(self, options: Options):
        if options.data_generation == "synthetic":
            warn_of_large_rows(options)
        self.options = options

    def training_data(self) -> RandomData:
        return RandomData(self.options)

    def test_data(self) -> RandomData:
        return RandomData(self.options, test=True)

    def fingerprint(self) -> dict[str, str]:
        """Returns the size of the trace's files, if there are any; all else follows from the flags."""
        path = Path(self.options.data_trace_file)
        return {"the size of --data-trace-file": str(path.stat().st_size)} if path.is_file() else {}


class RandomData:
    """Random dense features, lookups and targets; iterating yields the batches of an epoch, the last may be smaller.

    Each epoch starts the stream at the seed again, so epochs repeat, as in the public script. Test data are a stream of
    their own, with as many samples as an epoch of training.
    """

    is_stored_by_sample = False  # but drawn, table by table

    def __init__(self, options: Options, test: bool = False):
        self.options, self.samples = options, options.samples_per_epoch
        self.seed = (options.numpy_rand_seed + test) % 2**32
        self.batch_size = options.test_batch_size if test else options.mini_batch_size
        self.num_dense_features = options.arch_mlp_bot[0]
        self.table_rows = options.arch_embedding_size
        self.max_lookups_per_bag = options.num_indices_per_lookup

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, first: int = 0, width: int = 1, share: Share | None = None) -> Iterator[Batch]:
        """The batches of an epoch from the given one on, each `width` as one; all of it, or a share.

        Where a batch starts in the stream depends on all that was drawn before, so what is not wanted is skipped, not
        left out. Of the batches before the first one, that is all but the accesses of traces, which go on.
        """
        share = share or Share(slice(0, width * self.batch_size), list(range(len(self.table_rows))))
        passed = Share(slice(0, 0), share.tables if self.options.data_generation == "synthetic" else [])
        parts = [share.of_part(part * self.batch_size) for part in range(width)]
        shares = itertools.chain(itertools.repeat(passed, first), itertools.cycle(parts))
        drawn = self._drawn_by_kernel(shares) if load_kernels() == "native" else self._drawn_in_blocks(shares)
        return joined(itertools.islice(drawn, first, None), width)

    def _drawn_by_kernel(self, shares: Iterable[Share]) -> Iterator[Batch]:
        """Of each batch its share and no more, by `dlrm::draw_random_batch`, which leaves Python to the training step
        meanwhile."""
        options = self.options
        _, words, used, has_normal, normal = np.random.RandomState(self.seed).get_state()
        kept = [used, has_normal, np.float64(normal).view(np.int64)]
        generator = torch.from_numpy(np.concatenate([words, kept]).astype(np.int64))
        distribution = self._distribution()
        lookups, fixed = options.num_indices_per_lookup, options.num_indices_per_lookup_fixed
        for size, (samples, tables) in zip(batch_sizes(self.samples, self.batch_size), shares, strict=False):
            mine = range(size)[samples]
            dense, target = torch.empty(len(mine), self.num_dense_features), torch.empty(len(mine), 1)
            indices = torch.empty(len(tables), size * lookups, dtype=torch.int64)
            offsets = torch.empty(len(tables), size + 1, dtype=torch.int64)
            wanted = mine.start, tables, dense, indices, offsets, target
            torch.ops.dlrm.draw_random_batch(generator, self.table_rows, lookups, fixed, *distribution, *wanted)
            drawn = [rows[:count] for rows, count in zip(indices, offsets[:, -1].tolist(), strict=True)]
            yield Batch(dense, drawn, offsets, target.round() if options.round_targets else target)

    def _distribution(self) -> tuple[str, list[float], list[Tensor], list[Tensor]]:
        """Of rows, as the op takes it: name, parameters and, after a trace, state and distribution of each table."""
        options = self.options
        if options.data_generation == "synthetic":
            return "trace", [float(options.data_trace_enable_padding)], *trace_tensors(options)
        parameters = {"uniform": (), "gaussian": gaussian_parameters(options), "zipf": (options.rand_data_alpha,)}
        return options.rand_data_dist, list(parameters[options.rand_data_dist]), [], []

    def _drawn_in_blocks(self, shares: Iterable[Share]) -> Iterator[Batch]:
        """The same by numpy, which draws all of it first."""
        stream = UniformStream(self.seed)
        draw_lookups = self._lookups(stream, self.options)
        for size, share in zip(batch_sizes(self.samples, self.batch_size), shares, strict=False):
            dense = stream.take(size * self.num_dense_features).reshape(size, -1)
            bags = [draw_lookups(rows, size) for rows in self.table_rows]
            target = stream.take(size).astype(np.float32).reshape(-1, 1)
            whole = Batch(
                dense=torch.from_numpy(dense.astype(np.float32)),
                indices=[torch.from_numpy(indices) for indices, _ in bags],
                offsets=torch.from_numpy(np.stack([_offsets(lengths) for _, lengths in bags])),
                target=torch.from_numpy(np.rint(target) if self.options.round_targets else target),
            )
            yield share.of(whole)

    @property
    def _lookups(self):
        if self.options.data_generation == "synthetic":
            return synthetic_lookups
        return {"uniform": uniform_lookups, "gaussian": gaussian_lookups, "zipf": zipf_lookups}[
            self.options.rand_data_dist
        ]


def gaussian_parameters(options: Options) -> tuple[float, float, float, float]:
    """Lowest and highest row, mean, standard deviation."""
    low, high, mean = options.rand_data_min, options.rand_data_max, options.rand_data_mu
    return low, high, (low + high) / 2 if mean == -1 else mean, options.rand_data_sigma


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Lengths of B bags -> where each starts, and where the last one ends: (B + 1,) int64."""
    return np.concatenate([[0], np.cumsum(lengths)])


# ---------------------------------------------------------------------------------------------------------------------
# The stream of uniforms, and walks along it
# ---------------------------------------------------------------------------------------------------------------------


class UniformStream:
    """The doubles in [0, 1) that `numpy.random.RandomState(seed)` gives, with a look ahead."""

    def __init__(self, seed: int):
        self._generator = np.random.RandomState(seed)
        self._ahead = np.empty(0)

    def peek(self, count: int) -> np.ndarray:
        """The next `count` numbers, which stay in the stream."""
        missing = count - len(self._ahead)
        if missing > 0:
            self._ahead = np.concatenate([self._ahead, self._generator.random_sample(missing)])
        return self._ahead[:count]

    def take(self, count: int) -> np.ndarray:
        """The next `count` numbers."""
        numbers = self.peek(count)
        self._ahead = self._ahead[count:]
        return numbers


def walk(successor: np.ndarray, start: int, steps: int) -> np.ndarray:
    """`[start, successor[start], successor[successor[start]], ...]`, `steps` entries.

    Pointer doubling: when the first k entries are known, and `successor` holds where k steps lead from any place, the
    next k entries are one gather, and 2k steps are the composition of `successor` with itself.
    """
    visited = np.array([start])
    while len(visited) < steps:
        visited = np.concatenate([visited, successor.take(visited)])
        successor = successor.take(successor)
    return visited[:steps]


def ragged_positions(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`[first[0], first[0] + 1, ... (lengths[0] of them), first[1], ...]`."""
    starts_in_output = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(first - starts_in_output, lengths)


def unique_in_bags(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts each bag and drops what is equal in it: the values that stay, truncated to int64, and how many in each
    bag."""
    matrix = np.full((len(lengths), lengths.max()), np.inf)
    matrix[np.arange(lengths.max()) < lengths[:, None]] = values
    matrix.sort(axis=1)
    stays = matrix < np.inf
    stays[:, 1:] &= matrix[:, 1:] != matrix[:, :-1]
    return matrix[stays].astype(np.int64), stays.sum(axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Lookups: functions (rows, bags) -> (indices, bag lengths), which draw bags for a table of that many rows
# ---------------------------------------------------------------------------------------------------------------------


def zipf_lookups(stream: UniformStream, options: Options):
    """Row r in proportion to the integral of x ** -alpha from r + 1 to r + 2: `floor(x) - 1` for the x in
    [1, rows + 1) at which the integral from 1 is a uniform's share of the whole. Bags are those of
    `uniform_lookups`."""
    exponent = 1 - options.rand_data_alpha

    def row_of(uniforms: np.ndarray, rows: int) -> np.ndarray:
        if abs(exponent) < 1e-9:
            x = np.exp(uniforms * np.log(rows + 1))
        else:
            x = (1 + uniforms * ((rows + 1) ** exponent - 1)) ** (1 / exponent)
        return np.clip(np.floor(x) - 1, 0, rows - 1)

    return uniform_lookups(stream, options, row_of)


def evenly(uniforms: np.ndarray, rows: int) -> np.ndarray:
    return np.rint(uniforms * (rows - 1))


def uniform_lookups(stream: UniformStream, options: Options, row_of=evenly):
    """Row `rint(u * (rows - 1))`, or what `row_of` says, each row of a bag once. A bag takes a uniform for its size,
    if that varies, then one for each lookup."""

    def draw(rows: int, bags: int) -> tuple[np.ndarray, np.ndarray]:
        if options.num_indices_per_lookup_fixed:
            sizes = np.full(bags, options.num_indices_per_lookup)
            uniforms = stream.take(sizes.sum())
        else:
            sizes, uniforms = draw_bags(min(rows, options.num_indices_per_lookup), bags)
        return unique_in_bags(row_of(uniforms, rows), sizes)

    def draw_bags(largest: int, bags: int) -> tuple[np.ndarray, np.ndarray]:
        if largest == 1:  # every bag takes two uniforms, whatever the first one is
            return np.ones(bags, dtype=np.int64), stream.take(2 * bags)[1::2]
        ahead = stream.peek(bags * (1 + largest))
        size_at = bag_sizes(ahead, largest)  # the size of a bag that began at each position of the stream
        begin = walk(np.minimum(np.arange(len(ahead)) + 1 + size_at, len(ahead) - 1), 0, bags)
        sizes = size_at[begin]
        used = stream.take(begin[-1] + 1 + sizes[-1])
        return sizes, used[ragged_positions(begin + 1, sizes)]

    return draw


def gaussian_lookups(stream: UniformStream, options: Options):
    """Row `trunc(clip(normal))`, each value of the normal once in a bag.

    The normals are those of numpy's legacy generator, the polar method of Marsaglia and Bray (1964): it draws pairs of
    uniforms until one lies in the unit circle, returns one normal, and keeps a second one for the next call, in the
    next bag or table. So a bag begins at a position of the stream, with or without a normal at hand.
    """
    low, high, mean, deviation = gaussian_parameters(options)
    kept: list[float] = []  # the second normal of the last pair, until it is used

    def draw(rows: int, bags: int) -> tuple[np.ndarray, np.ndarray]:
        if options.num_indices_per_lookup_fixed:
            sizes = np.full(bags, options.num_indices_per_lookup)
            normals = draw_normals(sizes.sum())
        else:
            sizes, normals = draw_bags(min(rows, options.num_indices_per_lookup), bags)
        return unique_in_bags(np.clip(mean + deviation * normals, low, high), sizes)

    def draw_normals(count: int) -> np.ndarray:
        pairs = -(-(count - len(kept)) // 2)
        length = 2 * pairs
        while len(accepted := accepted_pairs(stream.peek(length))[::2].nonzero()[0] * 2) < pairs:
            length += length // 2 + 8
        first = accepted[:pairs]
        uniforms = stream.take(first[-1] + 2 if pairs else 0)
        normals = np.concatenate([kept, polar_normals(uniforms, first)])
        kept[:] = normals[count:]
        return normals[:count]

    def draw_bags(largest: int, bags: int) -> tuple[np.ndarray, np.ndarray]:
        length = bags * (1 + largest) * 3 // 2 + 64
        while (found := find_bags(stream.peek(length), largest, bags)) is None:
            length += length // 2
        sizes, first, end = found
        normals = np.concatenate([kept, polar_normals(stream.take(end), first)])
        kept[:] = normals[sizes.sum() :]
        return sizes, normals[: sizes.sum()]

    def find_bags(ahead: np.ndarray, largest: int, bags: int) -> tuple[np.ndarray, np.ndarray, int] | None:
        """The sizes of the bags, where the pairs that they accept start, and where the next bag begins; None if
        `ahead` is too short. A state of the walk is 2 * position + (1 if a normal is kept)."""
        size_at = bag_sizes(ahead, largest)
        pairs = PairIndex(ahead)
        state = np.arange(2 * len(ahead))
        position, has_kept = state // 2, state % 2
        missing = size_at[position] - has_kept
        after = pairs.after(position + 1, -(-missing // 2))
        visited = walk(np.where(after < len(ahead), 2 * after + missing % 2, state), len(kept), bags + 1)
        begin, has_kept = visited // 2, visited % 2
        if (np.diff(begin) == 0).any():
            return None
        sizes = size_at[begin[:-1]]
        counts = -(-(sizes - has_kept[:-1]) // 2)
        return sizes, pairs.starts(begin[:-1] + 1, counts), begin[-1]

    return draw


def accepted_pairs(uniforms: np.ndarray) -> np.ndarray:
    """For each position but the last: does the pair that starts there lie in the unit circle?"""
    x = 2.0 * uniforms - 1.0
    squared_radius = x[:-1] ** 2 + x[1:] ** 2
    return (squared_radius < 1.0) & (squared_radius != 0.0)


def polar_normals(uniforms: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Two normals from each accepted pair that starts at a position in `first`, in the order numpy returns them."""
    x, y = 2.0 * uniforms[first] - 1.0, 2.0 * uniforms[first + 1] - 1.0
    squared_radius = x * x + y * y
    factor = np.sqrt(-2.0 * np.log(squared_radius) / squared_radius)
    return np.stack([factor * y, factor * x], axis=1).ravel()


class PairIndex:
    """Answers, for many positions of a stream at once, which pairs the polar method accepts from there on.

    From position p it looks at p, p + 2, p + 4, ...; so even and odd positions are two separate lists.
    """

    def __init__(self, uniforms: np.ndarray):
        accepted = np.append(accepted_pairs(uniforms), False)
        starts = [parity + 2 * accepted[parity::2].nonzero()[0] for parity in (0, 1)]
        self._end = len(uniforms)
        self._starts = np.concatenate([starts[0], [self._end], starts[1], [self._end]])
        self._last = np.array([len(starts[0]), len(starts[0]) + 1 + len(starts[1])])  # rank of each list's end mark
        # The rank in its list of the first accepted pair at or after each position.
        self._rank = np.empty(len(uniforms) + 2, dtype=np.int64)
        for parity, offset in ((0, 0), (1, len(starts[0]) + 1)):
            before = np.cumsum(accepted[parity::2]) - accepted[parity::2]
            self._rank[parity::2] = self._last[parity]
            self._rank[parity : len(uniforms) : 2] = offset + before

    def after(self, position: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Where the stream stands when `count` pairs have been accepted from `position` on; past its end if it is
        too short."""
        last = np.minimum(self._rank[position] + count - 1, self._last[position % 2])
        return np.where(count > 0, self._starts[last] + 2, position)

    def starts(self, position: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Where the pairs start that `counts[i]` acceptances from `position[i]` on take, one after the other."""
        return self._starts[ragged_positions(self._rank[position], counts)]
