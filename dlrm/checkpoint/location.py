"""The place of a checkpoint on the disk: one run at a time saves there, and the checkpoint before it is kept."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from dlrm.errors import RunError, UsageError
from dlrm.system.files import check_writable, is_temporary_name, reason_of, sync_folder, temporary_path

MANIFEST = "manifest.pt"  # the last file that is written of a folder
UNFINISHED = ".unfinished"  # the first file that is written of a folder, and removed when all others are there

# ---------------------------------------------------------------------------------------------------------------------
# One run at a time
# ---------------------------------------------------------------------------------------------------------------------

LOCK_CONTENT = re.compile(rb"(\d+) ([\w.-]+)\n")  # process and host
NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # so say some file systems of clusters


@contextlib.contextmanager
def reserved(path: str) -> Iterator[None]:
    """Holds the lock on the checkpoint `path` during the block, so that no other run saves there.

    The lock is on a file `path`.lock, which is removed at the end. If the process is killed, that file stays, but the
    lock on it is released. Removes what killed runs have left unfinished. Raises UsageError if another process holds
    the lock, or if nothing can be written there.
    """
    check_writable("--save-model", path, replaces_folder=is_checkpoint_folder(path))
    lock = f"{path}.lock"
    try:
        descriptor = _open_locked(lock)
    except BlockingIOError as error:
        raise UsageError(f"--save-model: cannot write {path!r}: {error.strerror} saves there") from None
    except OSError as error:
        raise UsageError(f"--save-model: cannot write {lock!r}: {reason_of(error)}") from None
    try:
        if descriptor is not None:
            _remove_leftovers(path)
        yield
    finally:
        if descriptor is not None:
            Path(lock).unlink(missing_ok=True)  # before the lock is released, so that it is not another run's
            os.close(descriptor)


def _open_locked(lock: str) -> int | None:
    """Returns a descriptor of the file `lock`, which is locked and names this process.

    Returns None on a file system that has no locks. Raises BlockingIOError, whose text names the process that holds
    the lock, if there is one.
    """
    import fcntl  # exists on POSIX systems only

    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            holder = _holder(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(error.errno, holder) from None
            if _is_named(descriptor, lock):
                _name_this_process(descriptor)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS_HERE:
                return None
            raise
        os.close(descriptor)  # the run that had the lock has removed the file since it was opened


def _holder(descriptor: int) -> str:
    """Returns the process that a lock file names, in words. Raises OSError if it is no lock file."""
    content = os.pread(descriptor, 1000, 0)
    named = LOCK_CONTENT.fullmatch(content)
    if content and not named:
        raise OSError(errno.EEXIST, "it is no lock file of this trainer")
    return "process {} on {}".format(*(part.decode() for part in named.groups())) if named else "another process"


def _is_named(descriptor: int, path: str) -> bool:
    """Says whether the open file is the one that has the name `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _name_this_process(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # on a full disk, the file stays empty, and the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {re.sub('[^a-zA-Z0-9_.-]', '-', socket.gethostname())}\n".encode(), 0)


def _remove_leftovers(path: str) -> None:
    """Removes the unfinished checkpoints that killed runs have left beside `path`."""
    folder, name = os.path.split(os.path.abspath(path))
    for other in os.listdir(folder):
        leftover = os.path.join(folder, other)
        if is_temporary_name(other, of=name) and _is_unfinished(leftover):
            discard(leftover)


def _is_unfinished(path: str) -> bool:
    """Says whether the content of a file or folder is that of an unfinished checkpoint, or of a whole one."""
    if os.path.islink(path):
        return False
    if os.path.isdir(path):
        names = os.listdir(path)
        return not names or UNFINISHED in names or MANIFEST in names
    with open(path, "rb") as file:
        return file.read(4) in (b"", b"PK\x03\x04")


# ---------------------------------------------------------------------------------------------------------------------
# Replacing a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def not_written(path: str, error: OSError) -> RunError:
    kept = "; the one before it stays" if Path(path).exists() else ""
    return RunError(f"--save-model: cannot write {path!r}: {reason_of(error)}{kept}")


def put_in_place(temporary: str, path: str) -> None:
    _keep_previous(path)
    os.replace(temporary, path)
    sync_folder(Path(path).absolute().parent)


def _keep_previous(path: str) -> None:
    """By a second name, so that `path` itself is never missing. Folders have none, nor do files on some file systems:
    there it is missing for a moment."""
    if not Path(path).exists():
        return
    previous, second_name = f"{path}.previous", temporary_path(path)
    if Path(path).is_dir() or Path(previous).is_dir():
        remove(previous)  # nothing takes a folder's place while it is there
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
