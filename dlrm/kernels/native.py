"""Builds the C++ kernels in csrc/, which are the ops of `ops.py` for the CPU, on first use, and loads them.

A build is a file whose name is a hash of all that the build depends on. So it is never stale: a changed source, another
compiler, torch or processor gives another name. The file gets its name when it is complete, and has its SHA-256 beside
it: a library that was cut off would end the process without a word. Code that other users could have written is not
loaded.

    DLRM_NATIVE=auto   (default) uses the C++ kernels; where they cannot be built, says why, and uses plain torch
    DLRM_NATIVE=1      uses the C++ kernels, or ends with an error
    DLRM_NATIVE=0      uses plain torch
    DLRM_CXXFLAGS      more flags for the compiler, such as -fsanitize=address
    DLRM_CACHE         the folder in which builds are kept; by default ~/.cache/dlrm
    CXX                the compiler, with arguments if need be; by default g++, c++ or clang++
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from dlrm.errors import RunError, UsageError
from dlrm.system.files import locked, renamed_when_done

SOURCES = Path(__file__).parent / "csrc"
TORCH = Path(torch.__file__).parent
# torch's headers need C++20 since 2.14.
STANDARD = "c++20" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14) else "c++17"
COMPILE = [
    f"-std={STANDARD}", "-O3", "-march=native", "-fopenmp", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math",  # no code reads errno or traps, and without them sqrt vectorises
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-isystem{TORCH / 'include'}",
]  # fmt: skip
if platform.machine() == "x86_64":
    COMPILE.append("-mprefer-vector-width=512")  # where there is AVX-512, compilers prefer 256 bits
# Some compilers link their C++ library statically. Were its symbols visible, they would replace those of torch's.
LINK = ["-shared", "-fopenmp", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,--exclude-libs,ALL"]


@functools.cache
def load_kernels() -> str:
    """Loads the C++ kernels, and builds them first if need be. Returns "native", or "reference (reason)" if plain torch
    does their work.

    Raises UsageError for a value of a variable that is not possible, and RunError if DLRM_NATIVE is 1 and there are no
    kernels.
    """
    wanted = os.environ.get("DLRM_NATIVE", "auto")
    if wanted not in ("0", "1", "auto"):
        raise UsageError(f"DLRM_NATIVE={wanted}: it can be 0, 1 or auto")
    if wanted == "0":
        return "reference (DLRM_NATIVE=0)"
    try:
        tools = find_tools()
        with library_folder() as folder:
            torch.ops.load_library(built_library(folder, tools))
    except (BuildError, OSError) as error:
        if wanted == "1":
            raise RunError(f"DLRM_NATIVE=1, but no C++ kernels: {error}") from error
        print(f"No C++ kernels, so the slower plain torch does their work: {error}", file=sys.stderr)
        return f"reference ({error})"
    return "native"


class BuildError(Exception):
    """Says in one line why there is no library."""


class Tools(NamedTuple):
    """A compiler, which may be a command with arguments, and its flags."""

    compiler: list[str]
    compile_flags: list[str]
    link_flags: list[str]


def find_tools() -> Tools:
    """Returns what the environment says, or else what is installed. Raises BuildError if there is no compiler."""
    more_flags = words_of("DLRM_CXXFLAGS")
    return Tools(find_compiler(), COMPILE + more_flags, LINK + more_flags)


def find_compiler() -> list[str]:
    """Returns the command of $CXX, which may have arguments, or of the first compiler that is installed."""
    given = words_of("CXX")
    candidates = [given] if given else [["g++"], ["c++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler ({', '.join(shlex.join(command) for command in candidates)}) is installed")


def words_of(variable: str) -> list[str]:
    """Returns the words of an environment variable, as a shell has them. Raises UsageError for unbalanced quotes."""
    value = os.environ.get(variable, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise UsageError(f"{variable}={value}: {error}") from None


@contextlib.contextmanager
def library_folder() -> Iterator[Path]:
    """Yields the folder of kept builds. Where there is none that can be trusted, yields one for this run alone."""
    try:
        folder = cache_folder()
    except OSError as error:
        print(f"The C++ kernels are not kept, only built for this run: {error}; see DLRM_CACHE", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="dlrm-") as temporary:
            yield Path(temporary)
    else:
        yield folder


def cache_folder() -> Path:
    """Returns the folder of what is kept from run to run.

    Raises OSError if it cannot be made, or if users other than root and the one of this process can write to it.
    """
    cache = Path(os.environ.get("DLRM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dlrm"))
    try:
        cache = cache.expanduser().absolute()
    except RuntimeError as error:  # there is no such user, or no home folder
        raise OSError(f"{cache}: {error}") from None
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_trusted(cache)
    return cache


def check_trusted(path: Path) -> None:
    """Raises OSError if users other than root and the one of this process can write to a file or folder."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        raise OSError(f"{path} belongs to another user")
    if status.st_mode & 0o022:
        raise OSError(f"other users can write to {path}")


def built_library(folder: Path, tools: Tools) -> Path:
    """Returns the library for this machine. If it is not there, one process builds it while others wait."""
    library = folder / f"kernels-{build_key(tools)}.so"
    if not is_intact(library):
        with locked(library.with_suffix(".lock")):
            if not is_intact(library):
                print("Building the C++ kernels (once, about a minute on two cores)...", file=sys.stderr, flush=True)
                build(tools, library)
    return library


def is_intact(library: Path) -> bool:
    """Says whether there is a library with the checksum that is beside it, which nobody else can have written."""
    try:
        check_trusted(library)
        return checksum_path(library).read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def checksum_path(library: Path) -> Path:
    """Returns the path of the file that holds the SHA-256 of a library."""
    return library.with_suffix(".sha256")


def build_key(tools: Tools) -> str:
    """Returns a hash of all that a build depends on: torch, compiler, processor (by -march=native), flags, sources."""
    digest = hashlib.sha256()
    inputs = [torch.__version__, run_compiler([*tools.compiler, "--version"]), processor(), *itertools.chain(*tools)]
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


def build(tools: Tools, library: Path) -> None:
    """Compiles each source file, as many at once as there are cores, and links them. The library gets its name, and
    then its checksum, when it is complete and on the disk."""
    parts = library.with_suffix(".parts")  # belongs to whoever has the lock; a killed build may have left one
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    try:
        objects = {source: parts / f"{source.stem}.o" for source in SOURCES.glob("*.cpp")}
        start = [*tools.compiler, *tools.compile_flags]
        commands = [[*start, "-c", str(source), "-o", str(into)] for source, into in objects.items()]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(tqdm(pool.map(run_compiler, commands), "compiling", len(commands), leave=False, disable=None))
        linked = parts / library.name
        run_compiler([*tools.compiler, *map(str, objects.values()), *tools.link_flags, "-o", str(linked)])
        content = linked.read_bytes()
        for path, kept in ((library, content), (checksum_path(library), hashlib.sha256(content).hexdigest().encode())):
            with renamed_when_done(path) as file:
                file.write(kept)
            path.chmod(0o600)
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def run_compiler(command: list[str]) -> str:
    """Returns what the compiler prints. Raises BuildError if it fails."""
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"]
        raise BuildError("the compiler says: " + next((line for line in lines if "error" in line), lines[-1]))
    return finished.stdout
