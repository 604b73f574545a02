"""Errors that nobody foresaw: one line, and a traceback in a file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import demo_dlrm
import dlrm_s_pytorch

SMALL = "--mini-batch-size=4 --num-batches=3"


def broken(*_, **__):
    raise TypeError("of no\nuse")


@pytest.mark.parametrize(
    ("program", "function"), [(dlrm_s_pytorch, "run"), (demo_dlrm, "run")], ids=["dlrm_s_pytorch.py", "demo_dlrm.py"]
)
def test_an_error_that_nobody_foresaw_is_one_line(program, function, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, function, broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert program.main(SMALL.split()) == 1
    place = r"the traceback is in (\S+); DLRM_TRACEBACK=1 prints it"
    line = rf"{program.__name__}.py: error: TypeError: of no use \({place}\)\n"
    found = re.fullmatch(line, capsys.readouterr().err)
    assert "raise TypeError" in Path(found[1]).read_text()


def test_its_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setattr(dlrm_s_pytorch, "run", broken)
    monkeypatch.setenv("DLRM_TRACEBACK", "1")
    with pytest.raises(TypeError, match="of no"):
        dlrm_s_pytorch.main(SMALL.split())


def test_a_reader_that_leaves_ends_the_run_in_one_line():
    command = f"{sys.executable} dlrm_s_pytorch.py --mini-batch-size=4 --num-batches=2000 | head -1"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.stderr == "dlrm_s_pytorch.py: error: standard output was closed\n"
