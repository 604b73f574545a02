"""The place of a checkpoint on the disk: the checkpoint there, and the one before it."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from dlrm.errors import RunError
from dlrm.system.files import sync_folder

MANIFEST = "manifest.pt"  # the last file that is written of a folder


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
