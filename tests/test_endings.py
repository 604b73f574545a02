"""Programs that end by an error that nobody foresaw, or beside streams that are closed or full."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import demo_dlrm
import dlrm_s_pytorch
from dlrm.system.endings import end_by

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


@pytest.mark.parametrize(
    ("redirection", "status", "errors"),
    [
        ("| head -1", 0, "dlrm_s_pytorch.py: error: cannot write to standard output: Broken pipe\n"),
        ("> /dev/full", 1, "dlrm_s_pytorch.py: error: cannot write to standard output: No space left on device\n"),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
    ],
)
def test_a_stream_that_cannot_be_used_is_one_line_or_none(redirection, status, errors, tmp_path):
    saved = f"--num-batches={2000 if '|' in redirection else 3} --save-model={tmp_path / 'm.pt'}"
    command = f"{sys.executable} dlrm_s_pytorch.py --mini-batch-size=4 {saved} {redirection}"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (status, errors)
    assert "error" not in result.stdout
    assert (tmp_path / "m.pt").exists() == (not errors)


def test_the_launchers_lists_may_be_lost_as_well():
    command = f"{sys.executable} demo_dlrm.py --list-configs > /dev/full"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "demo_dlrm.py: error: cannot write to standard output: No space left on device\n"


def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path):
    missing = f"{tmp_path}/line\nbreak, \u00fcber, \udcff"
    command = [sys.executable, "dlrm_s_pytorch.py", "--mini-batch-size=4", f"--raw-data-file={missing}"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for more, status in (["--data-generation=dataset"], 2), (["--num-batches=1"], 0):
        result = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == status
        assert result.stderr.count("\n") == (status > 0)
        assert (r"\nbreak" in result.stderr) == (status > 0)
        assert r"break, \xfcber, \udcff" in result.stderr + result.stdout


def test_memory_that_the_system_refuses_is_one_line(capsys):
    for refused, message in (
        (lambda: torch.empty(2**60, dtype=torch.uint8), "the system refused 1,073,741,824.000 GiB"),
        (lambda: np.empty(2**60, dtype=np.uint8), "Unable to allocate 1.00 EiB for an array with shape"),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            refused()
        assert end_by("program", caught.value) == 1
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert errors.startswith(f"program: error: out of memory: {message}")


@pytest.mark.parametrize("flag", ["--load-model", "--save-model", "--raw-data-file", "--plot", "--report"])
def test_names_that_are_too_long_are_refused(flag, capsys):
    assert dlrm_s_pytorch.main([f"{flag}=/tmp/{'x' * 256}", "--data-generation=dataset"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"dlrm_s_pytorch.py: error: {flag}: a name in this path has more than 255 bytes: ")
    assert errors.count("\n") == 1
