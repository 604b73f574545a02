"""A rank that waits for too long ends with one line, wherever it waits."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT
from hpu_emulator.process import environment
from test_distributed import ENDLESS, finish, free_port, wait_for_line

from dlrm.distributed.watchdog import Watchdog


def test_a_block_that_takes_too_long_is_named():
    said = queue.Queue()
    with Watchdog(3, 0.2, said.put) as watchdog, watchdog.watch("an outer block"), watchdog.watch("an inner block"):
        line = said.get(timeout=60)
    assert line.startswith("rank 3: an outer block takes longer than 0.2 s, ")
    assert line.endswith(", so the run ends")


def test_the_place_is_the_innermost_one_of_this_program():
    said = queue.Queue()

    def wait(watchdog):
        from dlrm.distributed.ranks import Ranks

        with watchdog.watch("a collective"):
            Ranks.run_on_all(None, lambda: said.get(timeout=60))

    with Watchdog(0, 0.2, lambda line: (said.put(line), lines.append(line))) as watchdog:
        lines = []
        with pytest.raises(AttributeError):  # after the wait
            wait(watchdog)
    assert ", in run_on_all (dlrm/distributed/ranks.py, line " in lines[0]


def test_blocks_that_end_in_time_are_left_alone():
    said = []
    with Watchdog(0, 0.5, said.append) as watchdog:
        for _ in range(10):
            with watchdog.watch("a step"):
                time.sleep(0.1)
        time.sleep(0.7)  # outside of a block
    assert said == []


def test_a_thread_that_keeps_pythons_lock_ends_the_process_too():
    program = """
        import ctypes
        from dlrm.distributed.watchdog import Watchdog
        with Watchdog(0, 1, print) as watchdog, watchdog.watch("a wait"):
            import time; time.sleep(0.6)
            ctypes.PyDLL(None).sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Timeout (0:00:01)!")


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_emulated_gaudis_that_wait_for_a_stopped_rank_end(mode):
    """Its collectives have no timeouts. The other line is gloo's, in which ranks ask each other for signals."""
    port = free_port()
    command = [sys.executable, str(ROOT / "dlrm_s_pytorch.py"), *ENDLESS.split(), "--device=hpu", f"--mode={mode}"]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen(
            [*command, "--dist-timeout=8"],
            env=environment(mode, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1", **variables),
            **pipes,
        )
        for rank in (0, 1)
    ]
    try:
        wait_for_line(ranks[0])
        os.kill(ranks[1].pid, signal.SIGSTOP)
        status, errors = finish(ranks[0])
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert status == 1
    *notes_of_the_plugin, line = errors.splitlines()
    assert not any("rank" in note for note in notes_of_the_plugin)
    assert line.startswith("dlrm_s_pytorch.py: error: rank 0: ")
    assert "takes longer than 8 s, in " in line or "rank 1 no longer answered" in line
