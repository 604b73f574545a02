"""Files of rows, which hold the samples of the Criteo data sets.

A row is 40 int32: the label, 13 dense features, and 26 category ids, each of which is one lookup in a table. Files of
nothing but rows are MLPerf's binary format.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dlrm.system.files import renamed_when_done

NUM_DENSE, NUM_SPARSE = 13, 26
ROW = 1 + NUM_DENSE + NUM_SPARSE  # numbers in a row, and fields in a line of text
ROW_BYTES = 4 * ROW
NPY_HEADER = 128  # bytes before the rows of a .npy file; numpy pads its header to a multiple of 64
DAYS = {"kaggle": 7, "terabyte": 24}


def day_path(folder: Path, day: int) -> Path:
    """Returns the file of a day in a folder of preprocessed data."""
    return folder / f"day_{day}.npy"


def write_rows(path: Path, blocks: Iterable[np.ndarray], npy_rows: int | None = None) -> int:
    """Writes blocks of rows, (n, 40) int32, one after the other, and returns their CRC-32. The file is a .npy file if
    the number of rows in all blocks is given, and nothing but rows otherwise."""
    checksum = 0
    with renamed_when_done(path) as file:
        if npy_rows is not None:
            header = {"descr": "<i4", "fortran_order": False, "shape": (npy_rows, ROW)}
            np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            content = np.ascontiguousarray(block, dtype="<i4").data.cast("B") if block.size else b""
            checksum = zlib.crc32(content, checksum)
            file.write(content)
    return checksum


def open_rows(path: Path, rows: int, header_bytes: int = 0) -> np.ndarray:
    """Returns the rows of a file, (rows, 40) int32, which are read from the disk when they are used."""
    if not rows:
        return np.empty((0, ROW), dtype=np.int32)
    return np.memmap(path, dtype="<i4", mode="r", offset=header_bytes, shape=(rows, ROW))
