"""Records of what an emulated Gaudi did. They can be read only in the process that has the Gaudi."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

LEVELS = ("memory", "peak_memory", "memory_limit", "largest_allocation")  # the counters that are not sums


class Record(NamedTuple):
    """A piece of work, or a mark: "mark_step", "synchronize", "wait for event", "sync: <cause>", or one of `mark`."""

    op: str  # such as aten::mm, without overload; copies in all directions are aten::copy_
    tensors: tuple  # (device, dtype, shape) of each tensor read or written
    addresses: tuple  # of the same tensors
    constants: str  # the numbers among the arguments


@dataclass
class Trace:
    """What was done inside a `trace()` block."""

    records: list[Record] = field(default_factory=list)
    counters: dict[str, int] = field(
        default_factory=dict
    )  # named as in `counters`; all but LEVELS count from the start
    cpu_fallbacks: list[str] = field(default_factory=list)  # names of operators

    @property
    def ops(self) -> list[str]:
        return [record.op for record in self.records]

    def split(self, mark: str) -> list[list[Record]]:
        """Splits the records at the marks of that name: into one part more than there are marks."""
        parts = [[]]
        for record in self.records:
            if record.op == mark:
                parts.append([])
            else:
                parts[-1].append(record)
        return parts


def without_temporary_addresses(records: Iterable[Record], persistent: Iterable[torch.Tensor]) -> list[Record]:
    """Returns the records with None for the address of each tensor that shares no memory with a persistent one."""
    blocks = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in persistent]

    def stays(address: int) -> bool:
        return any(start <= address < start + size for start, size in blocks)

    return [r._replace(addresses=tuple(a if stays(a) else None for a in r.addresses)) for r in records]


@contextmanager
def trace() -> Iterator[Trace]:
    """Records the work that is issued inside the block. The trace is complete when the block ends."""
    result, before, fallbacks = Trace(), counters(), len(cpu_fallbacks())
    torch.ops.hpu_emulator.start_trace()
    try:
        yield result
    finally:
        result.records += map(_parse, torch.ops.hpu_emulator.stop_trace())
        result.counters |= {
            name: value if name in LEVELS else value - before[name] for name, value in counters().items()
        }
        result.cpu_fallbacks += cpu_fallbacks()[fallbacks:]


def _parse(line: str) -> Record:
    op, tensors, addresses, constants = json.loads(line)
    return Record(op, tuple((device, dtype, tuple(shape)) for device, dtype, shape in tensors), tuple(addresses),
                  constants)  # fmt: skip


def counters() -> dict[str, int]:
    """Returns what was counted since the process began, by name:

    d2h_syncs             times that the host waited for a result of the device
    synchronizations      times that the program made the host wait for the device or an event
    d2h_copies            copies from the device to the host
    d2h_bytes             bytes copied from the device to the host
    h2d_copies            copies from the host to the device
    h2d_bytes             bytes copied from the host to the device
    h2d_blocking_copies   copies to the device from memory that is not pinned, or without non_blocking
    h2d_waits             copies to the device that wait for work of the last step: what they write to was used since
                          the last event but one
    locking_waits         waits for an event that keep every thread from recording one meanwhile
    mark_steps            graphs that a call of `mark_step`, an event or a collective ended, in lazy mode only
    events                times that an event was recorded
    drains                times that the host waited for its own pipeline: per event and copy to the device, in eager
                          and compile mode only
    compilations          new combinations of operator, shapes and dtypes; in lazy mode, new graphs
    memory                bytes allocated on the device
    peak_memory           largest number of bytes allocated on the device so far
    memory_limit          bytes that can be allocated on the device
    largest_allocation    bytes of the largest allocation so far
    allocations           allocations on the device
    frees                 allocations given back
    """
    return dict(torch.ops.hpu_emulator.counters())


def cpu_fallbacks() -> list[str]:
    """Returns the operators that have run on the host since the process began, as the device has no kernel for them."""
    return list(torch.ops.hpu_emulator.cpu_fallbacks())


def mark(name: str) -> None:
    """Puts a mark of that name in the trace."""
    torch.ops.hpu_emulator.mark(name)
