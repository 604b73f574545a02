"""What an emulated Gaudi did: to be read in its own process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

LEVELS = ("memory", "peak_memory", "memory_limit", "largest_allocation")  # the counters that are not sums


class Record(NamedTuple):
    """A piece of work, or a mark: "mark_step", "synchronize", "wait for event", "sync: <cause>", or one of yours."""

    op: str  # like aten::mm, without overload; copies of all directions are aten::copy_
    tensors: tuple  # (device, dtype, shape) of each tensor read or written
    addresses: tuple  # of those
    constants: str  # the numbers among the arguments


@dataclass
class Trace:
    records: list[Record] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)  # as of `counters`; all but LEVELS since the trace began
    cpu_fallbacks: list[str] = field(default_factory=list)  # names of operators

    @property
    def ops(self) -> list[str]:
        return [record.op for record in self.records]

    def split(self, mark: str) -> list[list[Record]]:
        """The records between the marks of that name: one part more than there are marks."""
        parts = [[]]
        for record in self.records:
            if record.op == mark:
                parts.append([])
            else:
                parts[-1].append(record)
        return parts


def without_temporary_addresses(records: Iterable[Record], persistent: Iterable[torch.Tensor]) -> list[Record]:
    """The records, in which only tensors that share memory with a persistent one keep their addresses."""
    blocks = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in persistent]

    def stays(address: int) -> bool:
        return any(start <= address < start + size for start, size in blocks)

    return [r._replace(addresses=tuple(a if stays(a) else None for a in r.addresses)) for r in records]


@contextmanager
def trace() -> Iterator[Trace]:
    """Records the work that is issued inside; the trace is complete when the block ends."""
    result, before, fallbacks = Trace(), counters(), len(cpu_fallbacks())
    torch.ops.hpu_emulator.start_trace()
    try:
        yield result
    finally:
        result.records += map(_parse, torch.ops.hpu_emulator.stop_trace())
        result.counters |= {name: v if name in LEVELS else v - before[name] for name, v in counters().items()}
        result.cpu_fallbacks += cpu_fallbacks()[fallbacks:]


def _parse(line: str) -> Record:
    op, tensors, addresses, constants = json.loads(line)
    return Record(op, tuple((device, dtype, tuple(shape)) for device, dtype, shape in tensors), tuple(addresses),
                  constants)  # fmt: skip


def counters() -> dict[str, int]:
    """Since the process began:

    d2h_syncs             times that the host waited for a result of the device
    synchronizations      times that it waited for the device or an event because it was told to
    d2h_copies, d2h_bytes, h2d_copies, h2d_bytes
    h2d_blocking_copies   those from memory that is not pinned, or not non_blocking
    mark_steps            as in lazy mode only
    compilations          combinations of operator, shapes and dtypes that were new; in lazy mode, such graphs
    memory, peak_memory, memory_limit, largest_allocation   bytes on the device
    allocations, frees    their number
    """
    return dict(torch.ops.hpu_emulator.counters())


def cpu_fallbacks() -> list[str]:
    """The operators that ran on the host because the device has no kernel for them, since the process began."""
    return list(torch.ops.hpu_emulator.cpu_fallbacks())


def mark(name: str) -> None:
    """Puts a mark in the trace."""
    torch.ops.hpu_emulator.mark(name)
