"""A peer that needs a torch of its own, and so a Python and a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence

from dlrm.errors import RunError, UsageError


def check_python(flag: str, python: str, module: str, package: str) -> None:
    """Raises UsageError, which names `flag` and `package`, if `python` is no Python that has `module`."""
    try:
        done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(f"{flag}: cannot run {python!r}: {error.strerror}") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"{flag}: {python!r} has no {package}: {why}")


class PeerProcess:
    """A process that prints a line when it is ready, and then does a step and prints a line for each line that it
    reads. A context manager."""

    def __init__(self, flag: str, command: Sequence[str]):
        """`flag` is the one that named the Python. Raises RunError, here and in `step`, if the process has ended."""
        self._flag, self._command = flag, command
        pipe, ignored = subprocess.PIPE, subprocess.DEVNULL  # peers warn at each start
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # its threads do not spin while others are measured
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=ignored, text=True)
        self.first_line = self._answer()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def step(self) -> str:
        """Lets the peer do a step. Returns the line that it printed."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"{self._flag}: exit status {self._process.wait()} of {shlex.join(self._command)}")
        return line
