"""What a loss of power leaves of a file: all of it under its name, or what had that name before."""

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


@pytest.mark.parametrize(("write", "syncs_the_name"), [(write_rows, False), (write_checkpoint, True)])
def test_content_is_on_the_disk_before_it_has_its_name(write, syncs_the_name, tmp_path, monkeypatch):
    path, fsync, replace, done = tmp_path / "file", os.fsync, os.replace, []

    def sync(descriptor):
        fsync(descriptor)
        done.append(("synced", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    def rename(source, target):
        done.append(("named", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    write(path)
    content = path.stat().st_ino, path.stat().st_size
    assert done[:2] == [("synced", *content), ("named", *content)]
    assert [step for step, inode, _ in done[2:] if inode == tmp_path.stat().st_ino] == ["synced"] * syncs_the_name
