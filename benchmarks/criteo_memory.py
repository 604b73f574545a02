"""Peak memory that preprocessing adds to that of Python and its libraries, measured in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from dlrm.data import criteo_preprocess


def most_memory(text: Path, folder: Path, limit: int, chunk_bytes: int = criteo_preprocess.CHUNK_BYTES) -> int:
    """Returns the bytes that preprocessing `text` into `folder` adds with a `--preprocess-memory` of `limit` bytes.

    Raises CalledProcessError if preprocessing fails.
    """
    command = [sys.executable, "-m", "benchmarks.criteo_memory", text, folder, str(limit), str(chunk_bytes)]
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return int(run.stdout.split()[-1])


def peak_memory_so_far() -> int:
    """Returns the peak memory of this process in bytes."""
    # `ru_maxrss` would count the memory that the parent held before it became this process.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def main(text: str, folder: str, limit: str, chunk_bytes: str) -> None:
    criteo_preprocess.CHUNK_MEMORY *= int(chunk_bytes) / criteo_preprocess.CHUNK_BYTES
    criteo_preprocess.CHUNK_BYTES = int(chunk_bytes)
    criteo_preprocess.parse(b"\t".join([b"0"] * criteo_preprocess.ROW) + b"\n")  # starts the threads of polars
    before = peak_memory_so_far()
    criteo_preprocess.preprocess(criteo_preprocess.PreprocessJob("kaggle", text, Path(folder), memory=int(limit)))
    print(peak_memory_so_far() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
