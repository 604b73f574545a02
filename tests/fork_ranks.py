"""Starts the ranks of one run after the other by forking, so that torch is imported only once.

Reads a line of JSON per run: {"size": number of ranks, "port": port on which they meet, "program": "train" or "worker",
"arguments": [...], "output": start of the names of the files for stdout and stderr, "largest_file": bytes beyond which
no file can grow, or 0}. Prints two lines of JSON per run: at once the process ids by rank, and when all ranks have
ended their exit statuses.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distributed_worker

import dlrm_s_pytorch
from dlrm.checkpoint import folder  # noqa: F401 - its import takes a second, too


def be_rank(rank: int, run: dict) -> int:
    """Runs the program as this rank, and returns its exit status."""
    variables = {"WORLD_SIZE": run["size"], "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": run["port"]}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    for descriptor, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{run['output']}{rank}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if run["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run["largest_file"], run["largest_file"]))
    if run["program"] == "train":
        return dlrm_s_pytorch.main(run["arguments"])
    distributed_worker.main(*run["arguments"])
    return 0


def fork(rank: int, run: dict) -> int:
    """Starts a process for the rank, and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        status = be_rank(rank, run)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


for line in sys.stdin:
    run = json.loads(line)
    pids = [fork(rank, run) for rank in range(run["size"])]
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
