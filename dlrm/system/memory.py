"""The host's memory: how much is free, how much this process uses, and whether malloc keeps what is freed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys


def free_memory() -> int:
    """Returns how many bytes a new run can allocate, within the limits of the machine and of the container."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError), open("/proc/meminfo") as meminfo:
        available = dict(line.split(":") for line in meminfo)["MemAvailable"]
        limit = min(limit, 1024 * int(available.split()[0]))
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as container_limit:
        limit = min(limit, int(container_limit.read()))
    return limit


def memory_in_use() -> tuple[int, int]:
    """Returns how many bytes this process uses now, and the most that it has used so far.

    Both are the most so far on systems without /proc.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
        return tuple(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    # Only a fallback, because ru_maxrss can include the memory of the launcher that started this process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def keep_freed_memory() -> None:
    """Asks malloc to keep freed memory for later allocations instead of returning it to the system.

    Each step frees and allocates the same tensors again. Getting new pages for them from the system would take longer
    than many of the ops.
    """
    trim_threshold, mmap_threshold = -1, -3  # the values of M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)  # the largest value that glibc accepts
        libc.mallopt(trim_threshold, (1 << 31) - 1)
