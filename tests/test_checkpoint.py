"""Tests of checkpoints of one rank.

What was reported saved is on the disk. A damaged file is refused by name. A run that goes on from a checkpoint prints
what a run prints that was never stopped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from mutations import damaged_bytes, mutated_values

import dlrm_s_pytorch
from dlrm.checkpoint import checkpoint as checkpoint_module
from dlrm.checkpoint.archive import NUMPY_NUMBERS, read_file, write_sealed
from dlrm.checkpoint.checkpoint import latest
from dlrm.checkpoint.file import write_file
from dlrm.checkpoint.location import reserved
from dlrm.errors import RunError, UsageError
from dlrm.system.files import temporary_path

SMALL = (
    "--mini-batch-size=4 --num-batches=6 --nepochs=2 --round-targets --learning-rate=0.1 --arch-interaction-op=dot "
    "--arch-embedding-size=30-20-5 "
)
LINES = re.compile(r"^(Finished .*|Testing at .*)$", re.MULTILINE)
VARIANTS = {
    "sgd": "--optimizer=sgd",
    "adagrad, lines of 4": "--optimizer=adagrad --print-freq=4",
    "rwsadagrad, tests": "--optimizer=rwsadagrad --test-freq=4 --print-freq=5",
    "bf16": "--optimizer=adagrad --data_type=bf16",
    "bf16 tables": "--optimizer=adagrad --table-data-type=bf16",
    "schedule": "--lr-num-warmup-steps=5 --lr-decay-start-step=7 --lr-num-decay-steps=4 --rand-data-dist=gaussian",
    "accumulation": "--optimizer=adagrad --mlperf-grad-accum-iter=2 --lr-num-warmup-steps=4",
    "quotient-remainder": "--optimizer=adagrad --qr-flag --qr-threshold=10",
    "mixed dimension": "--optimizer=sgd --md-flag --md-threshold=10 --weighted-pooling=fixed",
    "weighted pooling": "--optimizer=adagrad --weighted-pooling=learned --mlperf-grad-accum-iter=3",
    "cross layers": "--arch-interaction-op=dcn --dcn-num-layers=2 --dcn-low-rank-dim=3 --optimizer=adagrad "
    "--optimizer-eps=1e-8 --data_type=bf16",
    "the first batch alone": "--optimizer=adagrad --measure-perf",
}


def lines(output: str) -> list[str]:
    return LINES.findall(output)


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_at_any_iteration_a_run_is_the_one_never_stopped(variant, script, tmp_path, monkeypatch):
    flags = SMALL + VARIANTS[variant]
    whole = lines(script(flags)[1])
    copies = []

    def write_and_copy(path, state):
        write_file(path, state)
        position = (state["epoch"], state["iter"])
        copies.append((position, shutil.copy(path, tmp_path / "-".join(map(str, position)))))

    monkeypatch.setattr(checkpoint_module, "write_file", write_and_copy)
    status, output, _ = script(f"{flags} --save-model={tmp_path / 'm.pt'} --save-every=1")
    monkeypatch.undo()
    assert status == 0
    assert lines(output) == whole
    assert len(copies) == 12 // int((re.findall(r"accum-iter=(\d)", flags) or ["1"])[0])
    for (epoch, iteration), path in copies:
        status, output, errors = script(f"{flags} --load-model={path} --resume --save-model={tmp_path / 'again.pt'}")
        assert (status, errors) == (0, "")
        if "Saving" in output:
            check_same_tensors(tmp_path / "again.pt", copies[-1][1])
        assert f"Saved at: epoch = {epoch}/2, batch = {iteration}/6" in output
        rest = lines(output)
        assert rest == whole[len(whole) - len(rest) :]
        assert ("Nothing is left to train." in output) == (rest == []) == ((epoch, iteration) == (1, 6))


def check_same_tensors(path: Path, other_path: Path) -> None:
    """Asserts that two checkpoints have the same weights and optimizer state, bit for bit."""
    state, other = read_file(str(path)), read_file(str(other_path))
    assert state["state_dict"].keys() == other["state_dict"].keys()
    for name, weight in state["state_dict"].items():
        assert torch.equal(weight, other["state_dict"][name]), name
    moments, others = state["opt_state_dict"]["state"], other["opt_state_dict"]["state"]
    assert moments.keys() == others.keys()
    for number, moment in moments.items():
        assert moment.keys() == others[number].keys()
        assert all(torch.equal(torch.as_tensor(moment[name]), torch.as_tensor(others[number][name])) for name in moment)


def test_resume_without_a_file_starts_and_with_one_goes_on(script, tmp_path):
    flags = f"{SMALL} --save-model={tmp_path / 'm.pt'} --resume "
    first = script(flags.replace("--nepochs=2", "--nepochs=1"))[1]
    second = script(flags)[1]
    assert lines(first) + lines(second) == lines(script(SMALL)[1])
    (tmp_path / "m.pt").rename(tmp_path / "m.pt.previous")  # a kill between two renames
    assert "Nothing is left to train." in script(flags)[1]


def test_loaded_weights_alone_start_a_new_run(script, tmp_path):
    path = tmp_path / "m.pt"
    flags = f"{SMALL} --optimizer=adagrad --test-freq=6 "
    trained = script(f"{flags} --save-model={path}")[1]
    inference = script(f"{SMALL.replace('nepochs=2', 'nepochs=1')} --inference-only --load-model={path}")[1]
    last_test = [re.sub("best.*", "", line.split(",", 1)[1]) for line in lines(trained) if "Testing" in line][-1]
    assert last_test in lines(inference)[-1]
    again = script(f"{SMALL} --optimizer=sgd --load-model={path}")[1]  # moments of another optimizer don't matter
    assert "it 1/6 of epoch 0" in again


@pytest.mark.parametrize(("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (2, 130, "interrupted")])
def test_signals_save_and_end_the_run(number, status, word, script, tmp_path, monkeypatch):
    whole = lines(script(SMALL)[1])
    step, calls = dlrm_s_pytorch.Trainer.train_step, []

    def signalled(self, batch):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), number)
        return step(self, batch)

    path = tmp_path / "m.pt"
    monkeypatch.setattr(dlrm_s_pytorch.Trainer, "train_step", signalled)
    ended, first, errors = script(f"{SMALL} --save-model={path}")
    assert (ended, errors) == (status, f"dlrm_s_pytorch.py: {word}\n")
    second = script(f"{SMALL} --save-model={path} --resume")[1]
    assert len(lines(first)) == 8
    assert lines(first) + lines(second) == whole


# ---------------------------------------------------------------------------------------------------------------------
# kill -9
# ---------------------------------------------------------------------------------------------------------------------

KILLING_SECONDS = float(os.environ.get("DLRM_TEST_KILLING_SECONDS", 25))

# Imports once, then forks a run for each line of stdin, and prints its process id.
FORKING = """
import os, sys
import dlrm_s_pytorch
for line in sys.stdin:
    output, flags = line.split(maxsplit=1)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os._exit(dlrm_s_pytorch.main(flags.split()))
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def kill_at_random(forking: subprocess.Popen, log: Path, flags: str, generator: random.Random) -> str:
    """Returns what a run printed until it was killed, at any moment or soon after its first iterations."""
    log.write_text("")
    forking.stdin.write(f"{log} {flags}\n")
    forking.stdin.flush()
    pid = int(forking.stdout.readline())
    ending = time.monotonic() + generator.choice((0, 5, 5, 5))
    while time.monotonic() < ending and "Finished" not in log.read_text():
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert int(forking.stdout.readline()) == signal.SIGKILL, log.read_text()
    return log.read_text()


def test_killed_at_random_moments_a_run_still_ends_as_it_would(script, tmp_path):
    """After each kill, what was reported saved is there. Every printed line is one of an uninterrupted run."""
    path, generator, ending = tmp_path / "m.pt", random.Random(1), time.monotonic() + KILLING_SECONDS
    flags = SMALL.replace("nepochs=2", "nepochs=9999") + "--optimizer=adagrad --print-freq=3 "
    with subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as forking:
        printed, promised, kills, resumed = {}, (0, 0), 0, 0
        while time.monotonic() < ending or (resumed < 5 and kills < 99):  # a slow machine takes its time
            saving = f"{flags} --save-model={path} --save-every=1 --resume"
            output = kill_at_random(forking, tmp_path / "output", saving, generator)
            kills += 1
            if found := re.search(r"Saved at: epoch = (\d+)/9999, batch = (\d+)/6", output):
                assert tuple(map(int, found.groups())) >= promised
                resumed += 1
            saves = output.count("Saving model to")
            if path.exists():
                state = read_file(str(path))
                reached = state["epoch"] * 6 + state["iter"]
                assert reached >= promised[0] * 6 + promised[1] + saves
                promised = (state["epoch"], state["iter"])
            else:
                assert not saves
            for line in lines(output):
                key = re.search(r"it (\d+)/6 of epoch (\d+)", line).groups()
                assert printed.setdefault(key, line) == line
        forking.stdin.close()
    assert resumed >= 5
    whole = lines(script(flags.replace("nepochs=9999", f"nepochs={promised[0] + 1}"))[1])
    assert set(printed.values()) <= set(whole)
    assert len(printed) >= 4


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 5000, 12000])
def test_a_file_that_can_not_grow_leaves_the_one_before(size, script, tmp_path):
    path = tmp_path / "m.pt"
    flags = f"{SMALL} --save-model={path} "
    assert script(flags.replace("nepochs=2", "nepochs=1"))[0] == 0
    before = path.read_bytes()
    assert len(before) > 12000
    with files_of_at_most(size):
        status, output, errors = script(f"{flags} --resume --save-every=3")
    assert status == 1
    assert errors == (
        f"dlrm_s_pytorch.py: error: --save-model: cannot write {str(path)!r}: File too large; the one before it stays\n"
    )
    assert "Saving" not in output
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]


def test_a_full_disk_leaves_the_one_before(script, small_disk):
    path = small_disk("80k") / "m.pt"
    flags = f"{SMALL} --save-model={path} "
    assert script(flags.replace("nepochs=2", "nepochs=1"))[0] == 0
    filler = path.with_name("other")
    filler.write_bytes(b"x" * 60 * 1024)
    before = path.read_bytes()
    status, _, errors = script(f"{flags} --resume")
    assert (status, "No space left on device; the one before it stays" in errors) == (1, True)
    assert path.read_bytes() == before
    filler.unlink()
    assert script(f"{flags} --resume")[0] == 0


def test_a_place_that_can_not_be_written_is_refused_before_training(script, tmp_path):
    status, output, errors = script(f"{SMALL} --save-model={tmp_path / 'no' / 'm.pt'}")
    assert (status, errors.count("\n")) == (2, 1)
    assert "--save-model: cannot write" in errors
    assert "Finished" not in output


# ---------------------------------------------------------------------------------------------------------------------
# Other runs and other files in the place of a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def saving_process(path: Path) -> Iterator[int]:
    """Yields the number of another process, which holds the lock on the checkpoint `path` until it is killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with reserved(str(path)):
            os.write(writing, b"locked")
            time.sleep(300)
        os._exit(1)
    try:
        assert os.read(reading, 6) == b"locked"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)


def test_a_second_run_with_the_same_checkpoint_is_refused(script, tmp_path):
    path = tmp_path / "m.pt"
    with saving_process(path) as pid:
        status, output, errors = script(f"{SMALL} --save-model={path}")
        assert (status, "Finished" in output) == (2, False)
        assert re.fullmatch(
            rf"dlrm_s_pytorch.py: error: --save-model: cannot write '{path}': process {pid} on \S+ saves there\n",
            errors,
        )
        assert script(f"{SMALL} --save-model={tmp_path / 'other.pt'}")[0] == 0
    assert (tmp_path / "m.pt.lock").read_text().startswith(f"{pid} ")  # stays after a kill, but refuses nobody
    assert script(f"{SMALL} --save-model={path}")[0] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.pt", "other.pt"]


def test_a_lock_file_that_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """A run ends, and removes its lock file, after the next run has opened the file and before it has the lock."""
    path, flock, calls = tmp_path / "m.pt", fcntl.flock, []

    def flock_after_removal(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / "m.pt.lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with reserved(str(path)):
        assert len(calls) == 2
        assert (tmp_path / "m.pt.lock").read_text().startswith(f"{os.getpid()} ")


def test_a_file_system_without_locks_is_used_without(script, tmp_path, monkeypatch):
    def no_flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    assert script(f"{SMALL} --save-model={tmp_path / 'm.pt'}")[0] == 0


def test_a_file_that_only_has_the_name_of_a_lock_stays(script, tmp_path):
    (tmp_path / "m.pt.lock").write_text("my notes")
    status, output, errors = script(f"{SMALL} --save-model={tmp_path / 'm.pt'}")
    assert (status, errors.count("\n"), "Finished" in output) == (2, 1, False)
    assert "m.pt.lock': it is no lock file of this trainer" in errors
    assert (tmp_path / "m.pt.lock").read_text() == "my notes"


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(script, tmp_path):
    path = tmp_path / "m.pt"
    unfinished, foreign = [temporary_path(path) for _ in range(4)], [temporary_path(path) for _ in range(3)]
    unfinished[0].write_bytes(b"")
    write_file(str(unfinished[1]), {"weights": list(range(1000))})
    unfinished[1].write_bytes(unfinished[1].read_bytes()[:1000])
    unfinished[2].mkdir()
    unfinished[3].mkdir()
    (unfinished[3] / ".unfinished").touch()
    (unfinished[3] / "__0_0.distcp").touch()
    foreign[0].write_text("my notes")
    foreign[1].mkdir()
    (foreign[1] / "my notes").touch()
    foreign[2].symlink_to(tmp_path / "anywhere")
    others = [tmp_path / name for name in ("m.pt.tmp", "m.pt.1-00000000.tmp.txt", "mm.pt.1-00000000.tmp")]
    for other in others:
        other.touch()
    assert script(f"{SMALL} --save-model={path}")[0] == 0
    assert {file.name for file in tmp_path.iterdir()} == {"m.pt", *(file.name for file in [*foreign, *others])}
    assert (foreign[1] / "my notes").exists()


def make_notes(path: Path) -> None:
    path.write_text("my notes")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "my notes").write_text("in a folder")


def make_folder_with_manifest(path: Path) -> None:
    make_folder(path)
    (path / "manifest.pt").write_text("of something else")


def make_checkpoint_with_notes(path: Path) -> None:
    make_folder(path)
    write_sealed(path / "manifest.pt", {"epoch": 1})


def make_link_to_folder(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    write_sealed(path.parent / "elsewhere" / "manifest.pt", {"epoch": 1})
    path.symlink_to("elsewhere")


FOREIGN = {
    "file": (make_notes, "is a file that is no checkpoint; remove it first"),
    "folder": (make_folder, "is a folder that is no checkpoint"),
    "other manifest": (make_folder_with_manifest, "is a folder that is no checkpoint"),
    "notes in a checkpoint": (make_checkpoint_with_notes, "holds 'my notes', which is no part of a checkpoint"),
    "link to a folder": (make_link_to_folder, "is a symbolic link to a folder; name the folder itself"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "that leads nowhere: No such file or directory"),
    "loop": (lambda path: path.symlink_to(path.name), "that leads nowhere: Too many levels of symbolic links"),
    "pipe": (os.mkfifo, "is neither a file nor a folder"),
}


def content_of(folder: Path) -> dict[str, str | bytes]:
    """Returns, by path, the content of files, the targets of links, and the mode of anything else in a folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = path.read_bytes() if path.is_file() else str(path.stat().st_mode)
    return found


@pytest.mark.parametrize("name", ["m.pt", "m.pt.previous"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_not_replaced(kind, name, script, tmp_path):
    make, message = FOREIGN[kind]
    make(tmp_path / name)
    before = content_of(tmp_path)
    status, output, errors = script(f"{SMALL} --save-model={tmp_path / 'm.pt'} --resume")
    assert (status, errors.count("\n"), output) == (2, 1, "")
    assert errors.startswith(f"dlrm_s_pytorch.py: error: --save-model: cannot write {str(tmp_path / 'm.pt')!r}: ")
    assert message in errors
    assert content_of(tmp_path) == before
    with pytest.raises(RunError, match=re.escape(message)):  # at a save, should it have come during the run
        write_file(str(tmp_path / "m.pt"), {"weights": [1, 2, 3]})
    assert content_of(tmp_path) == before


def test_folders_with_the_names_of_older_temporary_files_stay(script, tmp_path):
    make_folder(tmp_path / "m.pt.tmp")
    make_folder(tmp_path / "m.pt.previous.tmp")
    before = content_of(tmp_path)
    for _ in range(2):
        assert script(f"{SMALL} --save-model={tmp_path / 'm.pt'}")[0] == 0
    assert before.items() <= content_of(tmp_path).items()


def test_an_empty_file_and_checkpoints_of_the_reference_script_are_replaced(script, tmp_path):
    path = tmp_path / "m.pt"
    path.touch()
    assert script(f"{SMALL} --save-model={path}")[0] == 0
    shutil.copy(ROOT / "tests/reference_checkpoints/sgd.pt", path)
    assert script(f"{SMALL} --save-model={path}")[0] == 0
    assert (tmp_path / "m.pt.previous").read_bytes() == (ROOT / "tests/reference_checkpoints/sgd.pt").read_bytes()
    assert script(f"{SMALL} --save-model={path}")[0] == 0


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Runs the block as another user than root, whom no permission stops."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_folder_without_permission_is_refused(mode, tmp_path):
    tmp_path.chmod(mode)
    try:
        message = r"cannot write '.*/m.pt': Permission denied$"
        with without_privileges(), pytest.raises(UsageError, match=message), reserved(str(tmp_path / "m.pt")):
            pass
        with without_privileges():
            assert latest(str(tmp_path / "m.pt")) == ""
    finally:
        tmp_path.chmod(0o755)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and foreign files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(script, tmp_path) -> Path:
    path = tmp_path / "m.pt"
    assert script(f"{SMALL} --optimizer=adagrad --save-model={path}")[0] == 0
    return path


def test_a_flipped_bit_or_a_cut_is_refused(checkpoint):
    content = checkpoint.read_bytes()
    ends = [*range(100), *range(len(content) - 200, len(content))]
    for position in [*ends, *range(100, len(content), 23)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        checkpoint.write_bytes(damaged)
        with pytest.raises(RunError, match=re.escape("m.pt")):
            read_file(str(checkpoint))
    for length in [*range(0, len(content), 501), len(content) - 1]:
        checkpoint.write_bytes(content[:length])
        with pytest.raises(RunError, match=re.escape("m.pt")):
            read_file(str(checkpoint))
    checkpoint.write_bytes(content)
    assert read_file(str(checkpoint))["epoch"] == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged, or no checkpoint"),
        (b"not a zip archive" * 99, "is damaged, or no checkpoint"),
        ({"weights": torch.zeros(3)}, "is no checkpoint of this trainer or of the reference script"),
        (torch.zeros(3), "is no checkpoint of this trainer or of the reference script"),
        ({"state_dict": Evil()}, "is no checkpoint: "),
    ],
    ids=["empty", "text", "other dict", "tensor", "code"],
)
def test_what_is_no_checkpoint_is_refused(content, message, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "foreign.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    status, output, errors = script(f"{SMALL} --load-model={path}")
    assert (status, errors.count("\n")) == (1, 1)
    assert f"--load-model: {str(path)!r} {message}" in errors
    assert "Finished" not in output
    assert not Path("evil").exists()


def test_another_archive_that_is_damaged_is_refused(tmp_path):
    """A file without our seal is verified by the archive's own checksums."""
    content = bytearray((ROOT / "tests/reference_checkpoints/adagrad.pt").read_bytes())
    with zipfile.ZipFile(ROOT / "tests/reference_checkpoints/adagrad.pt") as archive:
        part = next(part for part in archive.infolist() if part.filename.endswith("data/7"))
    content[part.header_offset + 200] ^= 1  # the header is padded to 64 bytes
    path = tmp_path / "theirs.pt"
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == part.filename
    with pytest.raises(RunError, match="is damaged, or no checkpoint"):
        read_file(str(path))


MUTATIONS = int(os.environ.get("DLRM_TEST_MUTATIONS", 60))


def check_same_or_refused(result: tuple[int, str, str], expected_lines: list[str], what: str) -> None:
    """Asserts that a run printed the expected lines, or was refused in one line."""
    status, output, errors = result
    if status == 0:
        assert (lines(output), errors) == (expected_lines, ""), what
    else:
        assert status in (1, 2), what
        assert re.fullmatch(r"dlrm_s_pytorch.py: error: --load-model: [ -~]+\n", errors), what
        assert "Finished" not in output, what


def test_a_mutated_file_loads_as_it_was_or_is_refused(script, tmp_path):
    path, generator = tmp_path / "m.pt", random.Random(3)
    flags = f"{SMALL} --optimizer=adagrad --print-freq=4 "
    assert script(f"{flags.replace('nepochs=2', 'nepochs=1')} --save-model={path}")[0] == 0
    resuming = f"{flags} --load-model={path} --resume"
    whole = lines(script(resuming)[1])
    content, state = path.read_bytes(), torch.load(path, weights_only=True)
    for what, damaged in damaged_bytes(content, generator, MUTATIONS // 3):
        path.write_bytes(damaged)
        result = script(resuming)
        assert result[0] == 1, what
        check_same_or_refused(result, whole, what)
    for what, mutated in mutated_values(state, generator, MUTATIONS - MUTATIONS // 3):
        path.unlink()
        write_sealed(path, mutated)
        check_same_or_refused(script(resuming), whole, what)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--arch-embedding-size=30-20-6",
            "emb_l.2.weight is (5, 2) in the checkpoint, but (6, 2) in the model; see --a",
        ),
        ("--arch-embedding-size=30-20-5-4", "the checkpoint has no emb_l.3.weight"),
        ("--arch-embedding-size=30-20", "the model has no emb_l.2.weight, which is in the checkpoint; see --arch-emb"),
        ("--arch-mlp-top=5-1", "see --arch-mlp-top"),
        ("--resume --optimizer=sgd", "the run that is to go on had --optimizer=adagrad, not sgd"),
        ("--resume --optimizer=adagrad --numpy-rand-seed=5", "had --numpy-rand-seed=123, not 5"),
        ("--resume --optimizer=adagrad --num-batches=7", "had --num-batches=6, not 7"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(flags, message, checkpoint, script):
    status, output, errors = script(f"{SMALL} --load-model={checkpoint} {flags}")
    assert status in (1, 2)
    assert errors.count("\n") == 1
    assert "--load-model: " in errors
    assert message in errors
    assert "Finished" not in output


def test_flags_that_contradict_are_refused(script):
    for flags, message in (
        ("--resume", "--resume needs --load-model or --save-model"),
        ("--save-every=3", "--save-every needs --save-model"),
        ("--resume --save-model=x --inference-only", "give --load-model alone"),
    ):
        status, _, errors = script(SMALL + flags)
        assert status == 2
        assert message in errors


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of the reference script
# ---------------------------------------------------------------------------------------------------------------------

# Written by facebookresearch/dlrm (commit 090956e) with `--mini-batch-size=4 --num-batches=6 --round-targets=True
# --learning-rate=0.1 --loss-function=bce --arch-interaction-op=dot --optimizer=...`. The files hold the
# state after the first epoch. These are the losses of the second.
SECOND_EPOCH = {
    "sgd": "0.842944 0.826067 1.069317 1.026569 0.782693 0.776385",
    "adagrad": "0.784264 0.779039 0.981540 0.963695 0.760539 0.757325",
    "rwsadagrad": "0.788094 0.779447 0.981396 0.962638 0.760475 0.756392",
}


@pytest.mark.parametrize("optimizer", SECOND_EPOCH)
def test_the_reference_scripts_checkpoint_goes_on_here(optimizer, script):
    path = ROOT / f"tests/reference_checkpoints/{optimizer}.pt"
    flags = SMALL.replace("--arch-embedding-size=30-20-5", "") + f"--optimizer={optimizer}"
    status, output, errors = script(f"{flags} --load-model={path} --resume")
    assert (status, errors) == (0, "")
    assert "Saved at: epoch = 0/1, batch = 6/6, ntbatch = 6" in output
    ours = [float(loss) for loss in re.findall(r"epoch 1, .*loss ([\d.]+)", output)]
    assert ours == pytest.approx([float(loss) for loss in SECOND_EPOCH[optimizer].split()], abs=1.5e-6)


OLD_NUMPY, NEW_NUMPY = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"


def with_other_global(path: Path, old: bytes, new: bytes) -> bytes:
    """Returns the content of a checkpoint whose pickle names the global `new` in place of `old`."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(content, "w") as other:
        for part in archive.infolist():
            data = archive.read(part)
            if part.filename.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            other.writestr(part.filename, data)
    return content.getvalue()


@pytest.mark.parametrize("module", [OLD_NUMPY, NEW_NUMPY])
def test_numbers_of_old_and_new_numpy_are_read(module, tmp_path):
    """numpy 2 has renamed the module of a function that is in the pickles of the reference script."""
    state = {"epoch": 0, "loss": np.float32(0.5), "accuracy": np.float64(0.25), "nan": np.float64("nan")}
    torch.save(state, tmp_path / "numbers.pt")
    here = next(name for name in (OLD_NUMPY, NEW_NUMPY) if name in zip_part(tmp_path / "numbers.pt", "data.pkl"))
    (tmp_path / "numbers.pt").write_bytes(with_other_global(tmp_path / "numbers.pt", here, module))
    loaded = read_file(str(tmp_path / "numbers.pt"), {"epoch"})
    assert (loaded["loss"], loaded["accuracy"], loaded["nan"] != loaded["nan"]) == (0.5, 0.25, True)
    assert type(loaded["loss"]) is np.float32


def zip_part(path: Path, ending: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(ending)))


@pytest.mark.parametrize("new", [b"cnumpy._core.multiarry\n", b"cos\nsystem\n#"])
def test_other_globals_are_refused_in_our_own_words(new, script, tmp_path):
    path = tmp_path / "other.pt"
    theirs = ROOT / "tests/reference_checkpoints/adagrad.pt"
    old = next(name for name in (OLD_NUMPY, NEW_NUMPY) if name in zip_part(theirs, "data.pkl"))
    path.write_bytes(with_other_global(theirs, old, new))
    status, _, errors = script(f"{SMALL} --load-model={path}")
    assert (status, errors) == (
        1,
        f"dlrm_s_pytorch.py: error: --load-model: {str(path)!r} is no checkpoint: it holds something other than "
        "numbers, texts, tensors and collections of them\n",
    )


def test_numpy_objects_are_not_numbers():
    scalar = next(admitted for admitted in NUMPY_NUMBERS if admitted.__name__ == "scalar")
    assert scalar(np.dtype("<f8"), np.float64(0.5).tobytes()) == 0.5
    with pytest.raises(pickle.UnpicklingError):
        scalar(np.dtype("O"), bytes(8))


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_a_checkpoint_in_the_format_of_torch_before_1_6_goes_on_here(optimizer, script, tmp_path):
    theirs, path = ROOT / f"tests/reference_checkpoints/{optimizer}.pt", tmp_path / "old.pt"
    torch.save(torch.load(theirs, weights_only=False), path, _use_new_zipfile_serialization=False)
    flags = SMALL.replace("--arch-embedding-size=30-20-5", "") + f"--optimizer={optimizer} --resume"
    status, output, errors = script(f"{flags} --load-model={path}")
    assert (status, errors) == (0, "")
    assert lines(output) == lines(script(f"{flags} --load-model={theirs}")[1])
    content = path.read_bytes()
    for length in (20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        status, _, errors = script(f"{flags} --load-model={path}")
        assert (status, errors.count("\n")) == (1, 1)
        assert "is damaged, or no checkpoint" in errors


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_our_checkpoint_goes_on_in_torchs_own_optimizer(optimizer, script, tmp_path):
    """The optimizer of the reference script is torch's own, with all parameters in one group, as in its checkpoints."""
    path = tmp_path / "m.pt"
    script(f"{SMALL} --optimizer={optimizer} --save-model={path}")
    state = torch.load(path, weights_only=True)
    parameters = [torch.nn.Parameter(weight.clone()) for weight in state["state_dict"].values()]
    theirs = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[optimizer](parameters, lr=0.5)
    theirs.load_state_dict(state["opt_state_dict"])
    assert [group["lr"] for group in theirs.param_groups] == [0.1]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
        if optimizer == "adagrad":
            assert theirs.state[parameter]["step"] == 12
            assert theirs.state[parameter]["sum"].shape == parameter.shape
    theirs.step()


def test_a_torch_save_of_another_protocol_does_not_matter(script, tmp_path, monkeypatch):
    """A Gaudi's lazy mode replaces `torch.save` by one whose default protocol is 4."""
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args, **more: save(*args, **{"pickle_protocol": 4} | more))
    assert script(f"{SMALL} --save-model={tmp_path / 'm.pt'}")[0] == 0
    assert zip_part(tmp_path / "m.pt", "data.pkl").startswith(b"\x80\x02")
    assert read_file(str(tmp_path / "m.pt"))["epoch"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

# Runs the trainer and prints the most memory that was private to it, which the mapped pages of a file are not.
MEMORY = """
import sys, threading, time
import dlrm_s_pytorch
most = 0
def watch():
    global most
    while True:
        with open("/proc/self/status") as status:
            most = max(most, *(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon")))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
status = dlrm_s_pytorch.main(sys.argv[1].split())
print(most)
sys.exit(status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_no_second_copy_of_the_tables_is_made(tmp_path):
    table = 4 * 16 * 1_500_000
    flags = "--arch-embedding-size=1500000 --arch-sparse-feature-size=16 --arch-mlp-bot=4-16 --num-batches=2 "

    def run(more: str) -> int:
        command = [sys.executable, "-c", MEMORY, flags + more]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        return int(result.stdout.split()[-1])

    limit = run("") + table // 4
    path = tmp_path / "m.pt"
    assert run(f"--save-model={path}") < limit
    assert run(f"--load-model={path} --resume --nepochs=2") < limit


def test_a_checkpoint_from_before_the_package_goes_on(script, tmp_path):
    """A file that the trainer wrote at iteration 6 of 8 when its modules still stood side by side (commit 2a44cb4)."""
    path = Path(__file__).with_name("reference_checkpoints") / "before_the_package.pt"
    flags = (
        "--mini-batch-size=4 --num-batches=8 --optimizer=adagrad --learning-rate=0.1 --arch-embedding-size=30-20-5 "
        "--print-freq=5 "
    )
    status, output, errors = script(f"{flags} --resume --load-model={path}")
    assert (status, errors) == (0, "")
    assert "Finished training it 8/8 of epoch 0, -1.00 ms/it, loss 0.705736, accuracy 41.667 %" in output
    assert script(flags)[1].splitlines()[-1] == output.splitlines()[-1]
