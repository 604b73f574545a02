"""Tests that a file appears whole or not at all, and that no other file is touched on the way."""

from __future__ import annotations

import os
import secrets

import numpy as np
import pytest

from dlrm.checkpoint.file import write_file
from dlrm.errors import RunError, UsageError
from dlrm.system.files import check_writable, locked, renamed_when_done, synced, temporary_path, written_whole


def write_rows(path) -> None:
    with renamed_when_done(path) as file:
        np.save(file, np.arange(1000))


def write_checkpoint(path) -> None:
    write_file(str(path), {"weights": list(range(1000))})


@pytest.mark.parametrize(("write", "syncs_folder"), [(write_rows, False), (write_checkpoint, True)])
def test_content_is_on_the_disk_before_the_file_has_its_name(write, syncs_folder, tmp_path, monkeypatch):
    path, fsync, replace, events = tmp_path / "file", os.fsync, os.replace, []

    def sync(descriptor):
        fsync(descriptor)
        events.append(("synced", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    def rename(source, target):
        events.append(("named", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    write(path)
    content = path.stat().st_ino, path.stat().st_size
    assert events[:2] == [("synced", *content), ("named", *content)]
    assert [event for event, inode, _ in events[2:] if inode == tmp_path.stat().st_ino] == ["synced"] * syncs_folder


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A link, under the name of the next temporary file, to a file that nobody may overwrite."""
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * 2 * count)
    (tmp_path / "precious").write_text("precious")
    link = temporary_path(tmp_path / "file")
    link.symlink_to(tmp_path / "precious")
    return link


def write_whole(path) -> None:
    with written_whole("--flag", path) as temporary:
        temporary.write_text("new")


def write_synced(path) -> None:
    with synced(temporary_path(path)) as file:
        file.write(b"new")


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (write_rows, FileExistsError),
        (write_synced, FileExistsError),
        (write_whole, RunError),
        (lambda path: check_writable("--flag", path), UsageError),
        (write_checkpoint, RunError),
    ],
    ids=["renamed_when_done", "synced", "written_whole", "check_writable", "checkpoint"],
)
def test_links_under_temporary_names_are_not_followed(write, error, planted, tmp_path):
    with pytest.raises(error, match="File exists"):
        write(tmp_path / "file")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "file").exists()


def test_a_link_under_the_name_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_killed_process_leaves_nothing_that_stays(tmp_path):
    temporary_path(tmp_path / "file").touch()
    others = [temporary_path(tmp_path / "other"), tmp_path / "file.tmp"]
    for other in others:
        other.write_text("not ours")
    write_rows(tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} == {"file", *(other.name for other in others)}


@pytest.mark.parametrize("write", [renamed_when_done, lambda path: written_whole("--flag", path)])
def test_what_fails_leaves_the_file_before_and_nothing_else(write, tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(ZeroDivisionError), write(tmp_path / "file"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_files_are_as_readable_as_others(tmp_path):
    before = os.umask(0o027)
    try:
        write_rows(tmp_path / "rows")
        write_checkpoint(tmp_path / "checkpoint")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("rows", "checkpoint")] == [0o640, 0o640]
