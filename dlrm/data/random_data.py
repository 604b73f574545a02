"""Random data: for the same seed, the same numbers as in the reference script.

The reference script loops over samples in Python and asks numpy's legacy generator (MT19937) for each number. Here the
C++ op `dlrm::draw_random_batch` draws the same numbers. Where that op cannot be built, numpy computes all lookups in a
table at once from a block of the same stream of uniforms. As the position in the stream at which a bag begins depends
on the bags before it, a walk along the stream finds these positions first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dlrm.batch import Batch, Share, batch_sizes, joined
from dlrm.data.trace import trace_draw_function, trace_tensors, warn_of_large_rows
from dlrm.data.uniform_stream import DrawLookups, UniformStream, bag_sizes
from dlrm.kernels import ops  # noqa: F401 - registers dlrm::draw_random_batch
from dlrm.kernels.native import load_kernels
from dlrm.options import Options


class RandomDataSet:
    """The `DataSet` of random data, whose lookups may repeat as those of a trace do."""

    def __init__(self, options: Options):
        """Prints a warning for each table that has fewer rows than its trace."""
        if options.data_generation == "synthetic":
            warn_of_large_rows(options)
        self.options = options

    def training_data(self) -> RandomData:
        """Returns the training samples."""
        return RandomData(self.options)

    def test_data(self) -> RandomData:
        """Returns the test samples."""
        return RandomData(self.options, test=True)

    def weight_generator(self) -> np.random.RandomState:
        """Returns the generator of the weights. Random data is drawn from others."""
        return np.random.RandomState(self.options.numpy_rand_seed)

    def fingerprint(self) -> dict[str, str]:
        """Returns the size of `--data-trace-file` if it names one file for all tables. All else follows from the
        flags."""
        path = Path(self.options.data_trace_file)
        return {"the size of --data-trace-file": str(path.stat().st_size)} if path.is_file() else {}


class RandomData:
    """Random dense features, lookups and targets, as `Data` has them.

    Each epoch starts again at the seed, so that all epochs have the same batches, as in the reference script. Test data
    are a stream of their own, with as many samples as an epoch of training. Their last batch may be smaller.
    """

    is_stored_by_sample = False  # the lookups of all samples in a table are drawn without reading anything

    def __init__(self, options: Options, test: bool = False):
        self.options, self.samples = options, options.samples_per_epoch
        self.seed = (options.numpy_rand_seed + test) % 2**32
        self.batch_size = options.test_batch_size if test else options.mini_batch_size
        self.num_dense_features = options.arch_mlp_bot[0]
        self.table_rows: Sequence[int] = options.arch_embedding_size
        self.max_lookups_per_bag: Sequence[int] = options.lookups_per_bag
        self.stored_lookups_per_bag = self.max_lookups_per_bag

    def __len__(self) -> int:
        """Returns the number of batches per epoch."""
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of an epoch."""
        return self.batches()

    def batches(self, first: int = 0, width: int = 1, share: Share | None = None) -> Iterator[Batch]:
        """Yields the batches of an epoch, see `Data.batches`.

        Where a batch begins in the stream depends on all numbers before it, so the stream also moves on past the
        numbers that the share does not ask for. After a trace, each lookup in a table depends on those before it, so
        the lookups in the share's tables are drawn for the batches before `first`, too.
        """
        share = share or Share.whole(width * self.batch_size, len(self.table_rows))
        share_before_first = Share(slice(0, 0), share.tables if self.options.data_generation == "synthetic" else [])
        shares_of_joined = [share.in_batch_from(number * self.batch_size) for number in range(width)]
        shares = itertools.chain(itertools.repeat(share_before_first, first), itertools.cycle(shares_of_joined))
        drawn = self._drawn_by_kernel(shares) if load_kernels() == "native" else self._drawn_by_numpy(shares)
        return joined(itertools.islice(drawn, first, None), width)

    def whole_bags(self, tables: Sequence[int]) -> Callable[[Batch], Batch]:
        """Returns a function that returns a batch as it is, see `Data.whole_bags`."""
        return lambda batch: batch

    def _drawn_by_kernel(self, shares: Iterable[Share]) -> Iterator[Batch]:
        """Yields each batch of an epoch, cut down to its share, as `dlrm::draw_random_batch` draws it.

        The op only writes what is in the share. It does not hold Python's lock, so the training step can go on
        meanwhile.
        """
        options = self.options
        _, words, used_words, has_normal, normal = np.random.RandomState(self.seed).get_state()
        end_of_state = [used_words, has_normal, np.float64(normal).view(np.int64)]
        generator = torch.from_numpy(np.concatenate([words, end_of_state]).astype(np.int64))
        row_distribution = self._row_distribution()
        largest_bags = self.max_lookups_per_bag
        for size, (samples, tables) in zip(batch_sizes(self.samples, self.batch_size), shares, strict=False):
            share_samples = range(size)[samples]
            dense = torch.empty(len(share_samples), self.num_dense_features)
            target = torch.empty(len(share_samples), 1)
            room = [size * largest_bags[table] for table in tables]
            indices = torch.empty(sum(room), dtype=torch.int64)
            offsets = torch.empty(len(tables), size + 1, dtype=torch.int64)
            torch.ops.dlrm.draw_random_batch(
                generator, self.table_rows, largest_bags, options.num_indices_per_lookup_fixed, *row_distribution,
                share_samples.start, tables, dense, indices, offsets, target,
            )  # fmt: skip
            drawn = [part[:count] for part, count in zip(indices.split(room), offsets[:, -1].tolist(), strict=True)]
            yield Batch(dense, drawn, offsets, target.round() if options.round_targets else target)

    def _row_distribution(self) -> tuple[str, list[float], list[Tensor], list[Tensor]]:
        """Returns the distribution of rows as `dlrm::draw_random_batch` takes it: its name, its parameters and, after
        a trace, the state and the profile of each table."""
        options = self.options
        if options.data_generation == "synthetic":
            return "trace", [float(options.data_trace_enable_padding)], *trace_tensors(options)
        parameters = {"uniform": (), "gaussian": gaussian_parameters(options), "zipf": (options.rand_data_alpha,)}
        return options.rand_data_dist, list(parameters[options.rand_data_dist]), [], []

    def _drawn_by_numpy(self, shares: Iterable[Share]) -> Iterator[Batch]:
        """Yields each batch of an epoch, cut down to its share. Equals `_drawn_by_kernel`, but draws whole batches."""
        stream = UniformStream(self.seed)
        draw_lookups = self._draw_function(stream)
        for size, share in zip(batch_sizes(self.samples, self.batch_size), shares, strict=False):
            dense = stream.take(size * self.num_dense_features).reshape(size, -1)
            tables = zip(self.table_rows, self.max_lookups_per_bag, strict=True)
            lookups = [draw_lookups(rows, largest_bag, size) for rows, largest_bag in tables]
            target = stream.take(size).astype(np.float32).reshape(-1, 1)
            whole = Batch(
                dense=torch.from_numpy(dense.astype(np.float32)),
                indices=[torch.from_numpy(indices) for indices, _ in lookups],
                offsets=torch.from_numpy(np.stack([_offsets(lengths) for _, lengths in lookups])),
                target=torch.from_numpy(np.rint(target) if self.options.round_targets else target),
            )
            yield share.cut_from(whole)

    def _draw_function(self, stream: UniformStream) -> DrawLookups:
        functions = {
            "uniform": uniform_draw_function, "gaussian": gaussian_draw_function, "zipf": zipf_draw_function
        }  # fmt: skip
        after_trace = self.options.data_generation == "synthetic"
        make_function = trace_draw_function if after_trace else functions[self.options.rand_data_dist]
        return make_function(stream, self.options)


def gaussian_parameters(options: Options) -> tuple[float, float, float, float]:
    """Returns the lowest and the highest row, the mean and the standard deviation of gaussian lookups."""
    low, high, mean = options.rand_data_min, options.rand_data_max, options.rand_data_mu
    return low, high, (low + high) / 2 if mean == -1 else mean, options.rand_data_sigma


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Returns where each bag starts, and where the last one ends: (bags + 1,) int64."""
    return np.concatenate([[0], np.cumsum(lengths)])


# ---------------------------------------------------------------------------------------------------------------------
# Walks along the stream of uniforms
# ---------------------------------------------------------------------------------------------------------------------


def walk(successor: np.ndarray, start: int, steps: int) -> np.ndarray:
    """Returns `steps` entries of `[start, successor[start], successor[successor[start]], ...]`.

    Pointer doubling: when the first k entries are known, and `successor` holds where k steps lead from each position,
    the next k entries are one gather, and `successor` composed with itself holds where 2k steps lead.
    """
    visited = np.array([start])
    while len(visited) < steps:
        visited = np.concatenate([visited, successor.take(visited)])
        successor = successor.take(successor)
    return visited[:steps]


def ragged_positions(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns `[begins[0], begins[0] + 1, ..., begins[1], begins[1] + 1, ...]`, with `lengths[i]` consecutive numbers
    from `begins[i]` on."""
    starts_in_output = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(begins - starts_in_output, lengths)


def unique_in_bags(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts each bag and drops repeated values. Returns the remaining ones, truncated to int64, and their number in
    each bag."""
    matrix = np.full((len(lengths), lengths.max()), np.inf)
    matrix[np.arange(lengths.max()) < lengths[:, None]] = values
    matrix.sort(axis=1)
    stays = matrix < np.inf
    stays[:, 1:] &= matrix[:, 1:] != matrix[:, :-1]
    return matrix[stays].astype(np.int64), stays.sum(axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Distributions of rows
# ---------------------------------------------------------------------------------------------------------------------


def zipf_draw_function(stream: UniformStream, options: Options) -> DrawLookups:
    """Returns a function that looks up row r in proportion to the integral of x ** -alpha from r + 1 to r + 2.

    For a uniform u, the row is `floor(x) - 1`, where the integral from 1 to x is u times that from 1 to rows + 1. Sizes
    of bags are those of `uniform_draw_function`.
    """
    exponent = 1 - options.rand_data_alpha

    def rows_of(uniforms: np.ndarray, rows: int) -> np.ndarray:
        if abs(exponent) < 1e-9:
            x = np.exp(uniforms * np.log(rows + 1))
        else:
            x = (1 + uniforms * ((rows + 1) ** exponent - 1)) ** (1 / exponent)
        return np.clip(np.floor(x) - 1, 0, rows - 1)

    return uniform_draw_function(stream, options, rows_of)


def evenly(uniforms: np.ndarray, rows: int) -> np.ndarray:
    """Returns row `rint(u * (rows - 1))` of a table for each uniform u."""
    return np.rint(uniforms * (rows - 1))


def uniform_draw_function(stream: UniformStream, options: Options, rows_of=evenly) -> DrawLookups:
    """Returns a function that looks up the rows `rows_of(uniforms, rows of the table)`. Equal rows of a bag count once.

    A bag takes one uniform for its size, unless the size is fixed, and then one per lookup.
    """

    def draw(rows: int, largest_bag: int, bags: int) -> tuple[np.ndarray, np.ndarray]:
        if options.num_indices_per_lookup_fixed:
            sizes = np.full(bags, largest_bag)
            uniforms = stream.take(sizes.sum())
        else:
            sizes, uniforms = draw_bags(min(rows, largest_bag), bags)
        return unique_in_bags(rows_of(uniforms, rows), sizes)

    def draw_bags(largest: int, bags: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the size of each bag, and one uniform per lookup."""
        if largest == 1:  # every bag takes two uniforms, whatever the first one is
            return np.ones(bags, dtype=np.int64), stream.take(2 * bags)[1::2]
        ahead = stream.peek(bags * (1 + largest))
        size_at = bag_sizes(ahead, largest)  # the size of a bag that begins at each position of the stream
        begins = walk(np.minimum(np.arange(len(ahead)) + 1 + size_at, len(ahead) - 1), 0, bags)
        sizes = size_at[begins]
        used = stream.take(begins[-1] + 1 + sizes[-1])
        return sizes, used[ragged_positions(begins + 1, sizes)]

    return draw


def gaussian_draw_function(stream: UniformStream, options: Options) -> DrawLookups:
    """Returns a function that looks up row `trunc(clip(normal))`. Equal normals of a bag count once.

    The normals are those of numpy's legacy generator, which uses the polar method of Marsaglia and Bray (1964): it
    draws pairs of uniforms until one lies in the unit circle, returns one normal, and keeps a second one for the next
    call, in the next bag or table. So a bag begins at a position of the stream, with or without a kept normal.
    """
    low, high, mean, deviation = gaussian_parameters(options)
    kept: list[float] = []  # the second normal of the last pair, until it is used

    def draw(rows: int, largest_bag: int, bags: int) -> tuple[np.ndarray, np.ndarray]:
        if options.num_indices_per_lookup_fixed:
            sizes = np.full(bags, largest_bag)
            normals = draw_normals(sizes.sum())
        else:
            sizes, normals = draw_bags(min(rows, largest_bag), bags)
        return unique_in_bags(np.clip(mean + deviation * normals, low, high), sizes)

    def draw_normals(count: int) -> np.ndarray:
        pairs = -(-(count - len(kept)) // 2)
        length = 2 * pairs
        while len(accepted := accepted_pairs(stream.peek(length))[::2].nonzero()[0] * 2) < pairs:
            length += length // 2 + 8
        pair_starts = accepted[:pairs]
        uniforms = stream.take(pair_starts[-1] + 2 if pairs else 0)
        normals = np.concatenate([kept, polar_normals(uniforms, pair_starts)])
        kept[:] = normals[count:]
        return normals[:count]

    def draw_bags(largest: int, bags: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the size of each bag, and one normal per lookup."""
        length = bags * (1 + largest) * 3 // 2 + 64
        while (found := find_bags(stream.peek(length), largest, bags)) is None:
            length += length // 2
        sizes, pair_starts, end = found
        normals = np.concatenate([kept, polar_normals(stream.take(end), pair_starts)])
        kept[:] = normals[sizes.sum() :]
        return sizes, normals[: sizes.sum()]

    def find_bags(ahead: np.ndarray, largest: int, bags: int) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Returns the sizes of the bags, where the pairs that they accept start, and where the next bag begins. Returns
        None if `ahead` is too short. A state of the walk is 2 * position + (1 if a normal is kept)."""
        size_at = bag_sizes(ahead, largest)
        pairs = PairIndex(ahead)
        state = np.arange(2 * len(ahead))
        position, has_kept = state // 2, state % 2
        missing = size_at[position] - has_kept
        after = pairs.position_after(position + 1, -(-missing // 2))
        visited = walk(np.where(after < len(ahead), 2 * after + missing % 2, state), len(kept), bags + 1)
        begins, has_kept = visited // 2, visited % 2
        if (np.diff(begins) == 0).any():
            return None
        sizes = size_at[begins[:-1]]
        pairs_of_bags = -(-(sizes - has_kept[:-1]) // 2)
        return sizes, pairs.accepted_from(begins[:-1] + 1, pairs_of_bags), begins[-1]

    return draw


def accepted_pairs(uniforms: np.ndarray) -> np.ndarray:
    """Returns whether the pair that starts at each position but the last lies in the unit circle."""
    x = 2.0 * uniforms - 1.0
    squared_radius = x[:-1] ** 2 + x[1:] ** 2
    return (squared_radius < 1.0) & (squared_radius != 0.0)


def polar_normals(uniforms: np.ndarray, pair_starts: np.ndarray) -> np.ndarray:
    """Returns two normals for each pair of uniforms that starts at one of the positions, in the order of numpy."""
    x, y = 2.0 * uniforms[pair_starts] - 1.0, 2.0 * uniforms[pair_starts + 1] - 1.0
    squared_radius = x * x + y * y
    factor = np.sqrt(-2.0 * np.log(squared_radius) / squared_radius)
    return np.stack([factor * y, factor * x], axis=1).ravel()


class PairIndex:
    """Finds which pairs the polar method accepts from given positions of a stream on, for many positions at once.

    From position p the method looks at the pairs at p, p + 2, p + 4, ..., so even and odd positions are two lists.
    """

    def __init__(self, uniforms: np.ndarray):
        accepted = np.append(accepted_pairs(uniforms), False)
        even, odd = (parity + 2 * accepted[parity::2].nonzero()[0] for parity in (0, 1))
        end = len(uniforms)
        self._pair_starts = np.concatenate([even, [end], odd, [end]])  # of both lists, with an end mark behind each
        self._end_marks = np.array([len(even), len(even) + 1 + len(odd)])  # where they are in `_pair_starts`
        # For each position, the index in `_pair_starts` of the first pair that is accepted from there on.
        self._next_pair = np.empty(end + 2, dtype=np.int64)
        for parity, begin_of_list in ((0, 0), (1, len(even) + 1)):
            accepted_before = np.cumsum(accepted[parity::2]) - accepted[parity::2]
            self._next_pair[parity::2] = self._end_marks[parity]
            self._next_pair[parity:end:2] = begin_of_list + accepted_before

    def position_after(self, position: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Returns the position behind the `count[i]`-th pair that is accepted from `position[i]` on. It is past the end
        of the stream if there are fewer."""
        last_pair = np.minimum(self._next_pair[position] + count - 1, self._end_marks[position % 2])
        return np.where(count > 0, self._pair_starts[last_pair] + 2, position)

    def accepted_from(self, position: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Returns where the first `count[i]` pairs start that are accepted from `position[i]` on, for all i one after
        the other."""
        return self._pair_starts[ragged_positions(self._next_pair[position], count)]
