"""Arrays in .npy and .npz files, which any number of threads may read.

numpy parses the header of an array with `ast.literal_eval`. In Python 3.11, two threads that do so at the same time may
fail with "AST constructor recursion depth mismatch" (https://github.com/python/cpython/issues/106905). So headers are
parsed one at a time here, while the arrays themselves are read side by side.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import threading
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

BYTES_PER_READ = 2**18  # a file within a zip file copies what it reads at once

_parsing = threading.Lock()


class Header(NamedTuple):
    """What the header of an array says."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def read_header(file: BinaryIO) -> Header:
    """Reads the header of a .npy file of format 1.0. Raises ValueError, or another error, if it is damaged."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f".npy format {version[0]}.{version[1]}; expected 1.0")
    with _parsing:
        return Header(*np.lib.format.read_array_header_1_0(file))


def read_array(file: BinaryIO) -> np.ndarray:
    """Reads the array that begins at the file's position. Raises ValueError, or another error, if it is damaged."""
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are not read")
    content = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    for begin in range(0, len(content), BYTES_PER_READ):
        part = content[begin : begin + BYTES_PER_READ]
        if file.readinto(part) != len(part):
            raise ValueError("the array is cut off")
    return np.ndarray(shape, dtype, content, order="F" if fortran_order else "C")


def load_array(path: Path) -> np.ndarray:
    """Returns the array in a .npy file."""
    with path.open("rb") as file:
        return read_array(file)


def map_array(path: Path) -> np.ndarray:
    """Returns the array in a .npy file, which is read from the disk where it is used."""
    with path.open("rb") as file:
        return _mapped(file)


def map_member(path: Path, name: str) -> np.ndarray:
    """Returns an array in a .npz file that is not compressed, which is read from the disk where it is used."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        member = _member(archive, name)
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed; write it by numpy.savez")
        file.seek(member.header_offset + 26)  # the lengths of name and extra field in the header of the member itself
        file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)
        return _mapped(file)


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Returns where the file of an array is in the archive. Raises ValueError if there is none."""
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"there is no array {name} in it")
    return archive.getinfo(f"{name}.npy")


def _mapped(file: BinaryIO) -> np.ndarray:
    """Maps the array that begins at the file's position."""
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject or fortran_order:
        raise ValueError("only arrays of numbers in rows are read")
    if not math.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", file.tell(), shape)  # raises ValueError if the file is too short


def expect_random_reads(array: np.ndarray) -> None:
    """Keeps the system from reading 128 KB around each number of a mapped array."""
    if isinstance(array, np.memmap):
        array.base.madvise(mmap.MADV_RANDOM)


class NpzFile:
    """An open .npz file, whose arrays are read when they are asked for by name."""

    def __init__(self, path: Path):
        self._archive = zipfile.ZipFile(path)

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads an array."""
        with self._open(name) as file:
            return read_array(file)

    def header(self, name: str) -> Header:
        """Reads no more than the header of an array."""
        with self._open(name) as file:
            return read_header(file)

    def _open(self, name: str) -> BinaryIO:
        """Opens the file of an array. Raises ValueError if there is none."""
        return self._archive.open(_member(self._archive, name))
