"""Builds the C++ kernels in csrc/, which are the ops of `ops.py` for the CPU, on first use, and loads them.

A build is a file whose name is a hash of all that the build depends on. So it is never stale: a changed source, another
compiler, torch or processor gives another name. The file gets its name when it is complete.

    DLRM_NATIVE=auto   (default) uses the C++ kernels; where they cannot be built, says why, and uses plain torch
    DLRM_NATIVE=1      uses the C++ kernels, or ends with an error
    DLRM_NATIVE=0      uses plain torch
    DLRM_CXXFLAGS      more flags for the compiler, such as -fsanitize=address
    DLRM_CACHE         the folder in which builds are kept; by default ~/.cache/dlrm
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from dlrm.errors import RunError, UsageError
from dlrm.system.files import locked

SOURCES = Path(__file__).parent / "csrc"
TORCH = Path(torch.__file__).parent
COMPILE = [
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math",  # no code reads errno or traps, and without them sqrt vectorises
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-isystem{TORCH / 'include'}",
]  # fmt: skip
if platform.machine() == "x86_64":
    COMPILE.append("-mprefer-vector-width=512")  # where there is AVX-512, compilers prefer 256 bits
LINK = ["-shared", "-fopenmp", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
for flags in (COMPILE, LINK):
    flags += shlex.split(os.environ.get("DLRM_CXXFLAGS", ""))


@functools.cache
def load_kernels() -> str:
    """Loads the C++ kernels, and builds them first if need be. Returns "native", or "reference (reason)" if plain torch
    does their work.

    Raises UsageError for a value of DLRM_NATIVE that is not known, and RunError if it is 1 and there are no kernels.
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
    """Says in one line why there is no library."""


def built_library() -> Path:
    """Returns the library for this machine. If it is not there, one process builds it while others wait."""
    compiler = find_compiler()
    library = cache_folder() / f"kernels-{build_key(compiler)}.so"
    if not library.exists():
        with locked(library.with_suffix(".lock")):
            if not library.exists():
                print("Building the C++ kernels (once, about a minute on two cores)...", file=sys.stderr, flush=True)
                build(compiler, library)
    return library


def cache_folder() -> Path:
    """Returns the folder of what is kept from run to run. Raises OSError if it cannot be made."""
    cache = Path(os.environ.get("DLRM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dlrm"))
    cache = cache.expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def find_compiler() -> list[str]:
    """Returns the command of $CXX, which may have arguments, or of the first compiler that is installed."""
    candidates = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["g++"], ["c++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler ({', '.join(shlex.join(command) for command in candidates)}) is installed")


def build_key(compiler: list[str]) -> str:
    """Returns a hash of all that a build depends on: torch, compiler, processor (by -march=native), flags, sources."""
    digest = hashlib.sha256()
    inputs = [torch.__version__, *compiler, run_compiler([*compiler, "--version"]), processor(), *COMPILE, *LINK]
    for text in [*inputs, *(text for path in sorted(SOURCES.iterdir()) for text in (path.name, path.read_text()))]:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def processor() -> str:
    """Returns the model and the instruction sets of the processor. Unlike machines may share a home folder."""
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
    """Compiles each source file, as many at once as there are cores, and links them. The library gets its name when it
    is complete."""
    parts = library.with_suffix(".parts")  # belongs to whoever has the lock; a killed build may have left one
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    try:
        objects = {source: parts / f"{source.stem}.o" for source in SOURCES.glob("*.cpp")}
        commands = [[*compiler, *COMPILE, "-c", str(source), "-o", str(into)] for source, into in objects.items()]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(tqdm(pool.map(run_compiler, commands), "compiling", len(commands), leave=False, disable=None))
        run_compiler([*compiler, *map(str, objects.values()), *LINK, "-o", str(parts / library.name)])
        os.replace(parts / library.name, library)
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def run_compiler(command: list[str]) -> str:
    """Returns what the compiler prints. Raises BuildError if it fails."""
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"]
        raise BuildError("the compiler says: " + next((line for line in lines if "error" in line), lines[-1]))
    return finished.stdout
