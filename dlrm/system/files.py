"""Files that appear whole or not at all, and are known to be writable before the work that fills them; locks."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dlrm.errors import RunError, UsageError


def check_writable(flag: str, path: str | Path, replaces_folder: bool = False) -> None:
    """UsageError now, instead of a lost file at the end of the run."""
    try:
        if Path(path).is_dir() and not replaces_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _temporary_name(path).touch(exist_ok=False)
        _temporary_name(path).unlink()
    except OSError as error:
        raise UsageError(f"{flag}: cannot write {str(path)!r}: {error.strerror}") from None


@contextlib.contextmanager
def written_whole(flag: str, path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` at the end. RunError if it can't be written."""
    temporary = _temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{flag}: cannot write {str(path)!r}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def renamed_when_done(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that gets its name when all of it is on the disk. What a killed process left of it is
    written over, so let one process write at a time."""
    unfinished = path.with_name(path.name + ".tmp")
    with synced(unfinished) as file:
        yield file
    unfinished.replace(path)


@contextlib.contextmanager
def synced(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write, all of which is on the disk at the end; its name is, after a `sync_folder`."""
    with open(path, "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """Until the names in it are on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, while others wait; the lock goes with the process. `path` is a folder, or a file for just
    that, which is made."""
    import fcntl  # POSIX only; where it is missing, who needs no lock need not know

    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _temporary_name(path: str | Path) -> Path:
    return Path(f"{path}.{os.getpid()}.tmp")
