"""On one host, no process of a run can be reached from another host, and none outlives its launcher."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_distributed import ENDLESS, NEEDS_MPI, QUIET, WHY_NO_MPI, wait_for_line

from dlrm.distributed.launch import LaunchJob, commands

LISTENING = "0A"  # in /proc/net/tcp
PRTERUN = "prterun"  # mpirun of Open MPI 5, whose own port is on all interfaces: no parameter changes that
LAUNCHERS = ["torchrun", pytest.param("mpirun", marks=NEEDS_MPI)]


def descendants(pid: int) -> list[int]:
    """Returns the process ids of all children of a process, their children, and so on."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *descendants(child)]
    return found


def listening_addresses(pid: int) -> list[str]:
    """Returns the addresses on which a process accepts TCP connections."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            links.append(os.readlink(descriptor))
    sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENING and inode in sockets:
                words = bytes.fromhex(local.split(":")[0])  # of 32 bits each, in this machine's order of bytes
                parts = [words[start : start + 4] for start in range(0, len(words), 4)]
                packed = b"".join(part[::-1] if sys.byteorder == "little" else part for part in parts)
                addresses.append(str(ipaddress.ip_address(packed)))
    return addresses


def is_alive(pid: int) -> bool:
    """Says whether a process still runs. One that was killed has no memory left, even before its parent knows."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def running(launcher: str) -> Iterator[subprocess.Popen]:
    """Yields a launcher of two ranks that train without an end."""
    command = [sys.executable, str(ROOT / "demo_dlrm.py"), *ENDLESS.split(), "--world_size=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    run = subprocess.Popen([*command, f"--launcher={launcher}"], env=QUIET, text=True, **pipes)
    try:
        wait_for_line(run)
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_of_one_host_listen_on_loopback_only(launcher):
    with running(launcher) as run:
        time.sleep(1)
        everyone = [run.pid, *descendants(run.pid)]
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in everyone}
        addresses = {pid: listening_addresses(pid) for pid in everyone}
    assert any(addresses.values())
    for pid, found in addresses.items():
        for address in found:
            assert names[pid] == PRTERUN or ipaddress.ip_address(address).is_loopback, (names[pid], address)


@pytest.mark.parametrize(
    ("launcher", "killed"), [("torchrun", "demo_dlrm.py"), *(("mpirun", name) for name in ("demo_dlrm.py", "mpirun"))]
)
def test_no_process_outlives_a_launcher_that_is_killed(launcher, killed):
    if launcher == "mpirun" and WHY_NO_MPI:
        pytest.skip(WHY_NO_MPI)
    with running(launcher) as run:
        others = descendants(run.pid)
        assert len(others) >= 2
        os.kill(others[0] if killed == "mpirun" else run.pid, signal.SIGKILL)
        ending = time.monotonic() + 10
        while any(map(is_alive, others)):
            assert time.monotonic() < ending, [pid for pid in others if is_alive(pid)]
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("hosts", "rendezvous"), [((), "loopback"), (("one",), "loopback"), (("one", "two"), "static")]
)
def test_no_rendezvous_of_torchrun_unpickles_what_others_send(hosts, rendezvous):
    """The rendezvous `c10d` unpickles. It also has a timer that may print "Exception ignored" after Ctrl-C."""
    for command in commands(LaunchJob(2, hosts=hosts), ["program.py"], {}):
        assert f"--rdzv-backend={rendezvous}" in command
        assert "--standalone" not in command
