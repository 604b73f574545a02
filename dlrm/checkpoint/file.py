"""Checkpoints on a disk: whole or not there, and verified when they are read.

Of one rank it is a file: a zip archive as `torch.save` writes it; the archive's comment is the SHA-256 of the file
without that comment. Of several ranks it is a folder (`folder.py`). Tensors go straight to files, and
from their mapped pages into place: there is never a second copy of the tables in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlrm.errors import RunError
from dlrm.system.files import sync_folder, synced

VERSION = 2
MANIFEST = "manifest.pt"  # the last file that is written of a folder


class Shard(NamedTuple):
    """What a rank has of a tensor: all of it, or rows and columns from `offsets` on."""

    name: str
    tensor: Tensor
    offsets: tuple[int, ...]
    whole_shape: tuple[int, ...]

    @property
    def place(self) -> tuple[slice, ...]:
        """In the whole tensor."""
        return places(self.offsets, self.tensor.shape)


def places(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------

SEAL = b"sha256:"
SEAL_LENGTH = len(SEAL) + 64
READ_AT_ONCE = 2**20


class HashingFile:
    """What is written goes to the file and into a SHA-256. Keeps what went wrong: torch tells only that it did."""

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
        """Of what was written so far."""
        return self._hash.hexdigest()

    def seal(self) -> None:
        """Makes the hash the archive's comment; the archive ends in the comment's length, two bytes, zero so far."""
        comment = SEAL + self.sha256().encode()
        self._file.seek(-2, os.SEEK_CUR)
        self._file.write(len(comment).to_bytes(2, "little") + comment)


@contextlib.contextmanager
def hashing(file: BinaryIO) -> Iterator[HashingFile]:
    """A `HashingFile` for torch to write to, whose errors are the file's own."""
    into = HashingFile(file)
    try:
        yield into
    except RuntimeError as error:
        raise into.error or error from None


def write_sealed(path: str | Path, state: dict[str, Any]) -> None:
    with synced(path) as file:
        with hashing(file) as into:
            torch.save(state, into)
        into.seal()


def write_file(path: str, state: dict[str, Any]) -> None:
    """The checkpoint before it becomes `path`.previous; at any moment one of the two is whole. RunError if it can't be
    written: then nothing has changed."""
    temporary = f"{path}.tmp"
    try:
        remove(temporary)
        write_sealed(temporary, state)
        put_in_place(temporary, path)
    except OSError as error:
        discard(temporary)
        raise not_written(path, error) from None


def not_written(path: str, error: OSError) -> RunError:
    kept = "; the one before it stays" if Path(path).exists() else ""
    return RunError(f"--save-model: cannot write {path!r}: {error.strerror}{kept}")


def put_in_place(temporary: str, path: str) -> None:
    _keep_previous(path)
    os.replace(temporary, path)
    sync_folder(Path(path).absolute().parent)


def _keep_previous(path: str) -> None:
    """By a second name, so that `path` itself is never missing. Folders have none, nor do files on some file systems:
    there it is missing for a moment."""
    if not Path(path).exists():
        return
    previous, second_name = f"{path}.previous", f"{path}.previous.tmp"
    if Path(path).is_dir() or Path(previous).is_dir():
        remove(previous)  # nothing takes a folder's place while it is there
    with contextlib.suppress(FileNotFoundError):
        os.unlink(second_name)
    try:
        os.link(path, second_name)
        os.replace(second_name, previous)
    except OSError:
        os.replace(path, previous)


def is_checkpoint_folder(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def remove(path: str | Path) -> None:
    """A file or a folder, if it is there."""
    if Path(path).is_dir():
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def discard(path: str) -> None:
    """Removes what is not needed, if that can be."""
    with contextlib.suppress(OSError):
        remove(path)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------

RUN_KEYS = {"epoch", "iter", "nepochs", "nbatches"}
FILE_KEYS = RUN_KEYS | {"state_dict", "opt_state_dict"}


class CheckpointFile:
    """A checkpoint of one rank, or of the public script."""

    def __init__(self, path: str, names: Iterable[str], verifies: bool = True):
        """`names` of the model's parameters, in their order. RunError as in `read_file`."""
        self.state = read_file(path, verifies=verifies)
        moments = self.state["opt_state_dict"].get("state", {})
        self._tensors = dict(self.state["state_dict"])
        for number, name in enumerate(names):
            self._tensors |= {f"{name}.{moment}": value for moment, value in moments.get(number, {}).items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name; those of moments are the parameters' with `.sum` or `.momentum`."""
        return {name: tuple(value.shape) for name, value in self._tensors.items() if isinstance(value, Tensor)}

    def copy_to(self, shard: Shard) -> None:
        shard.tensor.copy_(self._tensors[shard.name][shard.place])


def read_file(path: str, required: set[str] = FILE_KEYS, verifies: bool = True) -> dict[str, Any]:
    """Verified, unless another rank does that; tensors are mapped pages of the file. RunError, naming the file, if it
    is damaged or no checkpoint."""
    try:
        sealed = not verifies or _verify(path)
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError):
        raise RunError(f"{path!r} is damaged, or no checkpoint{hint(path)}") from None
    except OSError as error:
        raise RunError(f"cannot read {path!r}: {error.strerror or error}") from None
    except Exception as error:  # the unpickler's own error, of something that is not plain data
        raise RunError(f"{path!r} is no checkpoint: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(state, Mapping) or required - state.keys():
        raise RunError(f"{path!r} is no checkpoint of this trainer or of the public script")
    if "trainer" in state and not sealed:
        raise damaged(path)
    if state.get("trainer", {}).get("version", VERSION) != VERSION:
        raise RunError(f"{path!r} is of another version of this trainer")
    return state


def damaged(path: str) -> RunError:
    return RunError(f"{path!r} is damaged{hint(path)}")


NUMPY_NUMBERS = [  # the public script saves a loss and an accuracy as these
    np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64", "uint8", "uint64")),
]


def hint(path: str) -> str:
    previous = f"{path}.previous"
    return f"; the one before it is {previous!r}" if Path(previous).exists() else ""


def _verify(path: str) -> bool:
    """Whether the file is one of ours, with its seal; BadZipFile if it is damaged. Other archives have a checksum for
    each part."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - SEAL_LENGTH - 2
        if size > 0:
            file.seek(size)
            length, comment = file.read(2), file.read()
            if length == SEAL_LENGTH.to_bytes(2, "little") and comment.startswith(SEAL):
                digest = hash_of(file, size)
                digest.update(b"\0\0")  # which were there before the seal
                if comment[len(SEAL) :] != digest.hexdigest().encode():
                    raise zipfile.BadZipFile
                return True
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile
    return False


def hash_of(file: BinaryIO, size: int):
    """The SHA-256 of the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size:
        block = file.read(min(size, READ_AT_ONCE))
        digest.update(block)
        size -= len(block)
    return digest
