"""Files that appear whole or not at all, early checks that a file can be written, JSON, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dlrm.errors import RunError, UsageError


def check_writable(flag: str, path: str | Path, replaces_folder: bool = False) -> None:
    """Raises UsageError if the file that `flag` names cannot be written.

    A check before the run, since the result of the run would be lost at its end. An existing folder at `path` is an
    error unless the run `replaces_folder`.
    """
    try:
        if Path(path).is_dir() and not replaces_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary = temporary_path(path)
        os.close(_create(temporary))
        temporary.unlink()
    except OSError as error:
        raise UsageError(f"{flag}: cannot write {str(path)!r}: {reason_of(error)}") from None


@contextlib.contextmanager
def written_whole(flag: str, path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames the file there to `path` when the block ends.

    If the block fails, `path` stays as it was. Raises RunError, which names `flag`, if the file cannot be written.
    """
    temporary = temporary_path(path)
    try:
        os.close(_create(temporary))
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{flag}: cannot write {str(path)!r}: {reason_of(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def renamed_when_done(path: Path) -> Iterator[BinaryIO]:
    """Yields a binary file to write, which is named `path` only when all its content is on the disk.

    Removes unfinished files that killed processes have left behind, so only one process may write at a time.
    """
    for other in path.parent.iterdir():
        if is_temporary_name(other.name, of=path.name) and other.is_file() and not other.is_symlink():
            other.unlink()
    unfinished = temporary_path(path)
    try:
        with synced(unfinished) as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def synced(path: str | Path) -> Iterator[BinaryIO]:
    """Yields a new binary file to write, all of whose content is on the disk when the block has ended.

    Whether the file's name is on the disk as well is certain only after `sync_folder`. Raises FileExistsError if there
    is anything at `path`.
    """
    with open(_create(path), "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """Waits until the names of all files in the folder `path` are on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock on `path` during the block, so that other processes wait. It is released if the process dies.

    `path` is an existing folder, or a file that serves as the lock and is created if it is missing.
    """
    import fcntl  # exists on POSIX systems only; the other functions of this module work without it

    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _create(path: str | Path) -> int:
    """Returns the descriptor of a new file. Raises FileExistsError if there is anything at `path`, a link included."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def temporary_path(path: str | Path) -> Path:
    """Returns a name beside `path` that no other file has. `is_temporary_name` recognises such names."""
    return Path(f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def is_temporary_name(name: str, of: str) -> bool:
    """Says whether the file name `name` is one that `temporary_path` returns for a file named `of`."""
    return bool(re.fullmatch(rf"{re.escape(of)}\.\d+-[0-9a-f]{{8}}\.tmp", name))


def read_json(path: Path, what: str) -> dict:
    """Returns the object in a JSON file. Raises RunError, which says that the file is no `what`, if it has none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is no {what}: {error}") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is no {what}: it does not hold an object")
    return content


def name_without_endings(path: Path) -> str:
    """Returns the name of a file up to its first dot, apart from those that it begins with: `.a.txt.gz` -> `.a`."""
    return re.match(r"\.*[^.]*", path.name)[0]


def reason_of(error: OSError) -> str:
    """Returns what went wrong, in words. Python's own functions raise some errors without the system's text."""
    return error.strerror or str(error)
