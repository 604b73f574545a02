"""The host's part of a step: turns raw batches into prepared batches on the device, one batch ahead of the device.

B bags per table in a batch, R ranks that share it, T tables.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlrm.batch import Batch, padded, samples_of_rank
from dlrm.data.data_set import Data
from dlrm.devices.backend import Backend
from dlrm.errors import RunError
from dlrm.kernels.lookups import PreparedLookups, Sizes
from dlrm.kernels.static_embedding import StaticLookups


@dataclass
class PreparedBatch:
    """A batch in tensors that keep their sizes and addresses.

    A smaller batch is filled up with samples of zeros and empty bags.
    """

    dense: Tensor  # (B / R, dense features) float32, of this rank's own samples
    target: Tensor  # (B / R, 1) float32, of this rank's own samples
    lookups: PreparedLookups | StaticLookups  # of all B bags, in the T tables of this rank
    samples: int = 0  # number of samples on all ranks that are not padding

    @classmethod
    def allocate(
        cls, sizes: Sizes, lookups_type: type[PreparedLookups] | type[StaticLookups], **settings
    ) -> PreparedBatch:
        """Returns a batch of unset tensors. `settings` go to torch.empty: device, pin_memory."""
        own_samples = sizes.batch_size // sizes.ranks
        return cls(
            torch.empty(own_samples, sizes.num_dense, **settings),
            torch.empty(own_samples, 1, **settings),
            lookups_type.allocate(sizes, **settings),
        )

    def tensors(self) -> list[Tensor]:
        """Returns all tensors that travel to the device."""
        return [self.dense, self.target, *self.lookups.fields()]

    def copy_(self, other: PreparedBatch) -> None:
        """Copies another batch of the same sizes into this one, without waiting for the device."""
        for target, source in zip(self.tensors(), other.tensors(), strict=True):
            target.copy_(source, non_blocking=True)
        self.samples = other.samples


class BatchPipeline:
    """Turns raw batches into prepared batches on the device, always in the same tensors.

    While the device works on a batch, a thread on the host draws the next batch and prepares it in the other of two
    sets of buffers.
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
        lookups = backend.embedding_bags.lookups_type
        host = {"device": torch.device("cpu"), "pin_memory": backend.copies}
        self._table_rows, self._backend, self._watch = data.table_rows, backend, watch
        self._host = [PreparedBatch.allocate(sizes, lookups, **host) for _ in range(2)]
        self._device = PreparedBatch.allocate(sizes, lookups, device=backend.device) if backend.copies else None
        # For each set of host buffers, the end of the last step whose batch was copied from them.
        self._last_read: list[Any] = [None, None]
        self.data_ms: list[float] = []  # milliseconds per batch that the host's thread took to draw it
        self.preprocess_ms: list[float] = []  # milliseconds per batch that the host's thread took to prepare it
        self.batches = self.lookups = self.unique_rows = 0  # numbers so far; those of all tables are added up

    def run(self, batches: Iterable[Batch]) -> Iterator[PreparedBatch]:
        """Yields each batch, prepared. The next batch may overwrite its tensors.

        Before the caller asks for the next batch, it gives the device all work on this one and calls
        `Backend.end_step`, or has that called here. The host's buffers are free when the step has ended: a time stamp
        for the copy alone would cost a Gaudi time.
        Raises RunError for lookups outside their table.
        """
        batches = iter(batches)
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

    def _prepare_next(self, batches: Iterator[Batch], turn: int) -> bool:
        """Prepares the next batch in set `turn` of the host buffers. Returns False if there is none."""
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return False
        drawn = time.perf_counter()
        if self._last_read[turn] is not None:
            with self._watch("the copy of a batch to the device"):
                self._backend.wait_for(self._last_read[turn])
        self._prepare(batch, self._host[turn])
        self.data_ms.append(1000 * (drawn - start))
        self.preprocess_ms.append(1000 * (time.perf_counter() - drawn))
        return True

    def _prepare(self, batch: Batch, into: PreparedBatch) -> None:
        """Fills the tensors of a prepared batch on the host from a raw batch."""
        into.samples, batch = batch.bags, padded(batch, self._samples, self._bags)
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
        """Returns the batch in set `turn` of the host buffers as the device sees it, copying it if need be."""
        if self._device is None:
            return self._host[turn]
        self._device.copy_(self._host[turn])
        return self._device


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
