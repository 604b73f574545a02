"""Compiles device.cpp, once per torch, compiler and version of the source."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hpu-emulator"


def library() -> Path:
    """Returns the shared library that registers the device with torch. Builds it first if it is not there."""
    torch_directory = Path(torch.__file__).parent
    command = [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-shared", "-fPIC", "-w",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{torch_directory / 'include'}", f"-I{torch_directory / 'include/torch/csrc/api/include'}",
        str(SOURCE), f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10",
    ]  # fmt: skip
    key = hashlib.sha256(repr((command, torch.__version__, SOURCE.read_bytes())).encode()).hexdigest()[:16]
    path = CACHE / key / "device.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            built = Path(scratch) / path.name
            subprocess.run([*command, "-o", str(built)], check=True)
            built.replace(path)  # in one step, for other processes may be building, too
    return path
