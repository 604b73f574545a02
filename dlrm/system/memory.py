"""The host's memory: how much is free, how much this process has, and what malloc does with what is freed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys


def free_memory() -> int:
    """Bytes that a new run can take, of the machine or of the container."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError), open("/proc/meminfo") as meminfo:
        available = dict(line.split(":") for line in meminfo)["MemAvailable"]
        limit = min(limit, 1024 * int(available.split()[0]))
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as container:
        limit = min(limit, int(container.read()))
    return limit


def memory_in_use() -> tuple[int, int]:
    """Bytes that this process has now, and at most so far."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
        return tuple(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak  # which would include the launcher's, where there is no /proc


def keep_freed_memory() -> None:
    """Asks malloc to keep what is freed for the next allocation instead of giving it back to the system.

    A step frees and allocates the same tensors over and over; new pages for each of them cost more than many an op.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library has its own ways
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)  # the most that it takes
        libc.mallopt(trim_threshold, (1 << 31) - 1)
