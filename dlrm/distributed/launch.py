"""Starts a run on several ranks, and tells a rank what its launcher says about it. Imports torch as late as it can.

torchrun (`python -m torch.distributed.run`) starts the ranks of its own host, so it has to run on each host. mpirun, of
Open MPI, starts the ranks of all hosts from one host. srun, of SLURM, is not started here, but its variables are read.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from dlrm.errors import UsageError
from dlrm.options import OptionParser, Options, flag, gaudi_environment
from dlrm.system.endings import mend_streams
from dlrm.system.signals import STAND_INS, heed_stand_ins

# Hides what torch's sockets log, errors with stack traces: a rank says in its own words what went wrong.
QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL"}
LAUNCHER_PROCESS = "DLRM_LAUNCHER_PROCESS"  # tells ranks the host and the process id of `demo_dlrm.py`
PR_SET_PDEATHSIG = 1  # of Linux: which signal a process gets when its parent ends
SECONDS_TO_SAVE = 600  # that ranks have to save and end after a signal
SECONDS_AFTER_A_DEATH = 5  # that ranks have to end after another rank died; they cannot save any more
TORCHRUN = str(Path(__file__).with_name("torchrun.py"))
MASTER_PORT = 29500  # where the ranks of torchrun with `--hosts` meet; all others meet on a port that is free

# ---------------------------------------------------------------------------------------------------------------------
# A rank
# ---------------------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """The place of this process among the ranks of its run."""

    by: str = ""  # the launcher: torchrun, mpirun, srun, environment (somebody set the variables), or "" for none
    size: int = 1
    rank: int = 0
    local_rank: int = 0  # among the ranks on this host
    local_size: int = 1  # number of ranks on this host
    on_one_host: bool = True  # as far as the launcher has said

    def environment(self) -> dict[str, str]:
        """Returns the variables that torch and the Gaudi plugin read, which are those that torchrun sets."""
        names = {"WORLD_SIZE": self.size, "RANK": self.rank, "LOCAL_RANK": self.local_rank}
        if self.on_one_host or self.local_size < self.size:  # it is known
            names["LOCAL_WORLD_SIZE"] = self.local_size
        return {name: str(value) for name, value in names.items()} | QUIET if self.by else {}


# Who starts ranks: the variable by which it is known, then those of size, rank, local rank, local size.
LAUNCHERS = [
    ("torchrun", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", *(f"OMPI_COMM_WORLD_{x}" for x in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("MVAPICH", "MV2_COMM_WORLD_RANK", *(f"MV2_COMM_WORLD_{x}" for x in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("mpiexec", "MPI_LOCALRANKID", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # Intel MPI, MPICH
    ("mpiexec", "PMI_LOCAL_RANK", "PMI_SIZE", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # of a Cray
    ("srun", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("environment", "RANK", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
]
MOST_RANKS = 65536


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Returns this process's place in its run, from the variables of whoever started it. Raises UsageError, naming the
    variable, if one has no value that it can have, or if they say that there are several ranks, but not which."""
    for by, sign, *names in LAUNCHERS:
        if by == "srun" and "SLURM_STEP_NUM_TASKS" not in environment:
            names[0] = "SLURM_NTASKS"
        if sign in environment and all(name in environment for name in names[:2]):
            launch = read_launch(by, names, environment)
            if launch.size > 1 or by in ("torchrun", "mpirun", "environment"):
                return launch
    refuse_ranks_without_number(environment)
    return Launch()


def read_launch(by: str, names: Sequence[str], environment: Mapping[str, str]) -> Launch:
    size_name, rank_name, local_rank_name, local_size_name = names
    size = number_in(environment, size_name, 1, MOST_RANKS)
    rank = number_in(environment, rank_name, 0, MOST_RANKS - 1)
    if rank >= size:
        raise UsageError(f"{rank_name}={rank} is no rank of {size_name}={size}")
    if by == "srun":
        local_size = slurm_local_size(environment, size)
    else:
        local_size = number_in(environment, local_size_name, 1, size) if local_size_name in environment else 0
    if local_rank_name in environment:
        local_rank = number_in(environment, local_rank_name, 0, (local_size or size) - 1)
    elif is_loopback(environment.get("MASTER_ADDR", "localhost")):
        local_rank, local_size = rank, size
    else:
        local_rank, local_size = 0, 1  # as Kubernetes starts ranks: each is alone in its pod
    return Launch(by, size, rank, local_rank, local_size or size, local_size == size)


def refuse_ranks_without_number(environment: Mapping[str, str]) -> None:
    """Raises UsageError if a variable says that this process is one of several, when it is not known which."""
    for by, _, *names in LAUNCHERS:
        for name, if_alone in zip(names, (1, 0, 0, 1), strict=True):
            if by != "srun" and number_in(environment, name, if_alone, MOST_RANKS, default=if_alone) > if_alone:
                raise UsageError(
                    f"{name}={environment[name]} says that there are several ranks, but not enough is known of them; "
                    f"set WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or unset {name}"
                )


def number_in(environment: Mapping[str, str], name: str, low: int, high: int, default: int | None = None) -> int:
    """Returns the integer in a variable. Raises UsageError if the variable holds something else, or another integer
    than one from `low` to `high`."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,19}", text) or not low <= int(text) <= high:
        raise UsageError(f"{name}={text or ''}: expected an integer from {low} to {high}")
    return int(text)


def is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def slurm_local_size(environment: Mapping[str, str], size: int) -> int:
    """Returns the number of ranks of the step on this node, or 0 if SLURM does not say. SLURM writes `8(x2),7` for two
    nodes with 8 and one with 7."""
    of_step = "SLURM_STEP_TASKS_PER_NODE" in environment
    name = "SLURM_STEP_TASKS_PER_NODE" if of_step else "SLURM_TASKS_PER_NODE"
    written = environment.get(name)
    if written is None:
        return 0
    counts = []
    for part in written.split(","):
        found = re.fullmatch(r"([0-9]{1,5})(?:\(x([0-9]{1,5})\))?", part)
        if found is None:
            raise UsageError(f"{name}={written}: expected the numbers of ranks on each node, such as 8(x2),7")
        counts += [int(found[1])] * int(found[2] or 1)
    return min(size, counts[number_in(environment, "SLURM_NODEID", 0, len(counts) - 1, default=0)])


def master(
    environment: Mapping[str, str] = os.environ, address: str = "localhost", port: int = 29500
) -> tuple[str, int]:
    """Returns where rank 0 waits for the others: MASTER_ADDR and MASTER_PORT, or what is given here."""
    port = number_in(environment, "MASTER_PORT", 1, 65535, default=port)
    address = environment.get("MASTER_ADDR", address)
    if not address or any(character.isspace() for character in address):
        raise UsageError(f"MASTER_ADDR={address}: expected the address of the host of rank 0")
    return address, port


def slurm_master(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Returns address and port of rank 0 under srun: the first host, and a port computed from the job and its step."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    first = re.sub(r"\[(\w+).*", r"\1", hosts.split(",")[0])  # gaudi[03-07,12] -> gaudi03
    job, step = (number_in(environment, name, 0, 2**32 - 1, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return master(environment, first, 15000 + (97 * job + step) % 15000)


def end_with_launcher() -> None:
    """Makes the kernel kill this process when its parent ends, however that ends, so that no rank trains on alone."""
    signal_at_parents_end(signal.SIGKILL)
    host, _, launcher = os.environ.get(LAUNCHER_PROCESS, "").rpartition(" ")
    if host == os.uname().nodename and not Path(f"/proc/{launcher}").exists():
        os.kill(os.getpid(), signal.SIGKILL)  # the launcher ended before this process asked for the signal


def signal_at_parents_end(number: int) -> None:
    """Asks Linux to send this process a signal when the thread that started it ends. A program that takes the place of
    this one gets the signal, too."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def prepare_program(argv: Sequence[str]) -> None:
    """Prepares this process, above all for the import of torch, which may import a Gaudi plugin, too.

    Sets the variables that both read. Until the program handles signals, Ctrl-C ends it without a traceback, and so do
    the signals that mpirun forwards instead. Errors in `argv` are ignored here, because the program reports them.
    """
    mend_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    heed_stand_ins()
    with contextlib.suppress(UsageError, SystemExit):
        launch = find_launch()
        if launch.by in ("torchrun", "mpirun"):
            end_with_launcher()
        for name, value in launch.environment().items():
            os.environ.setdefault(name, value)
        os.environ.update(gaudi_environment(Options(**OptionParser(add_help=False).parse_given(argv))))


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


class LaunchJob(NamedTuple):
    """How the ranks of a run are started."""

    size: int  # number of ranks
    launcher: str = "torchrun"
    hosts: tuple[str, ...] = ()
    node_rank: int = -1  # of this host in `hosts`, for torchrun; -1 if it was not given
    master_addr: str = ""  # of the first host; "" for its name in `hosts`
    master_port: int = MASTER_PORT
    timeout: int = 300  # seconds that hosts wait for each other

    @property
    def ranks_per_host(self) -> int:
        return self.size // max(1, len(self.hosts))


# Fields that a launcher uses, but only together with `hosts`.
USED_WITH_HOSTS = {"torchrun": ("node_rank", "master_addr", "master_port"), "mpirun": ("master_addr",)}


def check_job(job: LaunchJob, given: Collection[str]) -> None:
    """Raises a UsageError if the job cannot work, or if one of its fields that flags have `given` has no effect."""
    for name in USED_WITH_HOSTS["torchrun"]:
        if name in given and name not in USED_WITH_HOSTS[job.launcher]:
            raise UsageError(f"{flag(name)} has no effect with --launcher={job.launcher}; leave it out")
        if name in given and not job.hosts:
            raise UsageError(f"{flag(name)} has no effect without --hosts; leave it out, or name the hosts")
    if job.hosts and job.size % len(job.hosts):
        raise UsageError(f"--world_size={job.size} does not divide over the {len(job.hosts)} hosts of --hosts")
    if len(set(job.hosts)) < len(job.hosts):
        raise UsageError(f"--hosts={','.join(job.hosts)} names a host twice")
    if job.node_rank >= len(job.hosts):
        raise UsageError(f"--node-rank={job.node_rank}: --hosts names {len(job.hosts)}, counted from 0")
    if job.launcher == "mpirun" and find_spec("mpi4py") is None:
        raise UsageError("--launcher=mpirun needs mpi4py; pip install -r requirements-mpi.txt")
    if job.launcher == "mpirun" and mpirun() is None:
        raise UsageError("--launcher=mpirun: there is no mpirun here; pip install -r requirements-mpi.txt")


def mpirun() -> str | None:
    """Returns the path of mpirun: beside this Python, else on PATH, else None."""
    return shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


def commands(job: LaunchJob, program: Sequence[str], environment: Mapping[str, str]) -> list[list[str]]:
    """Returns the commands that start `program`, a Python script and its flags: one, or one per host for torchrun."""
    if job.launcher == "mpirun":
        return [mpirun_command(job, program, environment)]
    rendezvous = "static" if len(job.hosts) > 1 else "loopback"  # `c10d` would unpickle what others send it
    torchrun = [sys.executable, TORCHRUN, f"--rdzv-backend={rendezvous}", f"--nproc-per-node={job.ranks_per_host}"]
    if not job.hosts:
        return [[*torchrun, *program]]
    master = [f"--master-addr={job.master_addr or job.hosts[0]}", f"--master-port={job.master_port}"]
    nodes = [f"--nnodes={len(job.hosts)}", *master, f"--rdzv-conf=timeout={job.timeout}"]
    return [[*torchrun, *nodes, f"--node-rank={rank}", *program] for rank in range(len(job.hosts))]


def mpirun_command(job: LaunchJob, program: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    command = [mpirun(), "-n", str(job.size), "--bind-to", "none"]
    if job.hosts:
        command += ["--host", ",".join(f"{host}:{job.ranks_per_host}" for host in job.hosts)]
    else:
        command += ["--map-by", ":OVERSUBSCRIBE"]
    for name in environment:
        command += ["-x", name]
    if job.master_addr:
        command += ["-x", f"MASTER_ADDR={job.master_addr}"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    return [*command, sys.executable, *program]


def threads_for_each(ranks: int) -> dict[str, str]:
    """Returns the variable that divides the cores of this host among its ranks, unless the caller has set it."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}


def launch(job: LaunchJob, program: Sequence[str], environment: dict[str, str]) -> int:
    """Runs the job, and returns the exit status.

    torchrun with `--hosts` runs the ranks of this host, `--node-rank`. If that is not given, the command to run on each
    host is printed.
    """
    command_per_host = commands(job, program, environment)
    if job.launcher == "torchrun" and job.hosts and job.node_rank < 0:
        print("Run on each host the command after its name:")
        for host, command in zip(job.hosts, command_per_host, strict=True):
            print(f"{host}: {shell_command(command, environment)}")
        return 0
    command = command_per_host[max(0, job.node_rank)]
    sys.stdout.flush()
    os.environ.update(environment)
    os.environ[LAUNCHER_PROCESS] = f"{os.uname().nodename} {os.getpid()}"
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if job.launcher == "mpirun":
        return run_mpirun(command)
    return run_torchrun(command[command.index(TORCHRUN) + 1 :], job)


def shell_command(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Returns a line for the shell that runs `command` with these variables set."""
    return shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), *command])


def run_mpirun(command: Sequence[str]) -> int:
    """Runs mpirun, and returns its exit status.

    At SIGINT or SIGTERM mpirun would end the ranks before they have saved. So both are blocked in mpirun, and it gets
    the signals that stand in for them, which it forwards to the ranks. A second signal ends mpirun and all ranks.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STAND_INS)  # mpirun inherits it
    process = subprocess.Popen(command, preexec_fn=lambda: signal_at_parents_end(signal.SIGHUP))

    def send_stand_in(number: int, _) -> None:
        process.send_signal(STAND_INS[number])
        time.sleep(1)  # a signal within a second is the same one, sent twice
        signal.signal(number, lambda *_: process.send_signal(signal.SIGHUP))

    for number in STAND_INS:
        signal.signal(number, send_stand_in)
    heed_stand_ins()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STAND_INS)
    status = process.wait()
    status = 128 - status if status < 0 else status  # shells report a death by signal n as 128 + n
    # A rank that has no handler yet dies by the stand-in.
    status_of_stand_in = {128 + stand_in: 128 + number for number, stand_in in STAND_INS.items()}
    return status_of_stand_in.get(status, status)


def run_torchrun(arguments: Sequence[str], job: LaunchJob) -> int:
    """Runs torchrun in this process, and returns the exit status.

    If a rank died, one line names it, instead of torchrun's long report.
    """
    torchrun, multiprocessing, network_error = import_torchrun()
    logging.disable(logging.ERROR)
    set_patience(torchrun, multiprocessing)
    try:
        torchrun.run(torchrun.parse_args(list(arguments)))
        return 0
    except multiprocessing.errors.ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode  # the rank has said why
        name = signal.Signals(-failure.exitcode).name
        print(f"demo_dlrm.py: error: rank {rank} (process {failure.pid}) was ended by {name}", file=sys.stderr)
        return 1
    except multiprocessing.api.SignalException as error:
        return 128 + error.sigval
    except network_error as error:
        return network_failure(job, str(error))


def set_patience(torchrun, multiprocessing) -> None:
    """Sets how long torchrun waits for ranks to end before it kills them; its default is 30 s.

    After a signal, ranks need longer to save. After the death of a rank, 30 s are too long: a rank may wait in C++ for
    a send to the dead rank, which gloo never ends (`Pair::signalException` leaves out queued sends), and then SIGTERM
    has no effect. torch has an option for the time after a signal. Older torch has one time for both, which has to be
    the longer one.
    """
    seconds = number_in(os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 1, 10**6, default=SECONDS_TO_SAVE)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(seconds)
    has_option = hasattr(torchrun.LaunchConfig, "shutdown_timeout")
    after_a_death = SECONDS_AFTER_A_DEATH if has_option else SECONDS_TO_SAVE
    multiprocessing.api.PContext.close.__defaults__ = None, after_a_death


def network_failure(job: LaunchJob, message: str) -> int:
    """Prints one line about an error of torch's network, and returns the exit status."""
    where = f"{job.master_addr or (job.hosts or ('localhost',))[0]}, port {job.master_port}"
    if "EADDRINUSE" in message or "address already in use" in message:
        message = f"--master-port={job.master_port} is in use on this host; choose another"
        print(f"demo_dlrm.py: error: {message}", file=sys.stderr)
        return 2
    print(f"demo_dlrm.py: error: no connection to {where}: {message.splitlines()[0][:200]}", file=sys.stderr)
    return 1


def import_torchrun():
    """Imports torchrun without the Gaudi plugin, which torch would load, and which would take a device from a rank."""
    before = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    try:
        from torch.distributed import DistError, run
        from torch.distributed.elastic import multiprocessing

        from dlrm.distributed import torchrun  # noqa: F401 - registers the rendezvous `loopback`
    finally:
        del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
        if before is not None:
            os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = before
    return run, multiprocessing, DistError
