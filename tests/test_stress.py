"""The stress tools of tests/stress, with as few cases as show that they work, and that nothing is wrong in these."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

from tests.stress.forked import Ended, Tally, run
from tests.stress.kills import same


@pytest.mark.parametrize(("tool", "count"), [("kills", 1), ("mutations", 12), ("fuzz", 20), ("full_disk", 2)])
def test_a_tool_finds_nothing(tool, count):
    pytest.importorskip("polars", reason="preprocessing needs polars: pip install -r requirements-data.txt")
    command = [sys.executable, "-m", f"tests.stress.{tool}", f"--count={count}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n{count} cases, 0 faults, seed 1" in f"\n{done.stdout}"


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(0, "", ""), ""),
        (Ended(1, "", "a\nprogram: error: b\n"), ""),
        (Ended(2, "", ""), "not one line that says why"),
        (Ended(1, "", "p: error: a\np: error: b\n"), "not one line that says why"),
        (Ended(1, "", "Traceback (most recent call last):"), "a traceback"),
        (Ended(1, "", "p: error: x (the traceback is in /tmp/dlrm-traceback-x.txt)"), "a traceback"),
        (Ended(-11, "", ""), "status -11"),
    ],
)
def test_a_wrong_ending_is_noticed(ended, fault):
    assert ended.fault == fault


def test_a_run_in_a_fork_ends_as_its_program_says(tmp_path):
    def program(flags):
        print("out", *flags)
        print("err", file=sys.stderr)
        with open(tmp_path / "file", "wb") as file:
            file.write(bytes(100))
        return 3

    assert run(program, ["a"]) == Ended(3, "out a\n", "err\n")
    assert "File too large" in run(program, ["a"], largest_file=50).err


def test_states_are_compared_number_by_number():
    nan = float("nan")
    assert same({"a": [1, nan]}, {"a": [1, nan]})
    assert not same({"a": [1, 2]}, {"a": [1, 3]})
    assert not same({"a": 1}, {"b": 1})
    assert not same([1], [1, 2])


def test_a_tally_counts(capsys):
    tally = Tally()
    tally.note("one", "")
    tally.note("two", "bad")
    assert str(tally) == "2 cases, 1 faults"
    assert capsys.readouterr().out == "FAULT two: bad\n"
