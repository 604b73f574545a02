"""Builds the C++ kernels of csrc/ on first use and loads them: the ops of `ops.py` for the CPU.

A build is a file named by all that it depends on, so it is never stale: a changed source, another compiler, torch or
processor is another name. It appears under that name complete or not at all.

    DLRM_NATIVE=auto   (default) the C++ kernels, or plain torch, and a line that says why, where they can't be built
    DLRM_NATIVE=1      the C++ kernels, or an error
    DLRM_NATIVE=0      plain torch
    DLRM_CXXFLAGS      further flags for the compiler, such as -fsanitize=address
    DLRM_CACHE         where builds are kept; ~/.cache/dlrm unless set
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from dlrm.errors import RunError, UsageError
from dlrm.system.files import locked

SOURCES = Path(__file__).parent / "csrc"
TORCH = Path(torch.__file__).parent
COMPILE = [
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math",  # nobody asks for errno or traps, and loops with sqrt vectorise without
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-isystem{TORCH / 'include'}",
]  # fmt: skip
if platform.machine() == "x86_64":
    COMPILE.append("-mprefer-vector-width=512")  # compilers prefer 256 for the sake of old processors
LINK = ["-shared", "-fopenmp", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
for flags in (COMPILE, LINK):
    flags += shlex.split(os.environ.get("DLRM_CXXFLAGS", ""))


@functools.cache
def load_kernels() -> str:
    """Loads the C++ kernels, built first if need be. "native", or "reference (why)" where plain torch must do.

    UsageError or RunError if DLRM_NATIVE=1 and they can't be had.
    """
    wanted = os.environ.get("DLRM_NATIVE", "auto")
    if wanted not in ("0", "1", "auto"):
        raise UsageError(f"DLRM_NATIVE={wanted}: it can be 0, 1 or auto")
    if wanted == "0":
        return "reference (DLRM_NATIVE=0)"
    try:
        torch.ops.load_library(built_library())
    except (BuildError, OSError) as error:
        if wanted == "1":
            raise RunError(f"DLRM_NATIVE=1, but no C++ kernels: {error}") from error
        print(f"No C++ kernels, so the slower plain torch does their work: {error}", file=sys.stderr)
        return f"reference ({error})"
    return "native"


class BuildError(Exception):
    """Why there is no library, in one line."""


def built_library() -> Path:
    """The library for this machine; built first, by one process while others wait, if it isn't there."""
    compiler = find_compiler()
    library = cache_folder() / f"kernels-{build_key(compiler)}.so"
    if not library.exists():
        with locked(library.with_suffix(".lock")):
            if not library.exists():
                print("Building the C++ kernels (once, about half a minute)...", file=sys.stderr, flush=True)
                build(compiler, library)
    return library


def cache_folder() -> Path:
    """What is kept from run to run; OSError if it can't be made."""
    cache = Path(os.environ.get("DLRM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dlrm"))
    cache = cache.expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def find_compiler() -> list[str]:
    """$CXX, which may have arguments, or the first that is installed."""
    candidates = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["g++"], ["c++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler ({', '.join(shlex.join(command) for command in candidates)}) is installed")


def build_key(compiler: list[str]) -> str:
    """A hash of all that a build depends on: torch, compiler, the processor that -march=native asks, flags, sources."""
    digest = hashlib.sha256()
    inputs = [torch.__version__, *compiler, run_compiler([*compiler, "--version"]), processor(), *COMPILE, *LINK]
    for text in [*inputs, *(text for path in sorted(SOURCES.iterdir()) for text in (path.name, path.read_text()))]:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def processor() -> str:
    """The model and its instruction sets: a home folder may be shared by unlike machines."""
    names = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    lines = [platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if not line.strip():  # the end of the first processor
                break
            if line.split("\t")[0].split(":")[0].strip() in names:
                lines.append(line)
    return "".join(lines)


def build(compiler: list[str], library: Path) -> None:
    """Compiles the sources side by side and links them; the library gets its name when it is whole."""
    parts = library.with_suffix(".parts")  # under the lock, so ours alone; there is one already if a build was killed
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    try:
        objects = {source: parts / f"{source.stem}.o" for source in SOURCES.glob("*.cpp")}
        running = [
            subprocess.Popen([*compiler, *COMPILE, "-c", source, "-o", into], stderr=subprocess.PIPE, text=True)
            for source, into in objects.items()
        ]
        errors = [process.communicate()[1] for process in running]
        for process, error in zip(running, errors, strict=True):
            check(process.returncode, error)
        run_compiler([*compiler, *map(str, objects.values()), *LINK, "-o", str(parts / library.name)])
        os.replace(parts / library.name, library)
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def run_compiler(command: list[str]) -> str:
    """What the compiler prints; BuildError if it fails."""
    finished = subprocess.run(command, capture_output=True, text=True)
    check(finished.returncode, finished.stderr)
    return finished.stdout


def check(status: int, errors: str) -> None:
    if status:
        lines = errors.strip().splitlines() or [f"exit status {status}"]
        raise BuildError("the compiler says: " + next((line for line in lines if "error" in line), lines[-1]))
