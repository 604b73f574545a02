"""What the trainer asks of the ranks of its run, so that several of them train as one rank would.

A batch is the batch of all ranks. Each rank looks up, for all samples, the pieces of tables that it holds
(`placement.py`), and puts its own share of the samples through the MLPs. An all-to-all (`exchange.py`) brings pooled
rows to the rank of their sample, and their gradient back. Of random data, a rank draws the dense features and targets
of its own samples and the lookups in its own tables. Of stored data, it reads the rows of its own samples, and then the
ranks exchange lookups (`shared_data.py`).

The loss is the mean over the batch of all ranks, so gradients are means over ranks. Those of the MLPs are summed and
divided by the number of ranks (`gradients.py`); those that travel back to the tables are divided by it as well.

B samples of all ranks, b samples per rank.
"""

from __future__ import annotations

import abc
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlrm.data.data_set import Data
from dlrm.devices.backend import Backend
from dlrm.distributed.exchange import AllToAll, Exchange, NoExchange
from dlrm.distributed.gradients import DenseGradients, MeanGradients, OwnGradients
from dlrm.distributed.launch import Launch
from dlrm.distributed.placement import Piece, Plan, make_plan
from dlrm.distributed.shared_data import SharedData, SharedRows
from dlrm.errors import LocalError, RunError, UsageError
from dlrm.options import Options

T = TypeVar("T")


class Ranks(abc.ABC):
    """The ranks of a run, as one of them sees them."""

    def __init__(self, launch: Launch, plan: Plan):
        self.launch, self.plan = launch, plan
        self.size, self.rank = launch.size, launch.rank

    def __str__(self) -> str:
        return f"world size: {self.size}, current rank: {self.rank}, local rank: {self.launch.local_rank}"

    @property
    def held_pieces(self) -> tuple[Piece, ...]:
        """The pieces of tables in this rank's memory."""
        return self.plan.held_pieces(self.rank)

    # -- What a model and its data become

    @abc.abstractmethod
    def share(self, data: Data) -> Data:
        """Returns the part of the data that this rank needs. Raises UsageError, on every rank, if ranks have data of
        different sizes."""

    @abc.abstractmethod
    def exchange(self, device: torch.device) -> Exchange:
        """Returns what brings pooled rows to the ranks of their samples."""

    @abc.abstractmethod
    def dense_gradients(self, model: nn.Module) -> DenseGradients:
        """Returns what makes the gradients of the MLPs those of the whole batch."""

    # -- Values of all ranks

    @abc.abstractmethod
    def gather_samples(self, *parts: Tensor) -> list[Tensor]:
        """Returns tensors (B, 1) of all samples, in their order, from tensors (b, 1) of each rank's samples."""

    @abc.abstractmethod
    def sum_over_ranks(self, *counters: Tensor) -> list[Tensor]:
        """Returns the sums over all ranks of tensors of one element."""

    @abc.abstractmethod
    def min_over_ranks(self, counter: Tensor) -> Tensor:
        """Returns the smallest of all ranks' values of a tensor of one element."""

    @abc.abstractmethod
    def gather_objects(self, value: Any) -> list:
        """Returns every rank's `value`, by rank. A value consists of what JSON can express, of small tensors, and of
        errors of `dlrm/errors.py`."""

    @abc.abstractmethod
    def signal_agreed_by_all_ranks(self, signal: int) -> int:
        """Returns the signal that all ranks heed after this iteration, given the one that this rank has received; 0
        stands for none."""

    def watch(self, what: str) -> contextlib.AbstractContextManager:
        """Returns the context of a wait for the device or for other ranks, which `what` names for the user. On devices
        whose collectives never time out, the process ends if it takes longer than `--dist-timeout`."""
        return contextlib.nullcontext()

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Returns what an action returns that every rank runs. If the action fails on a rank, raises its UsageError or
        RunError, which then names that rank, on all ranks."""
        result, failure = None, None
        try:
            result = action()
        except (UsageError, RunError) as error:
            failure = error
        for rank, error in enumerate(self.gather_objects(failure)):
            if error:
                raise type(error)(f"rank {rank}: {error}" if self.size > 1 else str(error))
        return result

    # -- Memory and whole tables

    def expected_memory_per_rank(self, backend: Backend) -> int:
        """Returns the number of bytes that this rank can take."""
        return expected_memory_per_rank(self.launch, backend)

    @abc.abstractmethod
    def whole_tables(self, parts: Sequence[Tensor]) -> list[Tensor] | None:
        """Returns whole tables on the host, from what each rank has of each of its pieces: a tensor in the shape of
        the piece, or one number per row of it. Returns None on ranks other than 0. Every rank must call this."""

    def whole_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a model's `state_dict()` with whole tables, which rank 0 alone has. Every rank must call this."""
        tables = self.whole_tables([state[f"emb_l.{number}.weight"] for number in range(len(self.held_pieces))])
        whole = {f"emb_l.{number}.weight": table for number, table in enumerate(tables or ())}
        return whole | {name: tensor.cpu() for name, tensor in state.items() if not name.startswith("emb_l.")}


class OneRank(Ranks):
    """A run on one rank."""

    def __init__(self, options: Options, launch: Launch | None = None):
        super().__init__(launch or Launch(), make_plan(options, 1))

    def share(self, data: Data) -> Data:
        return data

    def exchange(self, device: torch.device) -> Exchange:
        return NoExchange()

    def dense_gradients(self, model: nn.Module) -> DenseGradients:
        return OwnGradients()

    def gather_samples(self, *parts: Tensor) -> list[Tensor]:
        return list(parts)

    def sum_over_ranks(self, *counters: Tensor) -> list[Tensor]:
        return list(counters)

    def min_over_ranks(self, counter: Tensor) -> Tensor:
        return counter

    def gather_objects(self, value: Any) -> list:
        return [value]

    def signal_agreed_by_all_ranks(self, signal: int) -> int:
        return signal

    def whole_tables(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.cpu() for part in parts]


class ManyRanks(Ranks):
    """A run on several ranks."""

    def __init__(self, options: Options, launch: Launch, plan: Plan, backend: Backend, host: dist.ProcessGroup):
        """`host`: the group of all ranks for tensors on the host. The group for the device's tensors is torch's
        default group."""
        super().__init__(launch, plan)
        self._backend, self.host = backend, host
        self._timeout = timedelta(seconds=options.dist_timeout)
        self._iterations, self._ask_after, self._asked = 0, 1, time.monotonic()

    def __str__(self) -> str:
        return f"{super().__str__()}\nRunning on {self.size} ranks using {dist.get_backend()} backend\n{self.plan}"

    def share(self, data: Data) -> Data:
        if not data.is_stored_by_sample:
            return SharedData(data, self.plan, self.rank)
        first, *others = self.gather_objects(data.samples)
        for rank, samples in enumerate(others, start=1):
            if samples != first:
                raise UsageError(
                    f"--processed-data-file: rank {rank} finds {samples} samples where rank 0 finds {first}; all need "
                    "the same data set"
                )
        # Each data set has a group of its own: when a test begins, the host thread of training may still exchange a
        # batch, and which of the two comes first differs from rank to rank.
        group = dist.new_group(backend="gloo", timeout=self._timeout)
        return SharedRows(data, self.plan, self.rank, group)

    def exchange(self, device: torch.device) -> Exchange:
        return AllToAll(self.plan, self.rank, device)

    def dense_gradients(self, model: nn.Module) -> DenseGradients:
        gradients = MeanGradients(model.layers_after_exchange(), list(model.bot_l.children()), self.size)
        model.exchange.call_when_gradient_arrives(gradients.start_top)
        return gradients

    def gather_samples(self, *parts: Tensor) -> list[Tensor]:
        # gloo of torch 2.5 copies on a thread of its own, which cannot write to tensors of a test's inference mode
        with torch.inference_mode(False), torch.no_grad():
            own = torch.cat(parts, dim=1)
            whole = own.new_empty(self.size * len(own), len(parts))
            dist.all_gather(list(whole.chunk(self.size)), own)
            return list(whole.split(1, dim=1))

    def sum_over_ranks(self, *counters: Tensor) -> list[Tensor]:
        sums = torch.cat([counter.reshape(1).to(self._backend.wide_dtype) for counter in counters])
        dist.all_reduce(sums)
        return [total.to(counter.dtype).reshape(counter.shape) for total, counter in zip(sums, counters, strict=True)]

    def min_over_ranks(self, counter: Tensor) -> Tensor:
        smallest = counter.clone()
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return smallest

    def gather_objects(self, value: Any) -> list:
        return gather_objects(value, self.host)

    def signal_agreed_by_all_ranks(self, signal: int) -> int:
        """Ranks ask each other about once per second: it costs a collective on the host, but no wait for the device."""
        self._iterations += 1
        if self._iterations < self._ask_after:
            return 0
        iterations_per_second = self._iterations / (time.monotonic() - self._asked)
        agreed = torch.tensor([signal, max(1, int(iterations_per_second))])
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.host)
        agreed_signal, self._ask_after = agreed.tolist()
        self._iterations, self._asked = 0, time.monotonic()
        return agreed_signal

    def whole_tables(self, parts: Sequence[Tensor]) -> list[Tensor] | None:
        if self.rank:
            for part in parts[: len(self.plan.ranks[self.rank])]:
                dist.send(part.detach().cpu().contiguous(), dst=0, group=self.host)
            return None
        columns = [self.plan.dim] * (parts[0].dim() - 1)
        tables = [torch.empty(rows, *columns, dtype=parts[0].dtype) for rows in self.plan.table_rows]
        for rank, pieces in enumerate(self.plan.ranks):
            for number, piece in enumerate(pieces):
                into = piece.cut_from(tables[piece.table])
                received = torch.empty(into.shape, dtype=into.dtype) if rank else parts[number].detach()
                if rank:
                    dist.recv(received, src=rank, group=self.host)
                into.copy_(received)
        return tables


def gather_objects(value: Any, host: dist.ProcessGroup) -> list:
    """Returns every rank's `value`, by rank, over a group on the host.

    A value consists of what JSON can express, of small tensors, and of errors of `dlrm/errors.py`. It travels as JSON
    and not as a pickle, because a pickle from a stranger in the network could run code.
    """
    text = json.dumps(value, default=to_json).encode()
    size = dist.get_world_size(host)
    lengths = torch.empty(size, 1, dtype=torch.int64)
    dist.all_gather(list(lengths), torch.tensor([len(text)]), group=host)
    padded = bytearray(text.ljust(int(lengths.max())))  # JSON ignores spaces at the end
    texts = torch.empty(size, len(padded), dtype=torch.uint8)
    dist.all_gather(list(texts), torch.frombuffer(padded, dtype=torch.uint8), group=host)
    return [json.loads(received.numpy().tobytes(), object_hook=from_json) for received in texts]


ERRORS = {error.__name__: error for error in (UsageError, RunError, LocalError)}
DTYPES = {
    str(dtype): dtype for dtype in (torch.bool, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64)
}


def to_json(value: Tensor | UsageError | RunError) -> dict[str, Any]:
    """Returns what `from_json` makes the value of."""
    if isinstance(value, Tensor):
        return {"tensor": str(value.dtype), "values": value.tolist()}
    return {"error": type(value).__name__, "message": str(value)}


def from_json(found: dict[str, Any]) -> Any:
    if found.keys() == {"tensor", "values"}:
        return torch.tensor(found["values"], dtype=DTYPES[found["tensor"]])
    if found.keys() == {"error", "message"}:
        return ERRORS[found["error"]](found["message"])
    return found


def expected_memory_per_rank(launch: Launch, backend: Backend) -> int:
    """Returns the number of bytes that a rank can take: those of its device, or its share of the host's."""
    return backend.memory_limit() // (1 if backend.has_own_memory else launch.local_size)
