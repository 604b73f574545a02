"""Tests of the profile: the trace has all phases and operators of the recorded iterations, and the tables add up."""

from __future__ import annotations

import json
import re

import pytest

from dlrm.output import profile

FLAGS = "--mini-batch-size=4 --enable-profiling "
PHASES = ["wait", "forward: lookup", "forward: dense", "backward", "optimizer: tables", "optimizer: dense", "other"]


@pytest.mark.parametrize(("length", "recorded"), [("--num-batches=1", 1), ("--num-batches=9 --nepochs=2", 5)])
def test_the_profile_is_a_trace_and_tables(length, recorded, script, tmp_path):
    status, output, errors = script(FLAGS + length + f" --print-freq=100 --output-folder={tmp_path}")
    assert status == 0
    assert errors == ""
    assert {file.name for file in tmp_path.iterdir()} == {"dlrm_s_pytorch.json", "dlrm_s_pytorch.prof"}

    events = json.loads((tmp_path / "dlrm_s_pytorch.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert names.count("dlrm::embedding_bag_sum") == names.count("backward") == recorded
    assert not any(name.startswith(profile.MARK) for name in names)
    slices = [event for event in events if event.get("cat") == "phase" and event["name"] != "print"]
    assert [event["name"] for event in slices] == PHASES * recorded
    lookups = [event for event in events if event.get("name") == "dlrm::embedding_bag_sum"]
    lookup_phases = slices[PHASES.index("forward: lookup") :: len(PHASES)]
    for lookup, phase in zip(lookups, lookup_phases, strict=True):
        assert phase["ts"] <= lookup["ts"] <= phase["ts"] + phase["dur"]

    tables = (tmp_path / "dlrm_s_pytorch.prof").read_text()
    assert f"Profile of {recorded} iterations" in tables
    assert re.search(r"forward: lookup .*dlrm::embedding_bag_sum", tables)
    assert re.search(r"optimizer: tables .*dlrm::sparse_sgd_", tables)
    assert "Self CPU time total" in tables
    assert tables.split("\n\n")[0] in output
    shares = re.findall(r"([\d.]+) %  ", tables)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.5)


def test_a_profile_changes_no_loss(script, tmp_path):
    losses_with_profile, losses_without = (
        re.findall(r"loss [\d.]+", script(f"--mini-batch-size=4 --num-batches=20 {flags}")[1])
        for flags in (f"--enable-profiling --output-folder={tmp_path}", "")
    )
    assert losses_with_profile == losses_without


def test_a_run_that_fails_leaves_no_profile_and_no_profiler(script, tmp_path):
    failing = FLAGS + f"--num-batches=9 --loss-function=mse --learning-rate=1e30 --output-folder={tmp_path}"
    assert script(failing)[0] == 1
    assert list(tmp_path.iterdir()) == []
    assert script(FLAGS + f"--num-batches=2 --output-folder={tmp_path}")[0] == 0


def test_a_missing_folder_is_refused(script):
    status, output, errors = script(FLAGS + "--output-folder=/nowhere")
    assert status == 2
    assert "--enable-profiling: cannot write '/nowhere/dlrm_s_pytorch.json': No such file" in errors
    assert errors.count("\n") == 1
    assert "Finished" not in output


@pytest.mark.parametrize(
    ("flags", "recorded"),
    [
        ("--num-batches=40 --mlperf-grad-accum-iter=4", 5),
        ("--num-batches=20 --inference-only", 5),
        ("--num-batches=20 --inference-only --test-mini-batch-size=80", 1),
        ("--num-batches=20 --test-freq=12 --mlperf-acc-threshold=0.01", 2),
    ],
)
def test_the_profile_has_the_steps_that_there_are(flags, recorded, script, tmp_path):
    status, output, errors = script(f"{FLAGS} {flags} --output-folder={tmp_path}")
    assert (status, errors) == (0, "")
    assert f"Profile of {recorded} iterations" in output
    assert f"Profile of {recorded} iterations" in (tmp_path / "dlrm_s_pytorch.prof").read_text()


def test_a_run_that_ends_before_it_is_profiled_says_so(script, tmp_path):
    flags = f"{FLAGS} --num-batches=20 --test-freq=3 --mlperf-acc-threshold=0.01 --output-folder={tmp_path}"
    status, _, errors = script(flags)
    assert status == 0
    assert errors == ("--enable-profiling: the run ended in its 10 iterations of warm-up; the run goes on without it\n")
    assert list(tmp_path.iterdir()) == []
