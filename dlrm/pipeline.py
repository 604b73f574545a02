"""The host's part of a step: raw batches become prepared ones on the device, while it works on the one before."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
    """A batch in tensors that keep their sizes and addresses, on the device."""

    dense: Tensor  # (B, dense features) float32
    target: Tensor  # (B, 1) float32
    lookups: PreparedLookups | StaticLookups
    samples: int = 0  # that count, on all ranks; behind them are zeros and empty bags

    @classmethod
    def allocate(cls, sizes: Sizes, lookups_type: type, **settings) -> PreparedBatch:
        """Tensors with `settings` such as device."""
        return cls(
            torch.empty(sizes.batch_size // sizes.ranks, sizes.num_dense, **settings),
            torch.empty(sizes.batch_size // sizes.ranks, 1, **settings),
            lookups_type.allocate(sizes, **settings),
        )

    def tensors(self) -> list[Tensor]:
        return [self.dense, self.target, *self.lookups.fields()]

    def copy_(self, other: PreparedBatch) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs, non_blocking=True)
        self.samples = other.samples


class BatchPipeline:
    """Host preprocessing, a batch ahead: raw batches -> prepared batches on the device, always in the same tensors.

    While the device works on a batch, a host thread draws the next one and prepares it in the other of two sets of
    host buffers.
    """

    def __init__(self, data: Data, backend: Backend, batch_size: int = 0, ranks: int = 1):
        """`batch_size` of what `run` is given, unless it is the data's own. Of `ranks` that share a batch, each has the
        dense features and targets of its own samples; a batch that does not divide over them is padded."""
        self._samples = samples_of_rank(batch_size or data.batch_size, ranks)
        self._bags = ranks * self._samples
        sizes = Sizes(data.table_rows, self._bags, data.max_lookups_per_bag, data.num_dense_features, ranks)
        lookups = backend.embedding_bags.lookups_type
        host = {"device": torch.device("cpu"), "pin_memory": backend.copies}
        self._table_rows, self._backend = data.table_rows, backend
        self._host = [PreparedBatch.allocate(sizes, lookups, **host) for _ in range(2)]
        self._device = PreparedBatch.allocate(sizes, lookups, device=backend.device) if backend.copies else None
        self._host_is_free = [lambda: None, lambda: None]  # waits until the device has read the buffers
        self.data_ms: list[float] = []  # of each batch, on the host thread
        self.preprocess_ms: list[float] = []
        self.batches = self.lookups = self.unique_rows = 0  # so far, over all tables

    def run(self, batches: Iterable[Batch]) -> Iterator[PreparedBatch]:
        """RunError for lookups outside their table. A batch is to be used before the next one is asked for."""
        batches = iter(batches)
        with ThreadPoolExecutor(1, thread_name_prefix="host") as host_thread:
            with one_core_for_new_threads():
                ahead = host_thread.submit(self._prepare_next, batches, 0)
                ahead.result()
            for turn in itertools.cycle((0, 1)):
                if not ahead.result():
                    return
                prepared = self._to_device(turn)
                ahead = host_thread.submit(self._prepare_next, batches, 1 - turn)
                yield prepared

    def _prepare_next(self, batches: Iterator[Batch], turn: int) -> bool:
        """False when there is no next batch."""
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return False
        drawn = time.perf_counter()
        self._host_is_free[turn]()
        self._prepare(batch, self._host[turn])
        self.data_ms.append(1000 * (drawn - start))
        self.preprocess_ms.append(1000 * (time.perf_counter() - drawn))
        return True

    def _prepare(self, batch: Batch, into: PreparedBatch) -> None:
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
        if self._device is None:
            return self._host[turn]
        self._device.copy_(self._host[turn])
        self._host_is_free[turn] = self._backend.waiter()
        return self._device


@contextlib.contextmanager
def one_core_for_new_threads() -> Iterator[None]:
    """A thread that runs its first op inside will always use one core, and leave the others to the training step.

    Torch sets a thread's number of OpenMP threads when it first needs it. Were it more than one, there would be more
    OpenMP threads than cores, and every parallel loop of the step would sleep and wake instead of spinning a little:
    measured on two cores, that doubles the time of a small step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
