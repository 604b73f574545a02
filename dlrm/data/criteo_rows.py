"""Files of rows, which hold the samples of the Criteo data sets.

A row is 40 int32: the label, 13 dense features, and 26 category ids, each of which is one lookup in a table. Files of
nothing but rows are MLPerf's binary format.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from dlrm.data.arrays import expect_random_reads
from dlrm.errors import RunError
from dlrm.system.files import renamed_when_done

NUM_DENSE, NUM_SPARSE = 13, 26
ROW = 1 + NUM_DENSE + NUM_SPARSE  # numbers in a row, and fields in a line of text
ROW_BYTES = 4 * ROW
NPY_HEADER = 128  # bytes before the rows of a .npy file; numpy pads its header to a multiple of 64
DAYS = {"kaggle": 7, "terabyte": 24}
SPLITS = ("train", "test", "val")


def day_path(folder: Path, day: int) -> Path:
    """Returns the file of a day in a folder of preprocessed data."""
    return folder / f"day_{day}.npy"


def binary_path(stem: Path, split: str) -> Path:
    """Returns the path of the binary file of a split, beside the folder or the .npz file called `stem`."""
    return stem.with_name(f"{stem.name}_{split}.bin")


def npy_header(rows: int) -> bytes:
    """Returns the header of a .npy file of so many rows."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i4", "fortran_order": False, "shape": (rows, ROW)})
    return header.getvalue()


def write_rows(path: Path, blocks: Iterable[np.ndarray], npy_rows: int | None = None) -> int:
    """Writes blocks of rows, (n, 40) int32, one after the other, and returns their CRC-32. The file is a .npy file if
    the number of rows in all blocks is given, and nothing but rows otherwise."""
    checksum = 0
    with renamed_when_done(path) as file:
        if npy_rows is not None:
            file.write(npy_header(npy_rows))
        for block in blocks:
            content = np.ascontiguousarray(block, dtype="<i4").data.cast("B") if block.size else b""
            checksum = zlib.crc32(content, checksum)
            file.write(content)
    return checksum


class StoredRows(Protocol):
    """The rows of a day, which are read as an array is indexed."""

    width: int = ROW  # numbers in a row
    dense_type: type = np.int32  # of the dense features; the bits of float32 are their logarithms
    lookups_per_bag: Sequence[int] = (1,) * NUM_SPARSE  # in each table

    def __len__(self) -> int:
        """Returns the number of rows."""
        ...

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the rows at some positions, (n, width) int32. Any number of threads may ask at once."""
        ...

    def expect_random_reads(self) -> None:
        """Is told that rows are read one by one, in no order, and that memory has no room for all of them."""

    def place(self, position: int) -> str:
        """Returns the file and the number of a row, in words."""
        ...


class RowFile(StoredRows):
    """The rows of a file, which are read from the disk when they are used."""

    def __init__(self, path: Path, rows: int, npy: bool = False):
        """Raises RunError if the file is a .npy file whose header does not have this number of rows."""
        self.path = path
        with path.open("rb") as file:
            if npy:
                check_header(file, path, rows)
            shape, offset = (rows, self.width), file.tell()
            self._rows = np.memmap(file, "<i4", "r", offset, shape) if rows else np.empty(shape, dtype=np.int32)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._rows)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the rows at some positions, (n, width) int32."""
        return self._rows[positions]

    def expect_random_reads(self) -> None:
        expect_random_reads(self._rows)

    def place(self, position: int) -> str:
        """Returns the file and the number of a row, in words."""
        return f"{self.path}, row {position + 1:,}"


def check_header(file: BinaryIO, path: Path, rows: int) -> None:
    """Reads the header of a .npy file. Raises RunError if it is not that of so many rows."""
    if file.read(NPY_HEADER) != npy_header(rows):
        raise RunError(f"{path} is damaged: its header is not that of {rows:,} rows")


def check_rows(rows: np.ndarray, dense_type: type, place: Callable[[int], str]) -> None:
    """Raises RunError if the label of a row, (n, width) int32, is not 0 or 1, or if a dense feature has no logarithm.

    `place` returns in words where row k of these is stored. Dense features are whole numbers of 0 or more, or the bits
    of logarithms.
    """
    labels, dense = rows[:, 0], rows[:, 1 : 1 + NUM_DENSE].view(dense_type)
    if len(rows) and (labels.min() < 0 or labels.max() > 1):
        row = int(np.argmax((labels < 0) | (labels > 1)))
        raise RunError(f"{place(row)}: the label is {labels[row]}; expected 0 or 1")
    are_counts = dense_type == np.int32
    if len(rows) and not (dense.min() >= 0 if are_counts else np.isfinite(dense).all()):
        row, column = map(int, np.argwhere(dense < 0 if are_counts else ~np.isfinite(dense))[0])
        expected = "0 or more" if are_counts else "a finite number"
        raise RunError(f"{place(row)}: dense feature {column + 1} is {dense[row, column]}; expected {expected}")
