"""Archives of plain data and tensors, as `torch.save` writes them, sealed with a SHA-256 that is verified on reading.

An archive is a zip file. The seal is the zip file's comment: the SHA-256 of the file as it was without that comment.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from dlrm.errors import RunError
from dlrm.system.files import reason_of, synced

VERSION = 2

# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------

SEAL = b"sha256:"
SEAL_LENGTH = len(SEAL) + 64
BYTES_PER_READ = 2**20


class HashingFile:
    """A file that computes the SHA-256 of what is written to it.

    `error` is the last error of a write, since torch reports only that there was one, not which.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def write(self, data) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)
        return len(data)

    def sha256(self) -> str:
        """Returns the SHA-256, in hexadecimal, of what was written so far."""
        return self._hash.hexdigest()

    def seal(self) -> None:
        """Makes the SHA-256 of the archive, which has been written, the comment of its zip file."""
        comment = SEAL + self.sha256().encode()
        self._file.seek(-2, os.SEEK_CUR)  # the length of the comment, which is 0 so far, takes the last two bytes
        self._file.write(len(comment).to_bytes(2, "little") + comment)


@contextlib.contextmanager
def hashing(file: BinaryIO) -> Iterator[HashingFile]:
    """Yields a `HashingFile` that writes to `file`. Raises the OSError of a failed write in place of torch's error."""
    hashing_file = HashingFile(file)
    try:
        yield hashing_file
    except RuntimeError as error:
        raise hashing_file.error or error from None


def write_sealed(path: str | Path, state: dict[str, Any]) -> None:
    """Writes a new file with a seal, which is on the disk when this returns. Raises OSError if it cannot be written."""
    with synced(path) as file:
        with hashing(file) as hashing_file:
            save_plain(state, hashing_file)
        hashing_file.seal()


def save_plain(value: Any, file: BinaryIO) -> None:
    """Writes plain data and tensors to a file.

    The pickle's protocol is named, since a Gaudi's lazy mode has a `torch.save` of its own with protocol 4, which
    torch elsewhere does not read without running code.
    """
    torch.save(value, file, pickle_protocol=2)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------

RUN_KEYS = {"epoch", "iter", "nepochs", "nbatches"}
FILE_KEYS = RUN_KEYS | {"state_dict", "opt_state_dict"}


def read_file(path: str, required: set[str] = FILE_KEYS, verifies: bool = True) -> dict[str, Any]:
    """Returns what a checkpoint file holds. Tensors are mapped pages of the file.

    Verifies the file, unless another rank does that. Raises RunError, which names the file, if it is damaged, or is no
    checkpoint, which has all keys of `required`.
    """
    sealed = not verifies or _is_sealed(path)
    state = load_plain(path)
    if not isinstance(state, Mapping) or required - state.keys():
        raise RunError(f"{path!r} is no checkpoint of this trainer or of the reference script")
    if "trainer" in state:
        if not sealed:
            raise damaged(path)
        if not isinstance(state["trainer"], Mapping) or state["trainer"].get("version", VERSION) != VERSION:
            raise RunError(f"{path!r} is of another version of this trainer")
    return state


def load_plain(path: str) -> Any:
    """Returns the plain data and tensors that `torch.save` has written to a file, without running any code of it.

    Tensors are mapped pages of the file, except in the format of torch before 1.6. Raises RunError, which names the
    file.
    """
    try:
        is_mapped = not _has_old_format(path)
        with torchs_own_reader(), torch.serialization.safe_globals(NUMPY_NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has advice for whoever wrote the file
            return torch.load(path, map_location="cpu", mmap=is_mapped, weights_only=True)
    except OSError as error:
        raise RunError(f"cannot read {path!r}: {reason_of(error)}") from None
    except pickle.UnpicklingError:
        raise RunError(
            f"{path!r} is no checkpoint: it holds something other than numbers, texts, tensors and collections of them"
        ) from None
    except Exception:  # damage can show itself anywhere in torch
        raise RunError(f"{path!r} is damaged, or no checkpoint{hint(path)}") from None


@contextlib.contextmanager
def torchs_own_reader() -> Iterator[None]:
    """Puts torch's own functions in the place of those that a Gaudi's lazy mode reads pickles by.

    Those have a list of their own of what a file may hold, without numpy's numbers. The plugin has wrapped torch's by
    `functools.wraps`, which keeps them (`torch_overwrites.py` of its 1.19 source).
    """
    names = ("_load", "_legacy_load")
    replaced = {name: getattr(torch.serialization, name) for name in names}
    for name, function in replaced.items():
        setattr(torch.serialization, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(torch.serialization, name, function)


# The first bytes of a file in the format of torch before 1.6: a pickle of the number 0x1950A86A20F9469CFC6C.
OLD_FORMAT = b"\x80\x02\x8a\n" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."


def _has_old_format(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(OLD_FORMAT)) == OLD_FORMAT


def damaged(path: str) -> RunError:
    """Returns the error for a damaged file, which names the checkpoint before it, if there is one."""
    return RunError(f"{path!r} is damaged{hint(path)}")


def _numpy_scalar(module: str) -> Callable[..., Any]:
    """Returns numpy's function that makes a number of its bytes, under the name that it has in `module`.

    numpy 2 has renamed the module. A checkpoint may be from either side of that, whichever numpy reads it.
    """
    make, _ = np.float64(0).__reduce__()

    def scalar(dtype: np.dtype, content: bytes) -> Any:
        if dtype.kind not in "biuf":
            raise pickle.UnpicklingError
        return make(dtype, content)

    scalar.__module__, scalar.__name__, scalar.__qualname__ = module, "scalar", "scalar"
    return scalar


NUMPY_NUMBERS = [  # the reference script saves a loss and an accuracy as these
    _numpy_scalar("numpy.core.multiarray"),
    _numpy_scalar("numpy._core.multiarray"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64", "uint8", "uint64")),
]


def hint(path: str | Path) -> str:
    """Returns the end of an error about the checkpoint `path`: which checkpoint is left, if there is one."""
    previous = f"{path}.previous"
    return f"; the one before it is {previous!r}" if os.path.exists(previous) else ""


def has_seal(path: str) -> bool:
    """Says whether a file ends in a seal. Does not verify it. Raises OSError if the file cannot be read."""
    with open(path, "rb") as file:
        return _read_seal(file) is not None


def _read_seal(file: BinaryIO) -> tuple[int, bytes] | None:
    """Returns the length of a file without its seal and the SHA-256 in the seal, or None if there is no seal."""
    size = file.seek(0, os.SEEK_END) - SEAL_LENGTH - 2
    file.seek(max(size, 0))
    length, comment = file.read(2), file.read()
    if size <= 0 or length != SEAL_LENGTH.to_bytes(2, "little") or not comment.startswith(SEAL):
        return None
    return size, comment[len(SEAL) :]


def _is_sealed(path: str) -> bool:
    """Says whether a file has a seal. Raises RunError if the file is damaged, or cannot be read."""
    try:
        return _verify(path)
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, NotImplementedError, zlib.error):
        raise RunError(f"{path!r} is damaged, or no checkpoint{hint(path)}") from None
    except OSError as error:
        raise RunError(f"cannot read {path!r}: {reason_of(error)}") from None


def _verify(path: str) -> bool:
    """Says whether a file has a seal. Raises BadZipFile if the file is damaged.

    Archives without a seal have a checksum for each part.
    """
    with open(path, "rb") as file:
        if seal := _read_seal(file):
            digest = hash_of(file, seal[0])
            digest.update(b"\0\0")  # the length of the comment, before there was one
            if seal[1] != digest.hexdigest().encode():
                raise zipfile.BadZipFile
            return True
    if _has_old_format(path):
        return False  # that format has no checksums
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile
    return False


def hash_of(file: BinaryIO, size: int):
    """Returns the hashlib object with the SHA-256 of the first `size` bytes of a file, or of all if it is shorter."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(min(size, BYTES_PER_READ)):
        digest.update(block)
        size -= len(block)
    return digest
