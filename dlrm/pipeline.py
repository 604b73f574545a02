"""The host's part of a step: turns raw batches into prepared batches on the device, one batch ahead of the device.

B bags per table in a batch, R ranks that share it, T tables.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlrm.batch import Batch, padded, samples_of_rank
from dlrm.data.data_set import Data
from dlrm.devices.backend import Backend
from dlrm.errors import RunError
from dlrm.kernels.lookups import Lookups, Sizes


@dataclass
class PreparedBatch:
    """A batch in tensors that keep their sizes.

    A smaller batch is filled up with samples of zeros and empty bags.
    """

    dense: Tensor  # (B / R, dense features) float32, of this rank's own samples
    target: Tensor  # (B / R, 1) float32, of this rank's own samples
    learning_rate: Tensor  # (1,) float32, of the optimizer step on this batch
    lookups: Lookups  # of all B bags, in the T tables of this rank
    samples: int = 0  # number of samples on all ranks that are not padding
    exact_learning_rate: float = 0.0


class BatchMemory:
    """The memory of a prepared batch, on the host or on the device: one tensor of all its float32 numbers and one of
    all its int32 numbers, so that two copies bring a batch to the device.

    One copy for both would need a view of int32 memory as float32 on the device. A Gaudi's plugin tests such a view in
    lazy and compile mode only (test_hpu_view.py and test_hpu_views.py of its 1.19 source).
    """

    alignment = 16  # numbers: each tensor begins at a cache line

    def __init__(self, sizes: Sizes, lookups_type: type[Lookups], allocate: Callable[[int, torch.dtype], Tensor]):
        """`allocate` returns so many numbers of a type."""
        samples = sizes.batch_size // sizes.ranks
        self._sizes, self._lookups_type = sizes, lookups_type
        self._float_shapes = [(samples, sizes.num_dense), (samples, 1), (1,)]
        self._int_shapes = lookups_type.shapes(sizes)
        self.floats = allocate(self._room(self._float_shapes), torch.float32)
        self.ints = allocate(self._room(self._int_shapes), torch.int32)

    @classmethod
    def _room(cls, shapes: Iterable[Sequence[int]]) -> int:
        """Returns how many numbers tensors of these shapes take, each of them filled up to the alignment."""
        return sum(-(-math.prod(shape) // cls.alignment) * cls.alignment for shape in shapes)

    @property
    def nbytes(self) -> int:
        return self.floats.nbytes + self.ints.nbytes

    def batch(self, samples: int = 0, exact_learning_rate: float = 0.0) -> PreparedBatch:
        """Returns the batch as views of this memory."""
        lookups = self._lookups_type.of(self._sizes, self._views(self.ints, self._int_shapes))
        return PreparedBatch(*self._views(self.floats, self._float_shapes), lookups, samples, exact_learning_rate)

    @classmethod
    def _views(cls, memory: Tensor, shapes: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        parts = memory.split([cls._room([shape]) for shape in shapes])
        return (part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True))

    def copy_(self, other: BatchMemory) -> None:
        """Copies another batch of the same sizes into this memory, without waiting for the device."""
        self.floats.copy_(other.floats, non_blocking=True)
        self.ints.copy_(other.ints, non_blocking=True)


class BatchPipeline:
    """Turns raw batches into prepared batches on the device, always in the same memory.

    While the device works on a batch, a thread on the host draws the next batch and prepares it in the other of two
    sets of buffers. Where the device has two as well, the next batch is copied to it while it works on the one before.
    """

    def __init__(
        self,
        data: Data,
        backend: Backend,
        batch_size: int = 0,
        ranks: int = 1,
        watch: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """`batch_size` is the number of samples per batch that `run` is given; by default, the data's own.

        Each of several `ranks` that share a batch has the dense features and targets of its own samples. A batch that
        cannot be divided equally among the ranks is padded. `watch` returns the context of a wait for the device.
        """
        self._samples = samples_of_rank(batch_size or data.batch_size, ranks)
        self._bags = ranks * self._samples
        sizes = Sizes(data.table_rows, self._bags, data.max_lookups_per_bag, data.num_dense_features, ranks)
        self._table_rows, self._backend, self._watch = data.table_rows, backend, watch
        memory_of_batch = functools.partial(BatchMemory, sizes, backend.embedding_bags.lookups_type)
        self._host = [memory_of_batch(backend.host_memory) for _ in range(2)]
        self._prepared = [memory.batch() for memory in self._host]
        num_on_device = backend.num_batches_on_device(self._host[0].nbytes)
        self._device = [memory_of_batch(backend.device_memory) for _ in range(num_on_device)]
        # For each set of host buffers, the end of the last step whose batch was copied from them.
        self._last_read: list[Any] = [None, None]
        self.data_ms: list[float] = []  # milliseconds per batch that the host's thread took to draw it
        self.preprocess_ms: list[float] = []  # milliseconds per batch that the host's thread took to prepare it
        self.batches = self.lookups = self.unique_rows = 0  # numbers so far; those of all tables are added up

    def run(
        self, batches: Iterable[Batch], rates: Iterable[float] = itertools.repeat(math.nan)
    ) -> Iterator[PreparedBatch]:
        """Yields each batch, prepared. The next batch may overwrite its tensors.

        `rates`, which only training needs, are the learning rates of the steps on the batches. They travel with the
        batches, as a copy of its own would make a Gaudi wait.

        Before the caller asks for the next batch, it gives the device all work on this one and calls
        `Backend.end_step`, or has that called here. The host's buffers are free when the step has ended: a time stamp
        for the copy alone would cost a Gaudi time.
        Raises RunError for lookups outside their table.
        """
        batches = zip(batches, rates, strict=False)
        self._backend.synchronize()  # it may still read the last batch of a call that was left early
        with ThreadPoolExecutor(1, thread_name_prefix="host") as host_thread:
            with one_core_for_new_threads():
                ahead = host_thread.submit(self._prepare_next, batches, 0)
                ahead.result()
            for turn in itertools.cycle((0, 1)):
                if not ahead.result():
                    return
                prepared, step_before = self._to_device(turn), self._backend.step_end
                ahead = host_thread.submit(self._prepare_next, batches, 1 - turn)
                yield prepared
                has_ended = self._backend.step_end is not step_before
                self._last_read[turn] = self._backend.step_end if has_ended else self._backend.end_step()

    def _prepare_next(self, batches: Iterator[tuple[Batch, float]], turn: int) -> bool:
        """Prepares the next batch in set `turn` of the host buffers. Returns False if there is none."""
        start = time.perf_counter()
        batch, rate = next(batches, (None, 0.0))
        if batch is None:
            return False
        drawn = time.perf_counter()
        if self._last_read[turn] is not None:
            with self._watch("the copy of a batch to the device"):
                self._backend.wait_for(self._last_read[turn])
        self._prepare(batch, rate, self._prepared[turn])
        self.data_ms.append(1000 * (drawn - start))
        self.preprocess_ms.append(1000 * (time.perf_counter() - drawn))
        return True

    def _prepare(self, batch: Batch, rate: float, into: PreparedBatch) -> None:
        """Fills the tensors of a prepared batch on the host from a raw batch."""
        into.samples, batch = batch.bags, padded(batch, self._samples, self._bags)
        into.exact_learning_rate = rate
        into.learning_rate.fill_(rate)
        into.dense.copy_(batch.dense)
        into.target.copy_(batch.target)
        try:
            grouped = into.lookups.fill(batch, self._table_rows, self._backend.coalesce_lookups)
        except (IndexError, ValueError) as error:
            raise RunError(str(error)) from error
        self.batches += 1
        self.lookups += int(grouped.valid_count_fwd[:, 1].sum())
        self.unique_rows += int(grouped.unique_count.sum())

    def _to_device(self, turn: int) -> PreparedBatch:
        """Returns the batch in set `turn` of the host buffers as the device sees it, copying it if need be.

        The views are new each time, so that none outlives the graph of its step in a Gaudi's lazy mode.
        """
        if not self._device:
            return self._prepared[turn]
        memory, on_host = self._device[turn % len(self._device)], self._prepared[turn]
        memory.copy_(self._host[turn])
        return memory.batch(on_host.samples, on_host.exact_learning_rate)


@contextlib.contextmanager
def one_core_for_new_threads() -> Iterator[None]:
    """Limits each thread that runs its first op inside to one core for good: the others are for the training step.

    Torch sets a thread's number of OpenMP threads when the thread first needs it. With more than one, there would be
    more OpenMP threads than cores, and every parallel loop of the step would sleep and wake up instead of spinning for
    a moment. Measured on two cores, sleeping and waking doubles the time of a small step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
