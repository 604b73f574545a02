"""The stored files of the Criteo data sets: which ones the flags name, and the rows of each split in them.

There are five kinds: the preprocessed folder of `criteo_preprocess.py`, MLPerf's binary files, two kinds of .npz files
of the reference script, and files of whole bags (`bag_files.py`). All of them hold rows (see `criteo_rows.py`), which
are read when a batch needs them. The last day is for evaluation: its first half is the test set, and the rest is for
validation. All days before it are for training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from dlrm.data.arrays import NpzFile
from dlrm.data.bag_files import HugectrRows, MlperfDay, path_of
from dlrm.data.criteo_manifest import MANIFEST_NAME, Manifest, binary_manifest_name, check_binary_sizes
from dlrm.data.criteo_preprocess import PreprocessJob, matching_manifest, preprocess, preprocessed_folder
from dlrm.data.criteo_rows import (
    DAYS,
    NUM_DENSE,
    NUM_SPARSE,
    ROW,
    ROW_BYTES,
    SPLITS,
    RowFile,
    StoredRows,
    binary_path,
    check_rows,
    day_path,
    write_rows,
)
from dlrm.data.sample_order import Order, StoredOrder, make_order, order_settings
from dlrm.errors import RunError, UsageError
from dlrm.options import Options
from dlrm.system.files import locked, name_without_endings, reason_of
from dlrm.system.memory import free_memory

Result = TypeVar("Result")


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


class SplitRows:
    """The rows of a split: rows `begin` to `end` of one or more days. Any number of threads may read them at once."""

    def __init__(self, days: Sequence[StoredRows], begin: int, end: int):
        """All days have rows of the same form."""
        self._days, self._begin, self._end = days, begin, end
        self.width, self.dense_type, self.lookups_per_bag = days[0].width, days[0].dense_type, days[0].lookups_per_bag
        self._day_starts = np.cumsum([0, *map(len, days)])

    def __len__(self) -> int:
        """Returns the number of rows in the split."""
        return self._end - self._begin

    @property
    def day_sizes(self) -> list[int]:
        """The number of rows in each day, those outside the split included."""
        return [len(day) for day in self._days]

    def expect_random_reads(self) -> None:
        """Keeps the system from reading 128 KB around each row. If memory has no room for all rows, what is read around
        a row is gone before a batch needs it."""
        for day in self._days:
            day.expect_random_reads()

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Returns the rows at positions that count from 0 in the split, (n, width) int32. Raises RunError, which names
        the file and the row, if a label or a dense feature is not possible."""
        positions = positions + self._begin
        day_of_position = np.searchsorted(self._day_starts, positions, side="right") - 1
        in_day = positions - self._day_starts[day_of_position]
        if len(self._days) == 1:
            rows = self._days[0][positions]
        else:
            rows = np.empty((len(positions), self.width), dtype=np.int32)
            for day in np.unique(day_of_position):
                rows[day_of_position == day] = self._days[day][in_day[day_of_position == day]]
        check_rows(rows, self.dense_type, lambda row: self._days[day_of_position[row]].place(in_day[row]))
        return rows


def split_days(days: Sequence[StoredRows]) -> dict[str, SplitRows]:
    """Returns the rows of the splits train, test and val. If the last day has an odd number of rows, the test set gets
    the one more."""
    *training_days, last_day = days
    middle = -(-len(last_day) // 2)
    return {
        "train": SplitRows(training_days, 0, sum(map(len, training_days))),
        "test": SplitRows([last_day], 0, middle),
        "val": SplitRows([last_day], middle, len(last_day)),
    }


@dataclasses.dataclass
class StoredDataSet:
    """The rows of each split, by the name of the split, and what else is known about the files."""

    splits: dict[str, SplitRows]
    category_counts: Sequence[int]  # of each column
    shuffled: bool = False  # whether the training rows were shuffled when the files were written
    settings: dict[str, object] = dataclasses.field(default_factory=dict)  # the value of each flag they depend on


def training_order(options: Options, stored: StoredDataSet) -> Order:
    """Returns the order of the training rows in each epoch, and makes the rows ready to be read in that order."""
    if stored.shuffled:
        return StoredOrder()
    rows = stored.splits["train"]
    rows_in_random_order = {"none": 0, "day": max(rows.day_sizes), "total": len(rows)}[options.data_randomize]
    if 4 * rows.width * rows_in_random_order > free_memory():
        rows.expect_random_reads()
    return make_order(options, rows.day_sizes)


def open_stored_data_set(options: Options) -> StoredDataSet:
    """Opens the files that the flags name, and first preprocesses or writes them if need be.

    Raises UsageError if there is nothing to open, and RunError if files are damaged, or were made from other data or
    with other flags.
    """
    if options.mlperf_bin_loader:
        return open_binaries(options)
    if options.processed_data_file and (stored := open_bags(options, Path(options.processed_data_file))):
        return stored
    if options.memory_map and all(path.is_file() for path in reordered_paths(options)):
        return open_reordered_npz(options)
    if Path(options.processed_data_file).is_file() and options.processed_data_file.endswith(".npz"):
        return open_processed_npz(options)
    return open_preprocessed_folder(options)


# ---------------------------------------------------------------------------------------------------------------------
# Files whose bags are stored
# ---------------------------------------------------------------------------------------------------------------------


def open_bags(options: Options, folder: Path) -> StoredDataSet | None:
    """Opens the files of MLPerf's DLRM-dcnv2, or HugeCTR's, in a folder; returns None if neither are there."""
    if (folder / "train_data.bin").is_file():
        test_path = next((path for name in ("val", "test") if (path := folder / f"{name}_data.bin").is_file()), None)
        if test_path is None:
            raise UsageError(f"--processed-data-file: {folder} has no val_data.bin or test_data.bin")
        sizes = per_table(options.multi_hot_sizes)
        train, test = (HugectrRows(path, sizes) for path in (folder / "train_data.bin", test_path))
        splits = {"train": SplitRows([train], 0, len(train)), "test": SplitRows([test], 0, len(test))}
    elif path_of(folder, 0, "dense.npy").is_file():
        multi_hot = path_of(folder, 0, "sparse_multi_hot.npz").is_file()
        days = [MlperfDay(folder, day, multi_hot) for day in range(DAYS[options.data_set])]
        check_bags_are_alike(days)
        splits = split_days(days)
    else:
        return None
    if len(options.arch_embedding_size) != NUM_SPARSE:
        raise UsageError(
            f"--arch-embedding-size: give the rows of each of the {NUM_SPARSE} tables, which the files in {folder} do "
            "not say"
        )
    return StoredDataSet(splits, options.arch_embedding_size)


def check_bags_are_alike(days: Sequence[MlperfDay]) -> None:
    """Raises RunError if a day has bags of other lengths than the first."""
    first, *others = ["-".join(map(str, day.lookups_per_bag)) for day in days]
    for day, bags in zip(days[1:], others, strict=True):
        if bags != first:
            raise RunError(f"{day.files}: bags of {bags} in one day, but {first} in {days[0].files}")


def per_table(sizes: Sequence[int]) -> list[int]:
    """Returns one number per table, of one for all tables or of one for each."""
    return list(sizes) * (NUM_SPARSE // len(sizes))


# ---------------------------------------------------------------------------------------------------------------------
# The folder of criteo_preprocess.py
# ---------------------------------------------------------------------------------------------------------------------


def open_preprocessed_folder(options: Options) -> StoredDataSet:
    """Opens the preprocessed folder. Preprocesses the text first if there is text, but no complete folder."""
    job = PreprocessJob.from_options(options)
    if options.raw_data_file and (not (job.folder / MANIFEST_NAME).is_file() or text_is_there(options)):
        manifest = preprocess(job)
    else:  # there is no text
        manifest = matching_manifest(job, Manifest(job.settings()))
        if manifest is None or not manifest.complete:
            raise UsageError(
                f"--processed-data-file: there is no complete preprocessed data set in {str(job.folder)!r}"
            )
    days = [RowFile(day_path(job.folder, day), rows, npy=True) for day, rows in enumerate(manifest.rows)]
    return StoredDataSet(split_days(days), manifest.counts, settings=manifest.settings)


def text_is_there(options: Options) -> bool:
    """Returns whether there still is a text file. Users may delete the text when it has been preprocessed."""
    raw = Path(options.raw_data_file)
    return any(raw.with_name(raw.name + suffix).is_file() for suffix in ("", ".gz", "_0", "_0.gz"))


# ---------------------------------------------------------------------------------------------------------------------
# Files of the reference script
# ---------------------------------------------------------------------------------------------------------------------


def open_processed_npz(options: Options) -> StoredDataSet:
    """Opens the one file that the reference script calls *_processed.npz."""
    path = Path(options.processed_data_file)
    rows, category_counts = NpzRows(path), read_category_counts(path)
    day_counts, num_days = reference_file(options, "day_count.npz"), DAYS[options.data_set]
    if day_counts.is_file():
        sizes = read_whole_numbers(day_counts, "total_per_file", num_days, least=0)
    elif options.data_set == "kaggle":  # equal parts, unless it was sub-sampled
        smaller, extra = divmod(len(rows), num_days)
        sizes = [smaller + (day < extra) for day in range(num_days)]
    else:
        raise RunError(f"{path}: {day_counts} is missing, which says where its days end")
    if sum(sizes) != len(rows):
        raise RunError(f"{path} has {len(rows):,} samples, but {day_counts} has {sum(sizes):,}")
    days = [RowRange(rows, end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    return StoredDataSet(split_days(days), category_counts, settings={"--data-set": options.data_set})


def open_reordered_npz(options: Options) -> StoredDataSet:
    """Opens the day files that the reference script writes with --memory-map."""
    days = [NpzRows(path) for path in reordered_paths(options)]
    category_counts = read_category_counts(reference_file(options, "fea_count.npz"))
    return StoredDataSet(split_days(days), category_counts, shuffled=True, settings={"--data-set": options.data_set})


def reordered_paths(options: Options) -> list[Path]:
    """Returns the paths of the day files that the reference script writes with --memory-map."""
    infix = "day_" if options.data_set == "kaggle" else ""
    return [reference_file(options, f"{infix}{day}_reordered.npz") for day in range(DAYS[options.data_set])]


def reference_file(options: Options, name: str) -> Path:
    """Returns the path of a file that the reference script writes next to the raw data, or else of one next to the
    processed data: `day_count.npz` -> `train_day_count.npz`."""
    raw = Path(options.raw_data_file)
    if options.raw_data_file:
        stem = name_without_endings(raw) if options.data_set == "kaggle" else raw.name
        return raw.with_name(f"{stem}_{name}")
    stem = {"kaggle": "train", "terabyte": "day"}[options.data_set]
    return Path(options.processed_data_file).with_name(f"{stem}_{name}")


class NpzRows(StoredRows):
    """The rows of a compressed file, which can only be read as a whole."""

    def __init__(self, path: Path):
        self.path, self._length, self._lock = path, npz_length(path), threading.Lock()

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self._length

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the rows at some positions, (n, 40) int32."""
        with self._lock:  # one thread reads the file, and the others find what it has read
            rows = read_npz_rows(self.path)
        return rows[positions]

    def place(self, position: int) -> str:
        """Returns the file and the number of a row, in words."""
        return f"{self.path}, row {position + 1:,}"


class RowRange(StoredRows):
    """Rows `begin` to `end` of a file."""

    def __init__(self, rows: StoredRows, begin: int, end: int):
        self._rows, self._begin, self._end = rows, int(begin), int(end)

    def __len__(self) -> int:
        """Returns the number of rows in the range."""
        return self._end - self._begin

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the rows at positions that count from 0 in the range, (n, 40) int32."""
        return self._rows[np.asarray(positions) + self._begin]

    def place(self, position: int) -> str:
        """Returns the file and the number of a row, in words."""
        return self._rows.place(self._begin + position)


@lru_cache(maxsize=2)  # a day of training and a day of tests
def read_npz_rows(path: Path) -> np.ndarray:
    """Reads a file with arrays X_int (n, 13), X_cat (n, 26) and y (n,) of any types. Returns rows, (n, 40) int32."""
    with open_npz(path) as arrays:
        labels, dense, sparse = arrays["y"], arrays["X_int"], arrays["X_cat"]
        shapes = labels.shape, dense.shape, sparse.shape
        samples = labels.size
        if shapes != ((samples,), (samples, NUM_DENSE), (samples, NUM_SPARSE)):
            raise ValueError(f"arrays y, X_int and X_cat have shapes {shapes}; expected (n,), (n, 13) and (n, 26)")
        rows = np.empty((samples, ROW), dtype=np.int32)
        rows[:, 0], rows[:, 1 : 1 + NUM_DENSE], rows[:, 1 + NUM_DENSE :] = labels, dense, sparse
    return rows


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """Yields the open file. Raises RunError, which names the file, whatever fails in the block."""
    try:
        with NpzFile(path) as arrays:
            yield arrays
    except Exception as error:  # for damaged files, numpy, zipfile and zlib raise errors of some ten types
        raise RunError(f"{path}: not a readable .npz file: {error}") from None


def npz_length(path: Path) -> int:
    """Returns the length of array y. Reads no more than its header."""
    with open_npz(path) as arrays:
        shape = arrays.header("y").shape
        if len(shape) != 1:
            raise ValueError(f"array y has shape {shape}; expected (n,)")
        return shape[0]


def read_category_counts(path: Path) -> list[int]:
    """Returns the number of categories of each column, which is array `counts`."""
    return read_whole_numbers(path, "counts", NUM_SPARSE, least=1)


def read_whole_numbers(path: Path, name: str, count: int, least: int) -> list[int]:
    """Returns the numbers in an array. Raises RunError if there are not `count` whole numbers of at least `least`."""
    with open_npz(path) as arrays:
        numbers = arrays[name]
        if numbers.shape != (count,) or numbers.dtype.kind not in "iu" or numbers.min() < least:
            raise ValueError(f"array {name}: expected {count} whole numbers of at least {least}")
        return numbers.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# MLPerf's binary files
# ---------------------------------------------------------------------------------------------------------------------


ROWS_PER_BLOCK = 2**14  # rows that a thread reads at a time when binary files are written
READERS = 16  # threads; they wait for the disk, not for a core


def open_binaries(options: Options) -> StoredDataSet:
    """Opens `*_train.bin` and `*_test.bin`. If files are missing, they and `*_val.bin` are written first."""
    stem = preprocessed_folder(options)
    if stem.suffix == ".bin":
        raise UsageError(f"--processed-data-file: expected the name of binary files without _train.bin, got {stem}")
    if open_bags(options, stem):
        raise UsageError(f"--mlperf-bin-loader reads other files than those in {stem}; leave the flag out")
    if binaries_are_complete(options, stem):
        category_counts = category_counts_of_source(options, stem)
    else:
        source = source_of_binaries(options, stem)
        category_counts = source.category_counts
        try:
            with locked(stem.parent):
                if not binaries_are_complete(options, stem):  # another process may have written them
                    write_binaries(options, source, stem)
        except OSError as error:
            reason = reason_of(error)
            raise RunError(f"cannot write {binary_path(stem, '*')}: {reason}; the next run writes all again") from error
    paths = {split: binary_path(stem, split) for split in ("train", "test")}
    days = {split: RowFile(path, path.stat().st_size // ROW_BYTES) for split, path in paths.items()}
    splits = {split: SplitRows([rows], 0, len(rows)) for split, rows in days.items()}
    return StoredDataSet(splits, category_counts, shuffled=True)


def binaries_are_complete(options: Options, stem: Path) -> bool:
    """Says whether all binary files are there. MLPerf's own have no manifest, and may lack the one for validation.

    Raises RunError if these flags would write other files than those that are there, or if one is cut off.
    """
    manifest, source_manifest = Manifest.read(stem.parent, binary_manifest_name(stem)), stem / MANIFEST_NAME
    paths = [binary_path(stem, split) for split in (SPLITS if manifest else ("train", "test"))]
    found, all_files = list(filter(Path.is_file, paths)), binary_path(stem, "*")
    if manifest and found:
        settings = PreprocessJob.from_options(options).settings() | order_settings(options)
        manifest.check_matches(Manifest(settings), all_files)
    for path in found:
        if source_manifest.is_file() and source_manifest.stat().st_mtime_ns > path.stat().st_mtime_ns:
            raise RunError(f"{all_files} is stale: {stem} has been made since. Delete it")
        size = path.stat().st_size
        if size % ROW_BYTES:
            raise RunError(f"{path}: {size:,} bytes are not a whole number of rows of {ROW_BYTES} bytes")
    if len(found) < len(paths):
        return False
    if manifest:
        check_binary_sizes(stem, manifest)
    return True


def source_of_binaries(options: Options, stem: Path) -> StoredDataSet:
    """Opens the data set that binary files are to be written from. Raises UsageError if there is none."""
    try:
        return open_stored_data_set(dataclasses.replace(options, mlperf_bin_loader=False))
    except UsageError as error:
        missing = next(path for split in SPLITS if not (path := binary_path(stem, split)).is_file())
        raise UsageError(f"--mlperf-bin-loader: {missing} is missing, and cannot be written: {error}") from None


def category_counts_of_source(options: Options, stem: Path) -> Sequence[int]:
    """Returns the number of categories of each column in the data set that the binary files were made from."""
    manifest = Manifest.read(stem)
    if manifest is not None:
        return manifest.counts
    counts_file, processed = reference_file(options, "fea_count.npz"), Path(options.processed_data_file)
    return read_category_counts(counts_file if counts_file.is_file() or not processed.is_file() else processed)


def write_binaries(options: Options, source: StoredDataSet, stem: Path) -> None:
    """Writes one binary file per split. The training file is shuffled as --data-randomize says, since its reader can
    only shuffle whole batches."""
    settings = source.settings if source.shuffled else source.settings | order_settings(options)
    manifest, name = Manifest(settings), binary_manifest_name(stem)
    manifest.write(stem.parent, name)
    checksums = []
    for split in SPLITS:
        rows = source.splits[split]
        order = training_order(options, source) if split == "train" else StoredOrder()
        blocks = computed_ahead(partial(read_block, rows, order), range(0, len(rows), ROWS_PER_BLOCK), READERS)
        checksums.append(write_rows(binary_path(stem, split), blocks))
    sizes = [len(source.splits[split]) for split in SPLITS]
    manifest._replace(rows=sizes, checksums=checksums).write(stem.parent, name)


def read_block(rows: SplitRows, order: Order, start: int) -> np.ndarray:
    """Returns ROWS_PER_BLOCK rows from position `start` of an order on, or as many as there are."""
    return rows.read(order.samples_at(start, min(start + ROWS_PER_BLOCK, len(rows))))


# ---------------------------------------------------------------------------------------------------------------------
# Reading ahead
# ---------------------------------------------------------------------------------------------------------------------


def computed_ahead(compute: Callable[[int], Result], numbers: range, threads: int) -> Iterator[Result]:
    """Yields `compute(number)` for each number in order, while threads compute the next ones. Without threads, each is
    computed when it is asked for."""
    if not threads:
        yield from map(compute, numbers)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        waiting = deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(compute, number))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
