"""Lets several ranks find each other, check that they are alike, and end together.

torch.distributed does the work. This file adds the store in which ranks meet, whoever starts them, and one line on
stderr for everything that goes wrong: a port in use, a host out of reach, ranks with different flags or sources, a rank
that dies.

A store is a small server of torch, in which ranks put short texts for each other. Nothing that this program puts there
or sends from rank to rank is a pickle, except what `torch.distributed.checkpoint` sends by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from dlrm.data.data_set import DataSet
from dlrm.distributed.launch import Launch, is_loopback, master, slurm_master
from dlrm.distributed.placement import check_sharding, make_plan
from dlrm.distributed.ranks import ManyRanks, OneRank, Ranks, expected_memory_per_rank, gather_objects
from dlrm.distributed.torchrun import LOOPBACK, loopback_store
from dlrm.distributed.watchdog import Watchdog
from dlrm.errors import LocalError, RunError, UsageError
from dlrm.options import Options, flag
from dlrm.system.endings import print_error
from dlrm.system.signals import Stopped

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
SIOCGIFADDR = 0x8915  # the request by which Linux tells the address of a network interface

# ---------------------------------------------------------------------------------------------------------------------
# Joining and leaving
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def join_ranks(data_set: DataSet, launch: Launch, backend) -> Iterator[Ranks]:
    """Yields this rank's view of all ranks of the run. Raises UsageError or RunError if the ranks do not meet, are not
    alike, or lose each other."""
    options = data_set.options
    if launch.size == 1:
        yield OneRank(options, launch)
        return
    check_sharding(options, launch.size)
    store, host = join(options, launch, backend)
    with faults_named(launch, store):
        check_same(gather_objects(rank_fingerprint(data_set), host))
        room = min(gather_objects(expected_memory_per_rank(launch, backend), host))
        with contextlib.ExitStack() as watched:
            ranks = ManyRanks(options, launch, make_plan(options, launch.size, room), backend, host)
            if not backend.collectives_time_out:
                end = partial(end_waiting_rank, store)
                ranks.watch = watched.enter_context(Watchdog(launch.rank, options.dist_timeout, end)).watch
            yield ranks
        dist.barrier(host)
    dist.destroy_process_group()


@contextlib.contextmanager
def faults_named(launch: Launch, store: dist.Store) -> Iterator[None]:
    """Turns the failure of a collective into a LocalError that names the ranks that are gone."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(RuntimeError):
            store.set("interrupted", "")
        raise
    except RuntimeError as error:
        if not is_from_network(error):
            raise
        raise first_to_speak(store, LocalError(lost(launch, store, error))) from error
    except LocalError as error:
        raise first_to_speak(store, error) from error


def first_to_speak(store: dist.Store, error: LocalError) -> BaseException:
    """Returns `error` on the first rank that calls this, so that one rank prints it. Returns SystemExit on others."""
    with contextlib.suppress(RuntimeError):
        if answer(store.add, "spoken", 1) > 1:
            time.sleep(1)  # if this rank ended first, the launcher might end the other one before it prints
            return SystemExit(1)
    return error


def end_waiting_rank(store: dist.Store, message: str) -> NoReturn:
    """Ends the process while another thread of it waits, with a line on the first rank that calls this."""
    speaks = not isinstance(first_to_speak(store, LocalError(message)), SystemExit)
    if speaks:
        print_error("dlrm_s_pytorch.py", message)
    sys.stderr.flush()
    os._exit(1)


def leave(status: int) -> NoReturn:
    """Ends the process with an exit status.

    If the ranks did not end together, threads of torch's process group are still at work. They could crash an
    interpreter that shuts down, so the process ends without shutting it down.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def check_launch(options: Options, given: dict, launch: Launch) -> None:
    """Raises UsageError if the flags ask for other ranks than have been started. `given` holds the flags of the command
    line as `{field of Options: value}`."""
    if "world_size" in given and options.world_size != launch.size:
        how = (
            f"{launch.by} started {launch.size}" if launch.by else "start it by demo_dlrm.py, torchrun, mpirun or srun"
        )
        raise UsageError(f"--world_size={options.world_size}: {how}")
    if options.distributed and not launch.by:
        raise UsageError("--distributed: start it by demo_dlrm.py, torchrun, mpirun or srun")


@contextlib.contextmanager
def rank_0_speaks(launch: Launch, print_all_ranks: bool) -> Iterator[None]:
    """Silences the ranks other than 0 on stdout, unless `--print-all-ranks`, and lets rank 0 alone report an error that
    every rank has.

    Before the ranks have met, a rank cannot ask the others whether they have the same error. It waits: if rank 0 has
    it, too, rank 0 ends, and the launcher ends the others before they print.
    """
    try:
        with contextlib.ExitStack() as stack:
            if launch.rank and not print_all_ranks:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    except LocalError:
        raise
    except (UsageError, RunError, KeyboardInterrupt, Stopped) as error:
        if not launch.rank:
            raise
        if isinstance(error, (UsageError, RunError)) and not dist.is_initialized():
            time.sleep(5)
            raise type(error)(f"rank {launch.rank}: {error}") from error
        time.sleep(1)  # if this rank ended first, the launcher might end rank 0 before it prints
        status = error.exit_status if isinstance(error, Stopped) else {UsageError: 2, RunError: 1}.get(type(error), 130)
        raise SystemExit(status) from error


def join(options: Options, launch: Launch, backend) -> tuple[dist.Store, dist.ProcessGroup]:
    """Starts torch.distributed. Returns the store of the ranks, and their group for tensors on the host. Raises
    UsageError or LocalError, naming address and port, if the ranks do not meet."""
    timeout = timedelta(seconds=options.dist_timeout)
    address, port = "", 0
    try:
        (address, port), store = meeting_point(launch, timeout)
        choose_interface(launch, address)
        store.set(f"here/{launch.rank}", socket.gethostname())
        name = process_group_backend(options, backend)
        dist.init_process_group(name, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
        host = dist.group.WORLD if name == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    except dist.DistError as error:
        raise meeting_failure(launch, options, address, port, str(error)) from error
    return store, host


def meeting_point(launch: Launch, timeout: timedelta) -> tuple[tuple[str, int], dist.Store]:
    """Returns the address and the port of the store in which the ranks meet, and the store."""
    if launch.by == "mpirun":
        return meeting_by_mpi(launch, timeout)
    address, port = slurm_master() if launch.by == "srun" else master()
    if launch.by in ("MVAPICH", "mpiexec") and not launch.on_one_host and "MASTER_ADDR" not in os.environ:
        raise UsageError(f"MASTER_ADDR is not set: ranks on several hosts that {launch.by} has started need it")
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not by_agent and (launch.on_one_host or is_loopback(address)):
        address = LOOPBACK
    try:
        store = open_store(address, port, launch, timeout, serves=launch.rank == 0 and not by_agent)
    except dist.DistError as error:
        raise dist.DistNetworkError(f"{address}, port {port}: {error}") from error
    return (address, port), dist.PrefixStore("dlrm", store)


def meeting_by_mpi(launch: Launch, timeout: timedelta) -> tuple[tuple[str, int], dist.Store]:
    """Opens the store on a free port of rank 0, and tells the others by MPI where it is. Returns what `meeting_point`
    returns."""
    if launch.on_one_host:  # MPI would listen on all interfaces
        os.environ.setdefault("OMPI_MCA_pml", "ob1")
        os.environ.setdefault("OMPI_MCA_btl", "^tcp")
    from mpi4py import MPI

    address = LOOPBACK if launch.on_one_host else os.environ.get("MASTER_ADDR") or own_address()
    store = open_store(address, 0, launch, timeout, serves=True) if launch.rank == 0 else None
    address, port = MPI.COMM_WORLD.bcast((address, store.port) if store else None)
    if store is None:
        store = open_store(address, port, launch, timeout, serves=False)
    return (address, port), dist.PrefixStore("dlrm", store)


def open_store(address: str, port: int, launch: Launch, timeout: timedelta, serves: bool) -> dist.TCPStore:
    """Returns the store of the ranks. Its server is in this process if `serves`, else at `address`. The server listens
    on 127.0.0.1 if `address` is a loopback address, else on all interfaces. Raises DistError if there is no connection
    or the port is in use."""
    if not serves:
        return dist.TCPStore(address, port, launch.size, False, timeout, False)
    if not is_loopback(address):
        return dist.TCPStore(address, port, launch.size, True, timeout, False)
    try:
        return loopback_store(port, launch.size, timeout)
    except OSError as error:
        name = errno.errorcode.get(error.errno, "")
        raise dist.DistNetworkError(f"{name}: {error.strerror}") from error


def own_address() -> str:
    """Returns the address at which other hosts reach this one: the address of its host name, unless that is a loopback
    address, which many hosts give to their own name."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses the address of the way out
        return probe.getsockname()[0]
    return "127.0.0.1"


def choose_interface(launch: Launch, address: str) -> None:
    """Sets the network interface on which ranks listen for each other, unless the user has set it: the loopback
    interface if all ranks are on this host, else the one that leads to `address`."""
    on_one_host = launch.on_one_host or is_loopback(address)
    if interface := interface_towards(LOOPBACK if on_one_host else address):
        for backend in ("GLOO", "NCCL", "HCCL") if on_one_host else ("GLOO",):
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", interface)


def interface_towards(address: str) -> str:
    """Returns the name of the network interface by which this host reaches an address, or "" if there is none. By
    itself, gloo takes the interface of the host's name, which may lead nowhere."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24]) == own:
                    return name
    return ""


def process_group_backend(options: Options, backend) -> str:
    """Returns the torch.distributed backend for the device's tensors. Raises UsageError if torch does not have it."""
    backend.prepare_collectives()
    usual = backend.process_group
    chosen = options.dist_backend or usual
    if not dist.is_backend_available(chosen):
        raise UsageError(
            f"--dist-backend={chosen}: torch has no such back end here; {backend.device.type} takes {usual}"
        )
    return chosen


def meeting_failure(launch: Launch, options: Options, address: str, port: int, message: str) -> Exception:
    """Returns the error that tells the user why ranks did not meet, from torch's own message."""
    text = " ".join(message.split())
    if "EADDRINUSE" in text:
        return UsageError(f"rank {launch.rank}: MASTER_PORT is in use ({text[:60]}); choose another --master-port")
    where = f" at {address}, port {port}" if address else ""
    return LocalError(
        f"rank {launch.rank}: the {launch.size} ranks did not meet{where} within {options.dist_timeout} s "
        f"(--dist-timeout): {text[:160]}"
    )


def is_from_network(error: RuntimeError) -> bool:
    """Says whether a collective failed. torch raises RuntimeError for that, as for much else, so the text decides."""
    words = ("gloo", "hccl", "nccl", "connection", "timed out", "timeout")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def lost(launch: Launch, store: dist.Store, error: RuntimeError) -> str:
    """Returns a line that names the ranks that are gone: those that do not tell the store within 3 s that they are
    alive. Raises KeyboardInterrupt if a rank was interrupted."""
    try:
        store.set(f"alive/{launch.rank}", "")
        time.sleep(3)
        gone = [rank for rank in range(launch.size) if not answer(store.check, [f"alive/{rank}"])]
        interrupted = answer(store.check, ["interrupted"])
    except RuntimeError:
        gone, interrupted = [0], False  # rank 0 holds the store
    if interrupted:
        raise KeyboardInterrupt
    if not gone:
        return f"rank {launch.rank}: the connection between ranks broke: {str(error)[:200]}"
    names = " and ".join(f"rank {rank}" for rank in gone)
    return f"rank {launch.rank}: {names} no longer answered, so the run can't go on"


def answer(question: Callable[..., T], *arguments) -> T:
    """Returns the store's answer. Raises RuntimeError after 5 s without one.

    By itself, a TCPStore waits for a host out of reach until the kernel gives up, a quarter of an hour. The thread that
    asks may wait that long, but `leave` ends the process without it.
    """
    try:
        return futures.ThreadPoolExecutor(1).submit(question, *arguments).result(timeout=5)
    except futures.TimeoutError:
        raise RuntimeError("the store does not answer") from None


# ---------------------------------------------------------------------------------------------------------------------
# Equal ranks
# ---------------------------------------------------------------------------------------------------------------------

MAY_DIFFER = ("local_rank", "report", "print_all_ranks")


def rank_fingerprint(data_set: DataSet) -> dict[str, str]:
    """Returns what must be the same on all ranks, by name."""
    options = data_set.options
    flags = {flag(f.name): str(getattr(options, f.name)) for f in dataclasses.fields(options)}
    prints = {name: value for name, value in flags.items() if name not in map(flag, MAY_DIFFER)}
    if Path(options.load_model).is_file():
        prints["the size of --load-model"] = str(Path(options.load_model).stat().st_size)
    prints["the source"] = digest_of_source(ROOT)
    return prints | data_set.fingerprint() | {"torch": torch.__version__, "Python": sys.version.split()[0]}


def digest_of_source(root: Path) -> str:
    """Returns a hash of the paths and contents of all files that a run is made of: the programs and the package."""
    files = sorted([*root.glob("*.py"), *root.glob("dlrm/**/*.py"), *root.glob("dlrm/**/csrc/*.*")])
    parts = (part for file in files for part in (str(file.relative_to(root)).encode(), file.read_bytes()))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def check_same(prints: Sequence[dict[str, str]]) -> None:
    """Raises UsageError, which names the difference, if a rank differs from rank 0. `prints` holds the result of
    `rank_fingerprint` of every rank, by rank, so all ranks raise the same error."""
    first, *others = prints
    for rank, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            ours, theirs = first.get(name), other.get(name)
            if ours != theirs:
                raise UsageError(f"{name} is {theirs} on rank {rank}, but {ours} on rank 0; ranks must be alike")
