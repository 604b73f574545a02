"""Batches of the Criteo data sets, from preprocessed files: those of `criteo_preprocess.py`, or of the public scripts.

Whatever the file, a sample is a row of 40 int32: label, 13 dense features, 26 category ids, one lookup for each table.
Rows are read when a batch needs them. The last day is for evaluation: its first half is the test set, the rest is for
validation; all days before are for training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from dlrm.batch import Batch, Share
from dlrm.data.criteo_manifest import Manifest
from dlrm.data.criteo_preprocess import PreprocessJob, matching_manifest, preprocess, preprocessed_folder
from dlrm.data.criteo_rows import DAYS, NPY_HEADER, NUM_DENSE, ROW, open_rows, write_rows
from dlrm.data.sample_order import Order, StoredOrder, make_order, order_settings
from dlrm.errors import RunError, UsageError
from dlrm.options import Options, flag
from dlrm.system.files import locked
from dlrm.system.memory import free_memory

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Samples:
    """The rows of each split of a data set, and the number of categories of each column."""

    splits: dict[str, Rows]
    counts: Sequence[int]
    shuffled: bool = False  # when the files were written
    settings: dict[str, object] = dataclasses.field(default_factory=dict)  # by flag, with which they were made


class Rows:
    """Rows `begin` to `end` of days that are taken as one; any number of threads may take them."""

    def __init__(self, days: Sequence, begin: int, end: int):
        self._days, self._begin, self._end = days, begin, end
        self._starts = np.cumsum([0, *map(len, days)])

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def day_sizes(self) -> list[int]:
        """Of whole days."""
        return [len(day) for day in self._days]

    def expect_random_reads(self) -> None:
        """Keeps the system from reading what is around a row, 128 KB of it: where memory has no room for all rows, that
        is gone before it is asked for."""
        for day in self._days:
            if isinstance(day, np.memmap):
                day.base.madvise(mmap.MADV_RANDOM)

    def take(self, places: np.ndarray) -> np.ndarray:
        """(n, 40) int32."""
        places = places + self._begin
        if len(self._days) == 1:
            return self._days[0][places]
        rows = np.empty((len(places), ROW), dtype=np.int32)
        day_of = np.searchsorted(self._starts, places, side="right") - 1
        for day in np.unique(day_of):
            mine = day_of == day
            rows[mine] = self._days[day][places[mine] - self._starts[day]]
        return rows


def split_days(days: Sequence) -> dict[str, Rows]:
    """Of all days, each an array of (n, 40) int32 or something that is read like one: the first half of an odd number
    is the larger one."""
    *training, last = days
    middle = -(-len(last) // 2)
    return {
        "train": Rows(training, 0, sum(map(len, training))),
        "test": Rows([last], 0, middle),
        "val": Rows([last], middle, len(last)),
    }


def training_order(options: Options, samples: Samples) -> Order:
    """The same in each epoch. Makes the rows ready to be read in it."""
    if samples.shuffled:
        return StoredOrder()
    rows = samples.splits["train"]
    mixed = {"none": 0, "day": max(rows.day_sizes), "total": len(rows)}[options.data_randomize]
    if 4 * ROW * mixed > free_memory():
        rows.expect_random_reads()
    return make_order(options, rows.day_sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Files: our own, and those of the public scripts
# ---------------------------------------------------------------------------------------------------------------------


class NpzDay:
    """A day of the public script, which is decompressed as a whole."""

    def __init__(self, path: Path):
        self.path, self._length, self._lock = path, npz_length(path), threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places) -> np.ndarray:
        with self._lock:  # one thread reads, and the others find what it has read
            rows = read_npz(self.path)
        return rows[places]


@lru_cache(maxsize=2)  # a day of training and a day of tests
def read_npz(path: Path) -> np.ndarray:
    """The rows of a file with arrays X_int (n, 13), X_cat (n, 26) and y (n,), of any types."""
    with open_npz(path, "X_int", "X_cat", "y") as arrays:
        rows = np.empty((len(arrays["y"]), ROW), dtype=np.int32)
        rows[:, 0], rows[:, 1 : 1 + NUM_DENSE], rows[:, 1 + NUM_DENSE :] = arrays["y"], arrays["X_int"], arrays["X_cat"]
    return rows


def open_npz(path: Path, *names: str):
    """RunError says that there is no such file, or that it lacks an array."""
    try:
        arrays = np.load(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: not a readable .npz file: {error}") from None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise RunError(f"{path}: there is no array {missing[0]} in it")
    return arrays


def npz_length(path: Path) -> int:
    """Of array y, from its header."""
    with open_npz(path, "y") as arrays, arrays.zip.open("y.npy") as file:
        np.lib.format.read_magic(file)
        return np.lib.format.read_array_header_1_0(file)[0][0]


def beside(options: Options, name: str) -> Path:
    """A file that the public script writes next to the raw data: `day_count.npz` -> `train_day_count.npz`."""
    raw = Path(options.raw_data_file)
    if options.raw_data_file:
        stem = raw.name.split(".")[0] if options.data_set == "kaggle" else raw.name
        return raw.with_name(f"{stem}_{name}")
    stem = {"kaggle": "train", "terabyte": "day"}[options.data_set]
    return Path(options.processed_data_file).with_name(f"{stem}_{name}")


def npz_counts(path: Path) -> list[int]:
    with open_npz(path, "counts") as arrays:
        return arrays["counts"].tolist()


def processed_npz(options: Options) -> Samples:
    """The one file of the public script's *_processed.npz."""
    path = Path(options.processed_data_file)
    rows, counts = NpzDay(path), npz_counts(path)
    lines, number = beside(options, "day_count.npz"), DAYS[options.data_set]
    if lines.is_file():
        with open_npz(lines, "total_per_file") as arrays:
            sizes = arrays["total_per_file"]
    elif options.data_set == "kaggle":  # equal parts, unless it was sub-sampled
        smaller, extra = divmod(len(rows), number)
        sizes = [smaller + (day < extra) for day in range(number)]
    else:
        raise RunError(f"{path}: {lines} is missing, which says where its days end")
    if len(sizes) != number or sum(sizes) != len(rows):
        raise RunError(f"{path} has {len(rows):,} samples, but {lines} has {sum(sizes):,} in {len(sizes)} days")
    days = [Stretch(rows, end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    return Samples(split_days(days), counts, settings={"--data-set": options.data_set})


class Stretch:
    """Rows `begin` to `end` of something."""

    def __init__(self, rows, begin: int, end: int):
        self._rows, self._begin, self._end = rows, int(begin), int(end)

    def __len__(self) -> int:
        return self._end - self._begin

    def __getitem__(self, places) -> np.ndarray:
        return self._rows[np.asarray(places) + self._begin]


def reordered_npz(options: Options) -> Samples:
    """The day files that the public script writes with --memory-map."""
    days = [NpzDay(path) for path in reordered_paths(options)]
    counts = npz_counts(beside(options, "fea_count.npz"))
    return Samples(split_days(days), counts, shuffled=True, settings={"--data-set": options.data_set})


def reordered_paths(options: Options) -> list[Path]:
    infix = "day_" if options.data_set == "kaggle" else ""
    return [beside(options, f"{infix}{day}_reordered.npz") for day in range(DAYS[options.data_set])]


def store(options: Options) -> Samples:
    """The folder that `criteo_preprocess.py` writes; preprocesses first if it is not there."""
    job = PreprocessJob.from_options(options)
    if options.raw_data_file and (not (job.folder / "manifest.json").is_file() or raw_is_there(options)):
        manifest = preprocess(job)
    else:  # nothing to preprocess from
        manifest = matching_manifest(job, Manifest(job.settings()))
        if manifest is None or not manifest.complete:
            raise UsageError(
                f"--processed-data-file: there is no complete preprocessed data set in {str(job.folder)!r}"
            )
    days = [open_rows(job.folder / f"day_{day}.npy", rows, NPY_HEADER) for day, rows in enumerate(manifest.rows)]
    return Samples(split_days(days), manifest.counts, settings=manifest.settings)


def raw_is_there(options: Options) -> bool:
    """Users delete the text when it has been preprocessed."""
    raw = Path(options.raw_data_file)
    return any(raw.with_name(raw.name + suffix).is_file() for suffix in ("", ".gz", "_0", "_0.gz"))


def open_samples(options: Options) -> Samples:
    """The data set that the flags name; preprocesses if need be."""
    if options.mlperf_bin_loader:
        return binaries(options)
    if options.memory_map and all(path.is_file() for path in reordered_paths(options)):
        return reordered_npz(options)
    if Path(options.processed_data_file).is_file() and options.processed_data_file.endswith(".npz"):
        return processed_npz(options)
    return store(options)


# ---------------------------------------------------------------------------------------------------------------------
# MLPerf's binary format: nothing but rows
# ---------------------------------------------------------------------------------------------------------------------


ROWS_PER_BLOCK = 2**14  # rows that are read at a time
READERS = 16  # threads; they wait for the disk, not for a core


def binaries(options: Options) -> Samples:
    """`*_train.bin` and `*_test.bin`, which are written first if one of them is missing, with `*_val.bin`."""
    stem = preprocessed_folder(options)
    paths = {split: stem.with_name(f"{stem.name}_{split}.bin") for split in ("train", "test")}
    check_binaries(options, paths.values(), stem)  # those of another data set are not written over
    if not all(path.is_file() for path in paths.values()):
        samples = open_samples(dataclasses.replace(options, mlperf_bin_loader=False))
        with locked(stem.parent):
            if not all(path.is_file() for path in paths.values()):
                write_binaries(options, samples, stem)
        check_binaries(options, paths.values(), stem)  # as another process may have written them
    days = {split: open_rows(path, path.stat().st_size // (4 * ROW)) for split, path in paths.items()}
    rows = {split: Rows([day], 0, len(day)) for split, day in days.items()}
    return Samples(rows, binary_counts(options, stem), shuffled=True)


def check_binaries(options: Options, paths: Iterable[Path], stem: Path) -> None:
    """RunError if these options would write other files than are there. MLPerf's own do not say how they were made."""
    made, store_manifest = Manifest.read(stem.parent, f"{stem.name}_bin.json"), stem / "manifest.json"
    found, all_files = list(filter(Path.is_file, paths)), stem.with_name(f"{stem.name}_*.bin")
    if made and found:
        made.check_matches(
            Manifest(PreprocessJob.from_options(options).settings() | order_settings(options)), all_files
        )
    for path in found:
        if store_manifest.is_file() and store_manifest.stat().st_mtime_ns > path.stat().st_mtime_ns:
            raise RunError(f"{all_files} is stale: {stem} has been made since. Delete it")
        size = path.stat().st_size
        if size % (4 * ROW):
            raise RunError(f"{path}: {size:,} bytes are not a whole number of rows of {4 * ROW} bytes")


def binary_counts(options: Options, stem: Path) -> Sequence[int]:
    """Of the data set that the files are made from."""
    found = Manifest.read(stem)
    if found is not None:
        return found.counts
    beside_raw, processed = beside(options, "fea_count.npz"), Path(options.processed_data_file)
    return npz_counts(beside_raw if beside_raw.is_file() or not processed.is_file() else processed)


def write_binaries(options: Options, samples: Samples, stem: Path) -> None:
    """The training file is shuffled as --data-randomize says, since its reader shuffles batches at most."""
    settings = samples.settings if samples.shuffled else samples.settings | order_settings(options)
    Manifest(settings).write(stem.parent, f"{stem.name}_bin.json")
    for split, rows in samples.splits.items():
        order = training_order(options, samples) if split == "train" else StoredOrder()
        make = partial(ordered_block, rows, order)
        write_rows(
            stem.with_name(f"{stem.name}_{split}.bin"), ahead(make, range(0, len(rows), ROWS_PER_BLOCK), READERS)
        )


def ordered_block(rows: Rows, order: Order, start: int) -> np.ndarray:
    return rows.take(order.samples_at(start, min(start + ROWS_PER_BLOCK, len(rows))))


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class CriteoData:
    """The training split, in full batches, or the test split, whose last batch may be smaller.

    Epochs repeat, as in the public script.
    """

    is_stored_by_sample = True  # a row holds the lookups of a sample in all tables
    num_dense_features = NUM_DENSE
    max_lookups_per_bag = 1

    def __init__(self, options: Options, samples: Samples, test: bool = False):
        self.options, self._rows = options, samples.splits["test" if test else "train"]
        self._order = StoredOrder() if test else training_order(options, samples)
        self.table_rows = table_rows(samples.counts, options)
        self.batch_size = options.test_batch_size if test else options.mini_batch_size
        own_workers = test and options.test_num_workers >= 0
        self._workers = options.test_num_workers if own_workers else options.num_workers
        self.samples = len(self._rows) if test else options.batches_per_epoch * options.mini_batch_size
        self._batch_order = None
        if options.mlperf_bin_loader and options.mlperf_bin_shuffle and not test:
            self._batch_order = np.random.RandomState(options.numpy_rand_seed).permutation(len(self))

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, first: int = 0, width: int = 1, share: Share | None = None) -> Iterator[Batch]:
        """Yields the batches of an epoch, see `Data.batches`. The rows of other samples are not read."""
        share = share or Share(slice(None), list(range(len(self.table_rows))))
        make = partial(self.batch, width=width, share=share)
        return ahead(make, range(first, len(self), width), self._workers)

    def batch(self, first: int, width: int, share: Share) -> Batch:
        places = [self._places(number) for number in range(first, min(first + width, len(self)))]
        rows = torch.from_numpy(self._rows.take(np.concatenate(places)[share.samples]))
        ids = rows[:, 1 + NUM_DENSE :].T[share.tables].contiguous()
        if self.options.max_ind_range > 0:
            ids %= self.options.max_ind_range
        return Batch(
            dense=torch.log(rows[:, 1 : 1 + NUM_DENSE].to(torch.float32) + 1),
            indices=list(ids),
            offsets=torch.arange(len(rows) + 1).expand(len(ids), -1),
            target=rows[:, :1].to(torch.float32),
        )

    def _places(self, number: int) -> np.ndarray:
        """Of a batch's samples among the rows."""
        if self._batch_order is not None:
            number = self._batch_order[number]
        begin, end = number * self.batch_size, min((number + 1) * self.batch_size, self.samples)
        return self._order.samples_at(begin, end)


def table_rows(counts: Sequence[int], options: Options) -> tuple[int, ...]:
    limit = options.max_ind_range if options.max_ind_range > 0 else max(counts)
    return tuple(min(count, limit) for count in counts)


def ahead(make: Callable[[int], T], numbers: range, workers: int) -> Iterator[T]:
    """`make` of each number, in order; `workers` threads work on the next ones."""
    if not workers:
        yield from map(make, numbers)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        waiting = deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# The whole of it
# ---------------------------------------------------------------------------------------------------------------------


class CriteoDataSet:
    """A data set whose files are opened, and compared with what they were made from, once for all that it gives."""

    def __init__(self, options: Options):
        """Preprocesses if need be. UsageError if there is too little to train or to test with."""
        if options.arch_mlp_bot[0] != NUM_DENSE:
            raise UsageError(
                f"--arch-mlp-bot starts with {options.arch_mlp_bot[0]}, but must start with {NUM_DENSE}, the dense "
                f"features of --data-set={options.data_set}"
            )
        self._samples = open_samples(options)
        training = len(self._samples.splits["train"])
        self.options = dataclasses.replace(
            options,
            arch_embedding_size=table_rows(self._samples.counts, options),
            data_size=training,
            num_indices_per_lookup=1,
        )
        split = f"the data set's training split of {training:,} samples"
        self.options.check_fills_a_step(split, "give a smaller --mini-batch-size")
        self._check_tests()

    def _check_tests(self) -> None:
        """UsageError if tests are asked for and there is nothing to test with."""
        asks = "--inference-only" if self.options.inference_only else f"--test-freq={self.options.test_freq}"
        if (self.options.inference_only or self.options.test_freq > 0) and not len(self._samples.splits["test"]):
            raise UsageError(f"{asks} needs test samples, but the data set has none: its last day is empty")

    def training_data(self) -> CriteoData:
        return CriteoData(self.options, self._samples)

    def test_data(self) -> CriteoData:
        return CriteoData(self.options, self._samples, test=True)

    def fingerprint(self) -> dict[str, str]:
        """Returns the sizes of the files that the flags name, and a checksum of the preprocessed data."""
        prints = {}
        for name in ("raw_data_file", "processed_data_file"):
            path = Path(getattr(self.options, name))
            if path.is_file():
                prints[f"the size of {flag(name)}"] = str(path.stat().st_size)
        manifest = preprocessed_folder(self.options) / "manifest.json"  # with the checksums of what was preprocessed
        if manifest.is_file():
            prints["the preprocessed data"] = hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
        return prints
