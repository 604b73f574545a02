"""The embedding bags of intel-extension-for-pytorch, which needs a torch of its own and so a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from dlrm.errors import RunError, UsageError

STEPS = Path(__file__).with_name("ipex_step.py")


def check_python(python: str) -> None:
    """Raises UsageError if `python` is no Python that has intel-extension-for-pytorch."""
    command = [python, "-c", "import intel_extension_for_pytorch"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(f"--ipex-python: cannot run {python!r}: {error.strerror}") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"--ipex-python: {python!r} has no intel-extension-for-pytorch: {why}")


class Peer:
    """Runs a process that does a step with IPEX's embedding bags whenever it is told to. A context manager.

    At the start it checks one update. If that is wrong, the name of the peer says by how much.
    """

    def __init__(self, python: str, module: str, shape: Any):
        numbers = (shape.tables, shape.rows, shape.dim, shape.batch_size, shape.lookups_per_bag)
        self._command = [python, str(STEPS), module, *map(str, numbers)]
        pipe, ignored = subprocess.PIPE, subprocess.DEVNULL  # IPEX warns at each start
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # its threads do not spin while others are measured
        self._process = subprocess.Popen(
            self._command, env=environment, stdin=pipe, stdout=pipe, stderr=ignored, text=True
        )
        error = self._answer()
        self.name = f"IPEX {module}"
        if float(error) > 1e-3:
            self.name += f", wrong by {float(error):.2g}"

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def step(self, _: object) -> None:
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"--ipex-python: exit status {self._process.wait()} of {shlex.join(self._command)}")
        return line
