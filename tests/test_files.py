"""Tests that a loss of power leaves either a whole file under its name, or the file that had that name before."""

from __future__ import annotations

import os

import numpy as np
import pytest

from dlrm.checkpoint.file import write_file
from dlrm.system.files import renamed_when_done


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
