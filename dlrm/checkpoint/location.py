"""The place of a checkpoint on the disk: one run at a time saves there, and the checkpoint before it is kept."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from dlrm.checkpoint.archive import has_seal, read_file
from dlrm.errors import RunError, UsageError
from dlrm.system.files import check_writable, is_temporary_name, reason_of, sync_folder, temporary_path

MANIFEST = "manifest.pt"  # the last file that is written of a folder
UNFINISHED = ".unfinished"  # the first file that is written of a folder, and removed when all others are there
FILE_IN_FOLDER = re.compile(rf"__\d+_\d+\.distcp|\.metadata(\.tmp)?|{re.escape(MANIFEST)}|{re.escape(UNFINISHED)}")

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
    _check_place(path)
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


def _check_place(path: str) -> None:
    """Raises UsageError if a checkpoint cannot be written to `path`, or would replace what is no checkpoint."""
    if not os.path.basename(path):
        raise UsageError(f"--save-model: cannot write {path!r}: a name is missing after the last '/'")
    for name in (path, f"{path}.previous"):
        if reason := why_not_replaced(name):
            raise UsageError(f"--save-model: cannot write {path!r}: {reason}")
    check_writable("--save-model", path, replaces_folder=True)


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
    """Returns the error for a checkpoint that could not be written."""
    kept = "; the one before it stays" if os.path.exists(path) else ""
    return RunError(f"--save-model: cannot write {path!r}: {reason_of(error)}{kept}")


def put_in_place(temporary: str, path: str) -> None:
    """Gives the finished checkpoint `temporary` the name `path`; the checkpoint there becomes `path`.previous.

    Raises RunError if anything that is no checkpoint has one of those two names. Raises OSError if it fails.
    """
    previous = f"{path}.previous"
    for name in (path, previous):
        if reason := why_not_replaced(name):
            raise RunError(f"--save-model: cannot write {path!r}: {reason}")
    discarded = ""
    if os.path.lexists(path):
        if os.path.isdir(previous) or (os.path.isdir(path) and os.path.lexists(previous)):
            discarded = str(temporary_path(path))  # no other name for it: nothing takes the place of a folder
            os.rename(previous, discarded)
        _rename_to_previous(path, previous)
    os.replace(temporary, path)
    sync_folder(Path(path).absolute().parent)
    if discarded:
        discard(discarded)


def _rename_to_previous(path: str, previous: str) -> None:
    """Names the checkpoint at `path` `previous`. Files keep the name `path` as well, so that it is never missing."""
    second_name = str(temporary_path(path))
    try:
        os.link(path, second_name)  # no folder can have a second name, nor can a file on some file systems
        os.replace(second_name, previous)
    except OSError:
        discard(second_name)
        os.replace(path, previous)


def why_not_replaced(path: str) -> str:
    """Returns why what is at `path` must not be replaced by a checkpoint; "" if it may, or if nothing is there.

    Only what is recognised by its content is replaced: checkpoints of this trainer and of the reference script.
    """
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            try:
                mode = os.stat(path).st_mode
            except OSError as error:
                return f"{path!r} is a symbolic link that leads nowhere: {reason_of(error)}"
            if stat.S_ISDIR(mode):
                return f"{path!r} is a symbolic link to a folder; name the folder itself"
        if stat.S_ISDIR(mode):
            return _why_not_our_folder(path)
        if not stat.S_ISREG(mode):
            return f"{path!r} is neither a file nor a folder"
        return "" if _is_checkpoint_file(path) else f"{path!r} is a file that is no checkpoint; remove it first"
    except OSError as error:
        return f"{path!r}: {reason_of(error)}" if os.path.lexists(path) else ""


def _why_not_our_folder(path: str) -> str:
    if not is_checkpoint_folder(path) or not has_seal(os.path.join(path, MANIFEST)):
        return f"{path!r} is a folder that is no checkpoint"
    foreign = sorted(name for name in os.listdir(path) if not FILE_IN_FOLDER.fullmatch(name))
    return f"the folder {path!r} holds {foreign[0]!r}, which is no part of a checkpoint" if foreign else ""


def _is_checkpoint_file(path: str) -> bool:
    if not os.path.getsize(path) or has_seal(path):
        return True
    try:
        return bool(read_file(path, verifies=False))
    except RunError:
        return False


def is_checkpoint_folder(path: str | Path) -> bool:
    """Says whether there is a folder at `path` that holds a manifest."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def discard(path: str) -> None:
    """Removes a checkpoint, finished or not, as far as that is possible.

    Of a folder, the files by which it is recognised go last, so that the next run can go on if this one is killed.
    Files that are no part of a checkpoint stay.
    """
    with contextlib.suppress(OSError):
        if not os.path.isdir(path) or os.path.islink(path):
            os.unlink(path)
            return
        names = [name for name in os.listdir(path) if FILE_IN_FOLDER.fullmatch(name)]
        for name in sorted(names, key=lambda name: name in (MANIFEST, UNFINISHED)):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)
