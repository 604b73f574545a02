"""How several ranks find each other, make sure that they are alike, and part.

torch.distributed does the work; from here come the meeting point for each launcher, and one line for each thing that
goes wrong: a port in use, a host out of reach, ranks with other flags or sources, a rank that dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from dlrm.data.data_set import DataSet
from dlrm.distributed.launch import Launch, master, slurm_master
from dlrm.distributed.placement import check_sharding, make_plan
from dlrm.distributed.ranks import ManyRanks, OneRank, Ranks, expected_memory_per_rank, gather_objects
from dlrm.errors import LocalError, RunError, UsageError
from dlrm.options import Options, flag
from dlrm.system.signals import Stopped

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
SIOCGIFADDR = 0x8915  # of Linux: asks for an interface's address

# ---------------------------------------------------------------------------------------------------------------------
# Joining and leaving
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def join_ranks(data_set: DataSet, launch: Launch, backend) -> Iterator[Ranks]:
    """The ranks of a run, while it lasts."""
    options = data_set.options
    if launch.size == 1:
        yield OneRank(options, launch)
        return
    check_sharding(options, launch.size)
    store, host = join(options, launch, backend)
    with faults_named(launch, store):
        check_same(gather_objects(rank_fingerprint(data_set), host))
        room = min(gather_objects(expected_memory_per_rank(launch, backend), host))
        yield ManyRanks(options, launch, make_plan(options, launch.size, room), backend, host)
        dist.barrier(host)
    dist.destroy_process_group()


@contextlib.contextmanager
def faults_named(launch: Launch, store: dist.Store) -> Iterator[None]:
    """Turns the failure of a collective into a `LocalError` that names the ranks that are gone."""
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
    """The error for the first rank that asks; others end without a word."""
    with contextlib.suppress(RuntimeError):
        if answer(store.add, "spoken", 1) > 1:
            time.sleep(1)  # lest the launcher ends the first before it has spoken
            return SystemExit(1)
    return error


def leave(status: int) -> NoReturn:
    """Ends the process. Where ranks did not part in order, at once: the threads of torch's process group, still at
    work, might abort an interpreter that is being taken down."""
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def check_launch(options: Options, given: dict, launch: Launch) -> None:
    if "world_size" in given and options.world_size != launch.size:
        how = (
            f"{launch.by} started {launch.size}" if launch.by else "start it by demo_dlrm.py, torchrun, mpirun or srun"
        )
        raise UsageError(f"--world_size={options.world_size}: {how}")
    if options.distributed and not launch.by:
        raise UsageError("--distributed: start it by demo_dlrm.py, torchrun, mpirun or srun")


@contextlib.contextmanager
def rank_0_speaks(launch: Launch, print_all_ranks: bool) -> Iterator[None]:
    """Ranks other than 0 print nothing, unless `--print-all-ranks`; and of an error that all have, nothing at all.
    Before ranks have met, whether all have it shows in what the launcher does: it ends the others if rank 0 fails."""
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
        time.sleep(1)  # lest the launcher ends rank 0 before it has spoken
        status = error.exit_status if isinstance(error, Stopped) else {UsageError: 2, RunError: 1}.get(type(error), 130)
        raise SystemExit(status) from error


def join(options: Options, launch: Launch, backend) -> tuple[dist.Store, dist.ProcessGroup]:
    """Starts torch.distributed; the store of the ranks, and their group for what is on the host. UsageError or
    RunError, naming address and port, if that can't be."""
    timeout = timedelta(seconds=options.dist_timeout)
    address, port = "", 0
    try:
        (address, port), store = meeting_point(launch, timeout)
        if interface := interface_towards(address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        store.set(f"here/{launch.rank}", socket.gethostname())
        name = process_group_backend(options, backend)
        dist.init_process_group(name, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
        host = dist.group.WORLD if name == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    except dist.DistError as error:
        raise meeting_failure(launch, options, address, port, str(error)) from error
    return store, host


def meeting_point(launch: Launch, timeout: timedelta) -> tuple[tuple[str, int], dist.Store]:
    """Where ranks find each other. Under mpirun, rank 0 opens a port that is free, and MPI tells the others."""
    if launch.by == "mpirun":
        return meeting_by_mpi(launch, timeout)
    address, port = slurm_master() if launch.by == "srun" else master()
    if launch.by in ("MVAPICH", "mpiexec") and not launch.on_one_host and "MASTER_ADDR" not in os.environ:
        raise UsageError(f"MASTER_ADDR is not set: ranks on several hosts that {launch.by} has started need it")
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(address, port, launch.size, launch.rank == 0 and not by_agent, timeout, False)
    except dist.DistError as error:
        raise dist.DistNetworkError(f"{address}, port {port}: {error}") from error
    return (address, port), dist.PrefixStore("dlrm", store)


def meeting_by_mpi(launch: Launch, timeout: timedelta) -> tuple[tuple[str, int], dist.Store]:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    store = dist.TCPStore("localhost", 0, launch.size, True, timeout, False) if launch.rank == 0 else None
    address = "127.0.0.1" if launch.local_size == launch.size else os.environ.get("MASTER_ADDR") or own_address()
    address, port = world.bcast((address, store.port) if store else None)
    if store is None:
        store = dist.TCPStore(address, port, launch.size, False, timeout, False)
    return (address, port), dist.PrefixStore("dlrm", store)


def own_address() -> str:
    """By which other hosts reach this one: that of its name, unless that is its own alone."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing; it only asks which way out there is
        return probe.getsockname()[0]
    return "127.0.0.1"


def interface_towards(address: str) -> str:
    """The network interface by which this host reaches an address; "" if that can't be told. gloo by itself takes the
    one of the host's name, which may lead nowhere."""
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
    """What the device has for its tensors."""
    backend.prepare_collectives()
    usual = backend.process_group
    chosen = options.dist_backend or usual
    if not dist.is_backend_available(chosen):
        raise UsageError(
            f"--dist-backend={chosen}: torch has no such back end here; {backend.device.type} takes {usual}"
        )
    return chosen


def meeting_failure(launch: Launch, options: Options, address: str, port: int, message: str) -> Exception:
    text = " ".join(message.split())
    if "EADDRINUSE" in text:
        return UsageError(f"rank {launch.rank}: MASTER_PORT is in use ({text[:60]}); choose another --master-port")
    where = f" at {address}, port {port}" if address else ""
    return LocalError(
        f"rank {launch.rank}: the {launch.size} ranks did not meet{where} within {options.dist_timeout} s "
        f"(--dist-timeout): {text[:160]}"
    )


def is_from_network(error: RuntimeError) -> bool:
    words = ("gloo", "hccl", "nccl", "connection", "timed out", "timeout")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def lost(launch: Launch, store: dist.Store, error: RuntimeError) -> str:
    """Which ranks are gone. Those that are not tell the store so; meanwhile, a launcher may end this one any time.
    KeyboardInterrupt if that is why."""
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
    """What the store says. RuntimeError after 5 s: by itself, TCPStore waits for a host out of reach until the kernel
    gives up, a quarter of an hour. Nor does anyone wait for the thread that asks: `leave` ends the process at once."""
    try:
        return futures.ThreadPoolExecutor(1).submit(question, *arguments).result(timeout=5)
    except futures.TimeoutError:
        raise RuntimeError("the store does not answer") from None


# ---------------------------------------------------------------------------------------------------------------------
# Equal ranks
# ---------------------------------------------------------------------------------------------------------------------

OWN_TO_A_RANK = ("local_rank", "report", "print_all_ranks")


def rank_fingerprint(data_set: DataSet) -> dict[str, str]:
    """Returns what must be the same on all ranks, by name."""
    options = data_set.options
    flags = {flag(f.name): str(getattr(options, f.name)) for f in dataclasses.fields(options)}
    prints = {name: value for name, value in flags.items() if name not in map(flag, OWN_TO_A_RANK)}
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
    """UsageError, on every rank, if a rank differs from rank 0."""
    first, *others = prints
    for rank, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            ours, theirs = first.get(name), other.get(name)
            if ours != theirs:
                raise UsageError(f"{name} is {theirs} on rank {rank}, but {ours} on rank 0; ranks must be alike")
