"""Numbers the categories of a column by first appearance, within a given memory.

Each chunk of text has a list of the distinct codes in a column, in order of first appearance. The entries of a column
are these lists, one after the other. They may be more than memory holds, so they are split by code into buckets that
fit. In each bucket, the entries at which a code appears for the first time are found. The id of a code is the number of
such entries, in all buckets, before the first entry of that code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dlrm.data.arrays import load_array, read_array
from dlrm.system.files import renamed_when_done

ENTRY = np.dtype([("position", "<i8"), ("code", "<u4")])  # the position is that among all entries of the column
ENTRY_MEMORY = 128  # bytes that finding the first entries in a bucket takes per entry
BLOCK_ENTRIES = 2**18  # entries of a file that are mapped into memory at a time


def ids_path(work: Path, column: int) -> Path:
    """Returns the file with the id of each entry of a column, int32."""
    return work / f"ids_{column}.bin"


def number_column(
    column: int, codes_of_chunks: Iterable[np.ndarray], starts: np.ndarray, work: Path, memory: int
) -> int:
    """Writes the id of each entry of a column to `ids_path`, and returns the number of ids.

    `codes_of_chunks` are the lists of codes, uint32, and `starts` where each of them begins among the entries, followed
    by the number of entries. Takes about `memory` bytes beside one list. Anything as long as all entries is in files.
    """
    result, count_path = ids_path(work, column), work / f"count_{column}.npy"
    if result.exists():
        return int(load_array(count_path))
    num_entries, entries_in_memory = int(starts[-1]), max(1, memory // ENTRY_MEMORY)
    buckets = [work / f"bucket_{column}_{bucket}.tmp" for bucket in range(1 + num_entries // entries_in_memory)]
    split_by_code(codes_of_chunks, starts, buckets, entries_in_memory)
    with tempfile.TemporaryFile(dir=work) as file, renamed_when_done(result) as result_file:
        is_first, ids = DiskArray(file, np.bool_, num_entries), DiskArray(result_file, np.int32, num_entries)
        count = sum(mark_first_entries(bucket, is_first) for bucket in buckets)
        for bucket in buckets:
            write_ids(bucket, is_first, ids)
        with renamed_when_done(count_path) as count_file:  # before the ids, so that whoever finds these finds it
            np.save(count_file, count)
    return count


def first_appearances(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions at which a value appears for the first time, in ascending order, and for each value which
    of these positions is the first of its kind."""
    _, first, group_of_value = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number_of_group = np.empty_like(order)
    number_of_group[order] = np.arange(len(order))
    return first[order], number_of_group[group_of_value]


def split_by_code(
    codes_of_chunks: Iterable[np.ndarray], starts: np.ndarray, buckets: Sequence[Path], entries_in_memory: int
) -> None:
    """Writes each ENTRY to the file of its bucket, in ascending order of positions. At most `entries_in_memory` and
    those of one chunk wait in memory."""
    for path in buckets:
        path.write_bytes(b"")
    waiting, num_waiting = [], 0
    for start, codes in zip(starts, codes_of_chunks, strict=False):
        waiting.append(np.empty(len(codes), ENTRY))
        waiting[-1]["position"], waiting[-1]["code"] = np.arange(start, start + len(codes)), codes
        num_waiting += len(codes)
        if num_waiting > entries_in_memory:
            append_to_buckets(np.concatenate(waiting), buckets)
            waiting, num_waiting = [], 0
    append_to_buckets(np.concatenate([np.empty(0, ENTRY), *waiting]), buckets)


def append_to_buckets(entries: np.ndarray, buckets: Sequence[Path]) -> None:
    """Appends each ENTRY to the file of its bucket."""
    bucket_of_entry = entries["code"] % len(buckets)
    order = np.argsort(bucket_of_entry, kind="stable")
    ends = np.searchsorted(bucket_of_entry, np.arange(1, len(buckets)), sorter=order)
    for path, of_bucket in zip(buckets, np.split(order, ends), strict=True):
        with path.open("ab") as file:
            entries[of_bucket].tofile(file)


def mark_first_entries(bucket: Path, is_first: DiskArray) -> int:
    """Marks the entries of a bucket at which a code appears for the first time, and returns their number.

    Then the file of the bucket holds three arrays for `write_ids`: the positions of its entries, those of the marked
    ones, and for each entry which of the marked ones has the same code.
    """
    entries = np.fromfile(bucket, ENTRY)
    first, first_of_entry = first_appearances(entries["code"])
    first_positions = entries["position"][first]
    is_first.put(first_positions, np.ones(len(first_positions), dtype=np.bool_))
    with bucket.open("wb") as file:
        for array in (entries["position"], first_positions, first_of_entry):
            np.save(file, array)
    return len(first_positions)


def write_ids(bucket: Path, is_first: DiskArray, ids: DiskArray) -> None:
    """Writes the ids of the entries of a bucket, and deletes the bucket."""
    with bucket.open("rb") as file:
        positions, first_positions, first_of_entry = (read_array(file) for _ in range(3))
    ids.put(positions, is_first.count_before(first_positions)[first_of_entry])
    bucket.unlink()


class DiskArray:
    """An array of zeros in an empty file. One block of it at a time is mapped into memory."""

    def __init__(self, file: BinaryIO, dtype: type, length: int):
        self._file, self._dtype, self._length = file, np.dtype(dtype), length
        file.truncate(length * self._dtype.itemsize)

    def _blocks(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, slice]]:
        """Yields each block, which of the ascending positions lie in it, and where these are among all positions."""
        for begin in range(0, self._length, BLOCK_ENTRIES):
            end = min(begin + BLOCK_ENTRIES, self._length)
            block = np.memmap(self._file, self._dtype, "r+", begin * self._dtype.itemsize, end - begin)
            here = slice(*np.searchsorted(positions, [begin, end]))
            yield block, positions[here] - begin, here

    def put(self, positions: np.ndarray, values: np.ndarray) -> None:
        """Sets the entries at ascending positions."""
        for block, inside, here in self._blocks(positions):
            block[inside] = values[here]

    def count_before(self, positions: np.ndarray) -> np.ndarray:
        """Returns how many entries are set before each of the ascending positions, whose own entries are set."""
        before, counts = 0, np.empty(len(positions), dtype=np.int32)
        for block, inside, here in self._blocks(positions):
            counts[here] = before + np.cumsum(block)[inside] - 1
            before += np.count_nonzero(block)
        return counts
