"""Tests of checkpoints of several ranks, from which any number of ranks goes on, with any placement of the tables."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from distributed_worker import options_of, train
from mutations import damaged_bytes, mutated_values
from test_checkpoint import FOREIGN, MUTATIONS, SECOND_EPOCH, check_same_or_refused, content_of
from test_checkpoint import SMALL as PUBLIC
from test_distributed import NEEDS_MPI, QUIET, check_equal, free_port
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dlrm.checkpoint.archive import read_file, write_sealed
from dlrm.checkpoint.checkpoint import latest
from dlrm.checkpoint.file import Shard
from dlrm.checkpoint.folder import CheckpointFolder, write_folder
from dlrm.checkpoint.location import MANIFEST, reserved
from dlrm.errors import RunError
from dlrm.system.signals import ANNOUNCEMENT

SMALL = (
    "--mini-batch-size=12 --num-batches=8 --round-targets --learning-rate=0.1 --arch-sparse-feature-size=4 "
    "--arch-mlp-bot=5-6-4 --arch-mlp-top=8-1 --arch-embedding-size=40-30-20 --device=cpu "
)
CASES = {
    "rows": "--sharding=row --optimizer=adagrad --print-freq=3",
    "columns": "--sharding=column --optimizer=adagrad --print-freq=3 --lr-num-warmup-steps=5 --lr-decay-start-step=7 "
    "--lr-num-decay-steps=4",
    "tables": "--sharding=table --optimizer=sgd",
    "one table": "--sharding=auto --arch-embedding-size=50 --optimizer=adagrad --print-freq=3",
    "row-wise": "--sharding=row --optimizer=rwsadagrad --print-freq=3",
    "bf16 tables": "--sharding=row --optimizer=adagrad --table-data-type=bf16 --test-freq=3",
    "accumulation": "--sharding=column --optimizer=adagrad --mlperf-grad-accum-iter=2 --print-freq=3",
    "ranks without a table": "--sharding=auto --arch-embedding-size=1 --optimizer=adagrad",
}
SIZES = (1, 2, 3)
SAVING = "--save-model={path} --save-every=5"  # then at 5 and at 8


class Forking:
    """A process of `fork_ranks.py`, which starts ranks. Their output goes to files in a folder."""

    def __init__(self, folder: Path):
        self._folder, self._runs = folder, 0
        command = [sys.executable, str(Path(__file__).with_name("fork_ranks.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=QUIET)

    def start(self, size: int, program: str, arguments: Sequence[str], largest_file: int = 0) -> list[int]:
        """Starts a run, after the run before it has ended. Returns the process ids of its ranks."""
        self._runs += 1
        self._output = str(self._folder / f"run-{self._runs}-")
        run = {"size": size, "port": free_port(), "program": program, "arguments": arguments}
        self.process.stdin.write(json.dumps(run | {"output": self._output, "largest_file": largest_file}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self) -> list[int]:
        """Waits for the end of the run. Returns the exit statuses of its ranks."""
        return json.loads(self.process.stdout.readline())

    def output(self, rank: int = 0) -> str:
        path = Path(f"{self._output}{rank}.out")
        return path.read_text() if path.exists() else ""

    def errors(self, rank: int = 0) -> str:
        return Path(f"{self._output}{rank}.err").read_text()

    def wait_for_line(self, start: str = "Finished") -> None:
        ending = time.monotonic() + 60
        while start not in self.output():
            assert time.monotonic() < ending
            time.sleep(0.001)

    def results(self, size: int, cases: list[str]) -> list[dict]:
        """Trains each case on `size` ranks. Returns what rank 0 has after each of them."""
        if size == 1:
            return [train(options_of(case)) for case in cases]
        files = [str(self._folder / "cases.json"), str(self._folder / "results.pt")]
        Path(files[0]).write_text(json.dumps(cases))
        self.start(size, "worker", files)
        assert self.wait() == [0] * size, self.errors()
        return torch.load(files[1])


@pytest.fixture(scope="module")
def forking(tmp_path_factory) -> Iterator[Forking]:
    forking = Forking(tmp_path_factory.mktemp("ranks"))
    yield forking
    forking.process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def path_of(folder: Path, case: str, size: int) -> Path:
    return folder / f"{case.replace(' ', '-')}-of-{size}"


@pytest.fixture(scope="module")
def uninterrupted(folder, forking) -> dict[tuple[str, int], dict]:
    """Results of runs that also save, by case and number of ranks."""
    results = {}
    for size in SIZES:
        cases = [f"{SMALL}{CASES[case]} {SAVING.format(path=path_of(folder, case, size))}" for case in CASES]
        results |= zip([(case, size) for case in CASES], forking.results(size, cases), strict=True)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


def printed(output: str) -> list[str]:
    return re.findall(r"^Finished .*$", output, re.MULTILINE)


def end_of(whole: dict, rest: dict) -> dict:
    """Returns the results of the run `whole`, with only as many of its last losses and scores as `rest` has."""
    printed = {name: values for name, values in whole.items() if name in ("losses", "scores")}
    return whole | {name: values[len(values) - len(rest[name]) :] for name, values in printed.items()}


@pytest.mark.parametrize("readers", SIZES)
def test_any_number_of_ranks_goes_on_from_any_other(readers, uninterrupted, folder, forking):
    runs = [(case, writers) for case in CASES for writers in SIZES]
    flags = [f"{SMALL}{CASES[case]} --load-model={path_of(folder, case, n)}.previous --resume" for case, n in runs]
    for (case, writers), result in zip(runs, forking.results(readers, flags), strict=True):
        assert re.search(r"Saved at: epoch = 0/1, batch = [56]/8", result["lines"])
        whole = uninterrupted[case, writers]
        rest = len(result["losses"])
        assert 1 <= rest <= 3
        check_equal(result, end_of(uninterrupted[case, 1], result))
        if readers == writers:
            assert printed(result["lines"]) == printed(whole["lines"])[-rest:]
            for name, weight in whole["weights"].items():
                assert torch.equal(result["weights"][name], weight)
            for moment, other in zip(result["moments"], whole["moments"], strict=True):
                assert torch.equal(moment, other)


def test_the_reference_scripts_checkpoints_go_on_on_two_ranks(forking):
    folder = ROOT / "tests/reference_checkpoints"
    flags = f"{PUBLIC} --arch-embedding-size=4-3-2 --device=cpu --sharding=row --resume"
    optimizers = ("sgd", "adagrad")
    runs = [f"{flags} --optimizer={name} --load-model={folder / name}.pt" for name in optimizers]
    for name, result in zip(optimizers, forking.results(2, runs), strict=True):
        assert result["losses"] == pytest.approx([float(loss) for loss in SECOND_EPOCH[name].split()], abs=3e-6)


@pytest.mark.parametrize("case", ["rows", "columns", "one table"])
def test_torchs_own_tool_reads_a_folder(case, uninterrupted, folder, tmp_path):
    dcp_to_torch_save(str(path_of(folder, case, 3)), str(tmp_path / "whole.pt"))
    whole, expected = torch.load(tmp_path / "whole.pt"), uninterrupted[case, 3]
    for name, weight in expected["weights"].items():
        assert torch.equal(whole.pop(name), weight)
    for table, moment in enumerate(expected["moments"]):
        assert torch.equal(whole.pop(f"emb_l.{table}.weight.sum"), moment)
    assert {name.split(".")[0] for name in whole} == {"bot_l", "top_l"}


def test_a_file_takes_a_folders_place_and_is_kept(uninterrupted, folder, script, tmp_path):
    path = shutil.copytree(path_of(folder, "rows", 2), tmp_path / "m")
    status, output, errors = script(f"{SMALL}{CASES['rows']} --nepochs=2 --save-model={path} --resume")
    assert (status, errors) == (0, "")
    assert "Saved at: epoch = 0/1, batch = 8/8" in output
    assert path.is_file()
    assert latest(str(path)) == str(path)
    CheckpointFolder(f"{path}.previous", 0, 1)
    assert "Nothing is left to train." in script(f"{SMALL}{CASES['rows']} --load-model={path}.previous --resume")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Signals and kills
# ---------------------------------------------------------------------------------------------------------------------

ENDLESS = SMALL + "--nepochs=99999 --optimizer=adagrad "


def position(lines: str) -> tuple[int, int]:
    """Returns the epoch and the iteration of the last of the printed lines."""
    iteration, epoch = re.findall(r"it (\d+)/8 of epoch (\d+)", lines)[-1]
    return int(epoch), int(iteration)


def reached(state: dict) -> tuple[int, int]:
    return state["epoch"], state["iter"]


@pytest.mark.parametrize(
    ("launcher", "number", "status", "line"),
    [
        ("torchrun", signal.SIGTERM, 143, "dlrm_s_pytorch.py: terminated\n"),
        pytest.param("mpirun", signal.SIGTERM, 143, "dlrm_s_pytorch.py: terminated\n", marks=NEEDS_MPI),
        pytest.param("mpirun", signal.SIGINT, 130, ANNOUNCEMENT + "dlrm_s_pytorch.py: interrupted\n", marks=NEEDS_MPI),
    ],
)
def test_a_signal_to_the_launcher_saves_and_ends_the_run(launcher, number, status, line, tmp_path):
    path = tmp_path / "m"
    command = [sys.executable, str(ROOT / "demo_dlrm.py"), *ENDLESS.split(), "--world_size=2", f"--save-model={path}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    run = subprocess.Popen([*command, f"--launcher={launcher}"], env=QUIET, text=True, **pipes)
    try:
        first_line = next(line for line in run.stdout if line.startswith("Finished"))
        os.killpg(run.pid, number)  # as a terminal does
        output, errors = run.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == status
    assert errors == line or (launcher == "mpirun" and errors.startswith(line))  # which adds a report of its own
    assert output.endswith(f"Saving model to {path}\n")
    assert reached(CheckpointFolder(str(path), 0, 1).state) == position(first_line + output)


@pytest.mark.parametrize("interrupted", [0, 1])
def test_a_signal_to_one_rank_saves_and_ends_the_run(interrupted, forking, tmp_path):
    path = tmp_path / "m"
    pids = forking.start(2, "train", [*ENDLESS.split(), f"--save-model={path}"])
    forking.wait_for_line()
    os.kill(pids[interrupted], signal.SIGINT)
    assert forking.wait() == [130, 130]
    announced = "" if interrupted else ANNOUNCEMENT  # by rank 0 alone
    assert (forking.errors(0), forking.errors(1)) == (announced + "dlrm_s_pytorch.py: interrupted\n", "")
    assert forking.output().endswith(f"Saving model to {path}\n")
    assert reached(CheckpointFolder(str(path), 0, 1).state) == position(forking.output())


KILLING_SECONDS = float(os.environ.get("DLRM_TEST_KILLING_SECONDS", 25)) / 4


def kill_at_random(forking: Forking, flags: str, generator: random.Random) -> str:
    """Kills one of two ranks, then, as a launcher does, the other. Returns what rank 0 printed until then."""
    first, second = generator.sample(forking.start(2, "train", flags.split()), 2)
    forking.wait_for_line(generator.choice(("Finished", "Saving")))
    time.sleep(generator.uniform(0, 0.2))
    os.kill(first, signal.SIGKILL)
    time.sleep(generator.uniform(0, 0.05))
    os.kill(second, signal.SIGKILL)
    assert set(forking.wait()) <= {-signal.SIGKILL, 1}  # 1: had seen that the other is gone
    return forking.output()


def test_a_rank_killed_at_random_moments_loses_nothing_that_was_reported(forking, script, tmp_path):
    path, generator, promised, kills, lines = tmp_path / "m", random.Random(1), (0, 0), 0, set()
    saving = f"{ENDLESS} --save-model={path} --save-every=1 --resume"
    ending = time.monotonic() + KILLING_SECONDS
    while time.monotonic() < ending or kills < 5:
        output = kill_at_random(forking, saving, generator)
        kills += 1
        if found := re.search(r"Saved at: epoch = (\d+)/99999, batch = (\d+)/8", output):
            assert tuple(map(int, found.groups())) >= promised
        if saved := latest(str(path)):
            state = CheckpointFolder(saved, 0, 1).state
            assert iterations(reached(state)) >= iterations(promised) + output.count("Saving model to")
            promised = reached(state)
        lines |= set(printed(output))
    assert iterations(promised) >= 2
    one = losses_by_position(printed(script(ENDLESS.replace("=99999", f"={promised[0] + 2}"))[1]))
    several = losses_by_position(lines)
    assert several == {where: pytest.approx(one[where], abs=1e-3) for where in several}


def iterations(position: tuple[int, int]) -> int:
    return 8 * position[0] + position[1]


def losses_by_position(lines: Iterable[str]) -> dict[tuple[int, int], float]:
    return {position(line): float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines}


def test_a_second_run_of_several_ranks_is_refused(forking, tmp_path):
    path = tmp_path / "m"
    with reserved(str(path)):
        forking.start(2, "train", [*SMALL.split(), f"--save-model={path}"])
        assert forking.wait() == [2, 2]
    message = f"--save-model: cannot write {str(path)!r}: process {os.getpid()} on "
    assert message in forking.errors(0)
    assert forking.errors(0).count("\n") == 1
    assert forking.errors(1) == ""
    assert [*tmp_path.iterdir()] == []


# ---------------------------------------------------------------------------------------------------------------------
# Disks, damaged and foreign folders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1550, 5000, 8000])
def test_a_file_that_can_not_grow_leaves_the_checkpoint_before(size, uninterrupted, folder, forking, tmp_path):
    """Shards have 1600 bytes or more, `.metadata` has 6000, the manifest 10000, so each size stops another file."""
    path = shutil.copytree(path_of(folder, "rows", 2), tmp_path / "m")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert 5000 < len(before[".metadata"]) < 8000 < len(before[MANIFEST])
    flags = f"{SMALL}{CASES['rows']} --nepochs=2 --save-model={path} --resume"
    forking.start(2, "train", flags.split(), largest_file=size)
    assert forking.wait() == [1, 1]
    error = f"--save-model: cannot write {str(path)!r}: File too large; the one before it stays"
    assert forking.errors(0) == f"dlrm_s_pytorch.py: error: {error}\n"
    assert forking.errors(1) == ""
    assert "Saving" not in forking.output()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_leaves_the_checkpoint_before(uninterrupted, folder, forking, small_disk):
    path = shutil.copytree(path_of(folder, "rows", 2), small_disk("400k") / "m")
    filler = path.with_name("other")
    with contextlib.suppress(OSError), open(filler, "wb") as file:
        for _ in range(100):
            file.write(bytes(4096))
            file.flush()
    filler.write_bytes(filler.read_bytes()[: 4096 * -10])
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    flags = f"{SMALL}{CASES['rows']} --nepochs=2 --save-model={path} --resume"
    forking.start(2, "train", flags.split())
    assert forking.wait() == [1, 1]
    assert "No space left on device; the one before it stays" in forking.errors()
    assert forking.errors().count("\n") == 1
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    filler.unlink()
    forking.start(2, "train", flags.split())
    assert forking.wait() == [0, 0]


def test_a_flipped_bit_or_a_missing_file_is_named(uninterrupted, folder, forking, tmp_path):
    path = shutil.copytree(path_of(folder, "rows", 2), tmp_path / "m")
    files = sorted(path.iterdir())
    assert len(files) > 20
    for file in files:
        content = file.read_bytes()
        for position in (0, len(content) // 3, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            file.write_bytes(damaged)
            with pytest.raises(RunError, match=re.escape(str(file))):
                CheckpointFolder(str(path), 0, 1)
        file.unlink()
        with pytest.raises(RunError, match=re.escape(file.name)):
            CheckpointFolder(str(path), 0, 1)
        file.write_bytes(content)
    CheckpointFolder(str(path), 0, 1)
    files[4].write_bytes(b"damaged")
    forking.start(2, "train", [*SMALL.split(), f"--load-model={path}"])
    assert forking.wait() == [1, 1]
    assert re.fullmatch(f"dlrm_s_pytorch.py: error: --load-model: rank .: '{files[4]}' is damaged\n", forking.errors(0))
    assert forking.errors(1) == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arch-embedding-size=40-30-21", "emb_l.2.weight is (20, 4) in the checkpoint, but (21, 4) in the model"),
        ("--arch-embedding-size=40-30", "the model has no emb_l.2.weight, which is in the checkpoint"),
        ("--arch-mlp-top=9-1", "see --arch-mlp-top"),
        ("--resume --optimizer=sgd", "the run that is to go on had --optimizer=adagrad, not sgd"),
    ],
)
def test_a_folder_of_another_run_is_refused(flags, message, uninterrupted, folder, script):
    path = path_of(folder, "rows", 3)
    status, output, errors = script(f"{SMALL}{CASES['rows']} --load-model={path} {flags}")
    assert status in (1, 2)
    assert "--load-model: " in errors
    assert message in errors
    assert errors.count("\n") == 1
    assert "Finished" not in output


def test_a_folder_that_is_no_checkpoint_is_refused(uninterrupted, folder, script, tmp_path):
    path = shutil.copytree(path_of(folder, "rows", 2), tmp_path / "m")
    (path / MANIFEST).unlink()
    status, _, errors = script(f"{SMALL} --load-model={path}")
    assert status == 1
    assert errors.endswith(
        f"{str(path)!r} is a folder without {MANIFEST}: no checkpoint, or one that was not finished\n"
    )
    status, _, errors = script(f"{SMALL} --save-model={path}")
    assert (status, errors.count("\n")) == (2, 1)
    assert "--save-model: cannot write" in errors


@pytest.fixture(scope="module")
def small_folder(folder, forking) -> Path:
    """A checkpoint of two ranks after the first epoch."""
    path = folder / "small"
    forking.start(2, "train", f"{SMALL} --sharding=row --optimizer=adagrad --save-model={path}".split())
    assert forking.wait() == [0, 0], forking.errors()
    return path


def test_a_mutated_folder_loads_as_it_was_or_is_refused(small_folder, script, tmp_path):
    path, generator = shutil.copytree(small_folder, tmp_path / "m"), random.Random(4)
    resuming = f"{SMALL} --optimizer=adagrad --sharding=row --nepochs=2 --load-model={path} --resume"
    whole = re.findall("^Finished.*$", script(resuming)[1], re.MULTILINE)
    assert len(whole) == 8
    content, state = (path / MANIFEST).read_bytes(), read_file(str(path / MANIFEST), set())
    for what, mutated in mutated_values(state, generator, MUTATIONS - MUTATIONS // 3):
        (path / MANIFEST).unlink()
        write_sealed(path / MANIFEST, mutated)
        check_same_or_refused(script(resuming), whole, what)
    (path / MANIFEST).write_bytes(content)
    for _ in range(MUTATIONS // 3):
        file = generator.choice(sorted(path.iterdir()))
        before = file.read_bytes()
        for what, damaged in damaged_bytes(before, generator, 1):
            file.write_bytes(damaged)
            check_same_or_refused(script(resuming), whole, f"{file.name}: {what}")
        file.write_bytes(before)
    check_same_or_refused(script(resuming), whole, "nothing")


def table(shards: list, shape: tuple = (40, 4)) -> dict:
    return {"shape": shape, "shards": shards}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shards: table([]), "shards do not cover"),
        (lambda shards: table(shards[:1]), "shards do not cover"),
        (lambda shards: table([*shards, shards[0]]), "shards overlap in"),
        (lambda shards: table(shards, (39, 4)), "a shard is larger than"),
        (lambda shards: table([(*shards[0][:2], "../other"), shards[1]]), "it has no file of a shard of"),
        (lambda shards: table([shards[0][:2], shards[1]]), "it has no shards of"),
        (lambda shards: table(shards, (-40, 4)), "it has no shape of"),
        (lambda shards: None, "it has no shape of"),
    ],
)
def test_shards_that_are_not_the_tensor_are_refused(change, message, small_folder, tmp_path):
    path, name = shutil.copytree(small_folder, tmp_path / "m"), "emb_l.0.weight"
    state = read_file(str(path / MANIFEST), set())
    state["tensors"][name] = change(state["tensors"][name]["shards"])
    (path / MANIFEST).unlink()
    write_sealed(path / MANIFEST, state)
    with pytest.raises(RunError, match=f"{re.escape(message)} '{name}'$"):
        CheckpointFolder(str(path), 0, 1)


def test_a_shard_of_another_shape_is_refused(small_folder, script, tmp_path):
    path, name = shutil.copytree(small_folder, tmp_path / "m"), "emb_l.0.weight"
    state = read_file(str(path / MANIFEST), set())
    file = path / state["tensors"][name]["shards"][0][2]
    torch.save(torch.zeros(1, 4), file)
    state["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / MANIFEST).unlink()
    write_sealed(path / MANIFEST, state)
    status, _, errors = script(f"{SMALL} --load-model={path}")
    assert (status, errors.count("\n")) == (1, 1)
    assert f"{str(file)!r} is no shard of {name!r} with the shape (20, 4)" in errors


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_dcps_pickle_is_not_read(uninterrupted, folder, script, tmp_path, monkeypatch):
    """The pickle is not read even if the manifest holds its SHA-256."""
    monkeypatch.chdir(tmp_path)
    path = shutil.copytree(path_of(folder, "rows", 2), tmp_path / "m")
    content = pickle.dumps(Evil())
    (path / ".metadata").write_bytes(content)
    state = read_file(str(path / MANIFEST), set())
    state["files"][".metadata"] = hashlib.sha256(content).hexdigest()
    write_sealed(path / "new", state)
    (path / "new").replace(path / MANIFEST)
    status, _, errors = script(f"{SMALL}{CASES['rows']} --load-model={path}")
    assert (status, errors) == (0, "")
    assert not Path("evil").exists()


def write_folder_on_one_rank(path: Path, whole: torch.Tensor) -> None:
    """Writes a folder with a tensor of 4 x 3 in two shards."""
    shards = [Shard("w", whole[:, :2], (0, 0), (4, 3)), Shard("w", whole[:, 2:], (0, 2), (4, 3))]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        write_folder(str(path), {"nepochs": 1, "nbatches": 1, "epoch": 0, "iter": 1}, shards, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["m", "m.previous"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_not_replaced_by_a_folder(kind, name, tmp_path):
    make, message = FOREIGN[kind]
    make(tmp_path / name)
    before = content_of(tmp_path)
    with pytest.raises(RunError, match=re.escape(message)):
        write_folder_on_one_rank(tmp_path / "m", torch.zeros(4, 3))
    assert content_of(tmp_path) == before


def test_the_folder_before_is_kept_and_the_one_before_that_is_removed(tmp_path):
    for value in range(3):
        write_folder_on_one_rank(tmp_path / "m", torch.full((4, 3), float(value)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.previous"]
    for name, value in (("m", 2), ("m.previous", 1)):
        loaded = torch.zeros(4, 3)
        CheckpointFolder(str(tmp_path / name), 0, 1).copy_to(Shard("w", loaded, (0, 0), (4, 3)))
        assert loaded.unique().tolist() == [value]


def test_a_torch_save_of_another_protocol_does_not_matter(tmp_path, monkeypatch):
    """A Gaudi's lazy mode replaces `torch.save` by one whose default protocol is 4."""
    save, whole = torch.save, torch.arange(12.0).reshape(4, 3)
    monkeypatch.setattr(torch, "save", lambda *args, **more: save(*args, **{"pickle_protocol": 4} | more))
    write_folder_on_one_rank(tmp_path / "m", whole)
    loaded = torch.zeros(4, 3)
    CheckpointFolder(str(tmp_path / "m"), 0, 1).copy_to(Shard("w", loaded, (0, 0), (4, 3)))
    assert torch.equal(loaded, whole)
    files = sorted((tmp_path / "m").glob("*.distcp"))
    assert len(files) == 2
    assert all(file.stat().st_size < 2000 for file in files)  # without the storage of the other shard


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

# Writes a table of 64 MB in two shards, reads it as a whole, and prints how much memory that took.
MEMORY = """
import sys, threading, time
import torch
import torch.distributed as dist
from dlrm.checkpoint.file import Shard
from dlrm.checkpoint.folder import CheckpointFolder, write_folder

def private_memory():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    global most
    while True:
        most = max(most, private_memory())
        time.sleep(0.001)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
halves = [torch.full((1_000_000, 8), float(value)) for value in (1, 2)]
whole = torch.full((2_000_000, 8), 3.0)
most = before = private_memory()
threading.Thread(target=watch, daemon=True).start()
run = {"nepochs": 1, "nbatches": 1, "epoch": 0, "iter": 1}
shards = [Shard("w", half, (1_000_000 * number, 0), whole.shape) for number, half in enumerate(halves)]
write_folder(sys.argv[1], run, shards, dist.group.WORLD)
CheckpointFolder(sys.argv[1], 0, 1).copy_to(Shard("w", whole, (0, 0), whole.shape))
taken = most - before
assert [half.unique().item() for half in whole.split(1_000_000)] == [1, 2]
print(taken)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_no_second_copy_of_a_table_is_made(tmp_path):
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "m")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1]) < 8_000_000  # some releases of gloo print a line as well
