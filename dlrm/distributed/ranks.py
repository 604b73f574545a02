"""Training on several ranks: tables split over them, MLPs on each, so that the result is that of one rank.

A batch is the batch of all ranks. Each rank looks up, for all samples, the pieces of tables that it holds
(`placement.py`), and puts its share of the samples through the MLPs; an all-to-all brings what was looked up to
the rank of its sample, and its gradient back. Of random data a rank draws the dense features and targets of its own
samples and the lookups in its own tables. Of a data set it reads the rows of its samples; then ranks exchange lookups.

The loss is the mean over the batch of all ranks, so gradients are means over ranks: those of the MLPs are summed and
divided by the number of ranks, and those that go back to the tables are divided by it as well.

B batch of all ranks, b samples of a rank, S pieces, n of them on a rank, W columns of each; T tables, D columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dlrm.batch import Batch, Share, batch_sizes, samples_of_rank
from dlrm.distributed.launch import Launch
from dlrm.distributed.placement import Piece, Plan, make_plan
from dlrm.errors import LocalError, RunError, UsageError
from dlrm.kernels.ops import check_lookups
from dlrm.options import Options

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# What the trainer asks of ranks
# ---------------------------------------------------------------------------------------------------------------------


class OneRank:
    """A run on one rank."""

    def __init__(self, options: Options, launch: Launch | None = None, plan: Plan | None = None):
        self.launch = launch or Launch()
        self.size, self.rank = self.launch.size, self.launch.rank
        self.plan = plan or make_plan(options, 1)

    def __str__(self) -> str:
        return f"world size: {self.size}, current rank: {self.rank}, local rank: {self.launch.local_rank}"

    @property
    def held(self) -> tuple[Piece, ...]:
        """The pieces of tables in this rank's memory."""
        return self.plan.held(self.rank)

    def share(self, data):
        """What this rank needs of a data set."""
        return data

    def forward(self, model, loss, backend, gradients: DenseGradients) -> Callable[..., tuple[Tensor, Tensor]]:
        """The step but for the reading of tables, compiled where that is wanted: (dense, what was read, lookups,
        target) -> loss and click probabilities."""

        def forward(dense: Tensor, looked_up: Tensor, lookups, target: Tensor) -> tuple[Tensor, Tensor]:
            with backend.autocast():
                probability = model.click_probability(dense, looked_up, lookups)
            return loss(probability, target), probability

        return backend.compile(forward)

    def dense_gradients(self, model) -> DenseGradients:
        """What makes the gradients of the MLPs those of the whole batch."""
        return DenseGradients()

    def all_samples(self, *parts: Tensor) -> list[Tensor]:
        """Of what each rank has for its samples, (b, 1) each: the same for all samples, (B, 1), in their order."""
        return list(parts)

    def total(self, *counters: Tensor) -> list[Tensor]:
        """The sums over all ranks, of a number each."""
        return list(counters)

    def smallest(self, counter: Tensor) -> Tensor:
        """The least of all ranks'."""
        return counter

    def gathered(self, value) -> list:
        """`value` of every rank."""
        return [value]

    def signal_agreed_by_all_ranks(self, signal: int) -> int:
        """Of the signals that ranks have received, 0 for none, the one that all of them heed after this iteration."""
        return signal

    def memory_limit(self, backend) -> int:
        """Bytes that this rank can take."""
        return backend.memory_limit()

    def whole_tables(self, parts: Sequence[Tensor]) -> list[Tensor] | None:
        """From what each rank has of each of its pieces, in the shape of the piece or a number a row: the same of whole
        tables, on the host; None on ranks other than 0."""
        return [part.cpu() for part in parts]

    def whole_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A model's `state_dict()` with whole tables. Every rank must ask, and rank 0 alone has tables then."""
        tables = self.whole_tables([state[f"emb_l.{number}.weight"] for number in range(len(self.held))])
        whole = {f"emb_l.{number}.weight": table for number, table in enumerate(tables or ())}
        return whole | {name: tensor.cpu() for name, tensor in state.items() if not name.startswith("emb_l.")}


class DenseGradients:
    """Nothing to do on one rank."""

    def start_top(self) -> None:
        """When the backward has left the top MLP."""

    def start_bottom(self) -> None:
        """After the backward."""

    def finish(self) -> None:
        """Before the optimizer."""


class ManyRanks(OneRank):
    """One of several ranks."""

    def __init__(self, options: Options, launch: Launch, plan: Plan, backend, host: dist.ProcessGroup):
        """`host`: the group of all ranks for what is on the host; that for the device is torch's default."""
        super().__init__(options, launch, plan)
        self._backend, self.host = backend, host
        self._timeout = timedelta(seconds=options.dist_timeout)
        self._iterations, self._ask_after, self._asked = 0, 1, time.monotonic()

    def share(self, data) -> SharedData:
        """UsageError, on every rank, where they have data sets of different sizes."""
        if not data.is_stored_by_sample:
            return SharedData(data, self)
        first, *others = self.gathered(data.samples)
        for rank, samples in enumerate(others, start=1):
            if samples != first:
                raise UsageError(
                    f"--processed-data-file: rank {rank} finds {samples} samples where rank 0 finds {first}; all need "
                    "the same data set"
                )
        # A group for each data set: when a test begins, the host thread of training may still exchange a batch, and
        # which of the two comes first differs from rank to rank.
        return SharedRows(data, self, dist.new_group(backend="gloo", timeout=self._timeout))

    def forward(self, model, loss, backend, gradients: DenseGradients) -> Callable[..., tuple[Tensor, Tensor]]:
        """While pooled lookups are on their way, the bottom MLP runs. Collectives stay out of compiled code."""
        exchange = Exchange(self.plan, self.rank, backend.device)

        def top(features: Tensor, pooled: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            with backend.autocast():
                probability = model.top(features, pooled)
            return loss(probability, target), probability

        def bottom(dense: Tensor) -> Tensor:
            with backend.autocast():
                return model.bottom(dense)

        pool, bottom, top = map(backend.compile, (model.emb_l.pool, bottom, top))

        def forward(dense: Tensor, looked_up: Tensor, lookups, target: Tensor) -> tuple[Tensor, Tensor]:
            token = StartExchange.apply(pool(looked_up, lookups), exchange)
            features = bottom(dense)
            return top(features, FinishExchange.apply(token, exchange, gradients.start_top), target)

        return forward

    def dense_gradients(self, model) -> DenseGradients:
        return MeanGradients(model, self.size)

    def all_samples(self, *parts: Tensor) -> list[Tensor]:
        mine = torch.cat(parts, dim=1)
        whole = mine.new_empty(self.size * len(mine), len(parts))
        dist.all_gather(list(whole.chunk(self.size)), mine)
        return list(whole.split(1, dim=1))

    def total(self, *counters: Tensor) -> list[Tensor]:
        sums = torch.cat([counter.reshape(1).to(self._backend.wide_dtype) for counter in counters])
        dist.all_reduce(sums)
        return [total.to(counter.dtype).reshape(counter.shape) for total, counter in zip(sums, counters, strict=True)]

    def smallest(self, counter: Tensor) -> Tensor:
        least = counter.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return least

    def gathered(self, value) -> list:
        return gathered(value, self.host)

    def signal_agreed_by_all_ranks(self, signal: int) -> int:
        """Ranks ask each other about once a second: it costs a collective on the host, but no wait for the device."""
        self._iterations += 1
        if self._iterations < self._ask_after:
            return 0
        pace = self._iterations / (time.monotonic() - self._asked)
        found = torch.tensor([signal, max(1, int(pace))])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host)
        number, self._ask_after = found.tolist()
        self._iterations, self._asked = 0, time.monotonic()
        return number

    def memory_limit(self, backend) -> int:
        return expected_memory_per_rank(self.launch, backend)

    def __str__(self) -> str:
        return f"{super().__str__()}\nRunning on {self.size} ranks using {dist.get_backend()} backend\n{self.plan}"

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


def gathered(value, host: dist.ProcessGroup) -> list:
    """`value` of every rank."""
    values = [None] * dist.get_world_size(host)
    dist.all_gather_object(values, value, group=host)
    return values


def expected_memory_per_rank(launch: Launch, backend) -> int:
    """Bytes that a rank can take: of its device, or its share of the host."""
    return backend.memory_limit() // (1 if backend.copies else launch.local_size)


def on_all_ranks(ranks: OneRank, action: Callable[[], T]) -> T:
    """What an action returns that every rank runs. If it fails on one, its UsageError or RunError, naming that rank, on
    all of them."""
    result, failure = None, None
    try:
        result = action()
    except (UsageError, RunError) as error:
        failure = error
    for rank, error in enumerate(ranks.gathered(failure)):
        if error:
            raise type(error)(f"rank {rank}: {error}" if ranks.size > 1 else str(error))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class SharedData:
    """Of each batch, the dense features and targets of this rank's samples, and all samples' lookups in its pieces."""

    def __init__(self, data, ranks: ManyRanks):
        self._data, self._rank, self._size = data, ranks.rank, ranks.size
        self._pieces = ranks.plan.ranks[ranks.rank]
        self._tables = tables_of(self._pieces)
        self._all_rows = data.table_rows
        self.table_rows = [piece.rows for piece in ranks.held]

    def __getattr__(self, name: str):
        return getattr(self._data, name)

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, first: int = 0, width: int = 1) -> Iterator[Batch]:
        """From the given one on, each `width` as one. RunError for lookups outside their table."""
        return map(self._in_pieces, self._in_tables(first, width))

    def _in_tables(self, first: int, width: int) -> Iterator[Batch]:
        """With the lookups in tables of which this rank has a piece."""
        return self._data.batches(first, width, Share(self._samples(self._rank, width), self._tables))

    def _samples(self, rank: int, width: int) -> slice:
        """A rank's, of `width` batches."""
        samples = samples_of_rank(width * self._data.batch_size, self._size)
        return slice(rank * samples, (rank + 1) * samples)

    def _in_pieces(self, batch: Batch) -> Batch:
        """From the lookups in tables."""
        no_lookups = torch.zeros(0, dtype=torch.int64), torch.zeros(batch.bags + 1, dtype=torch.int64)
        bags = [self._in_piece(piece, batch) for piece in self._pieces] or [no_lookups]
        indices, offsets = zip(*bags, strict=True)
        return Batch(batch.dense, list(indices), torch.stack(offsets), batch.target)

    def _in_piece(self, piece: Piece, batch: Batch) -> tuple[Tensor, Tensor]:
        """The lookups of a table that fall in a piece, and where each bag starts among them."""
        place, rows = self._tables.index(piece.table), self._all_rows[piece.table]
        indices, offsets = batch.indices[place], batch.offsets[place]
        if len(indices) and not 0 <= indices.min() <= indices.max() < rows:
            try:
                check_lookups(piece.table, indices, offsets, rows, len(indices))
            except IndexError as error:
                raise LocalError(f"rank {self._rank}: {error}") from error
        if piece.rows == rows:
            return indices, offsets
        inside = (indices >= piece.first_row) & (indices < piece.first_row + piece.rows)
        before = functional.pad(inside.cumsum(0), (1, 0))  # how many of the lookups before each one are inside
        return indices[inside] - piece.first_row, before[offsets]


class SharedRows(SharedData):
    """Likewise, of data that are stored by samples. A rank reads its samples alone; then each sends to each the lookups
    in its tables, one a sample."""

    def __init__(self, data, ranks: ManyRanks, group: dist.ProcessGroup):
        """`group`: of all ranks, on the host, for this alone."""
        super().__init__(data, ranks)
        self._group, self._tables_of_ranks = group, [tables_of(pieces) for pieces in ranks.plan.ranks]

    def _in_tables(self, first: int, width: int) -> Iterator[Batch]:
        share = Share(self._samples(self._rank, width), list(range(len(self._all_rows))))
        read = self._read(self._data.batches(first, width, share))
        sizes = batch_sizes(self._data.samples, self._data.batch_size, first, width)
        return map(partial(self._exchanged, width), read, sizes)

    def _read(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Others read other rows, so of what this one can't read it has to speak itself."""
        try:
            yield from batches
        except RunError as error:
            raise LocalError(f"rank {self._rank}: {error}") from error

    def _exchanged(self, width: int, batch: Batch, size: int) -> Batch:
        """From the lookups of this rank's samples in all tables, those of all `size` samples in this rank's tables."""
        counts = [len(range(size)[self._samples(rank, width)]) for rank in range(self._size)]
        sent = torch.cat([batch.indices[table] for tables in self._tables_of_ranks for table in tables])
        sizes_sent = [len(tables) * len(batch) for tables in self._tables_of_ranks]
        sizes_received = [len(self._tables) * count for count in counts]
        received = sent.new_empty(sum(sizes_received))
        dist.all_to_all_single(received, sent, sizes_received, sizes_sent, group=self._group)
        by_rank = zip(received.split(sizes_received), counts, strict=True)
        indices = torch.cat([part.view(len(self._tables), count) for part, count in by_rank], dim=1)
        offsets = torch.arange(size + 1).expand(len(self._tables), -1)
        return Batch(batch.dense, list(indices), offsets, batch.target)


def tables_of(pieces: Sequence[Piece]) -> list[int]:
    """Of which they are, ascending."""
    return sorted({piece.table for piece in pieces})


# ---------------------------------------------------------------------------------------------------------------------
# The exchange of pooled lookups
# ---------------------------------------------------------------------------------------------------------------------


class Exchange:
    """All-to-all between the ranks that hold tables and the ranks that hold samples. One is under way at a time."""

    def __init__(self, plan: Plan, rank: int, device: torch.device):
        self._plan, self._ranks = plan, len(plan.ranks)
        self._held = [len(pieces) for pieces in plan.ranks]
        self._mine = self._held[rank]
        parts = plan.dim // plan.width
        slots = [piece.table * parts + piece.first_column // plan.width for piece in plan.pieces]
        sources = [
            [piece for piece, s in enumerate(slots) if s == slot] for slot in range(len(plan.table_rows) * parts)
        ]
        self._most = max(map(len, sources))  # parts that a table's rows are cut in
        padded = [found + [len(slots)] * (self._most - len(found)) for found in sources]
        self._slots = torch.tensor(slots, dtype=torch.int32, device=device)
        self._sources = torch.tensor(padded, dtype=torch.int32, device=device).flatten()
        self._under_way = None

    def looked_up_rows(self, samples: int) -> list[int]:
        """Of W numbers, for `samples` of each rank: how many go from here to each rank, or come back."""
        return [samples * self._mine] * self._ranks

    def pooled_rows(self, samples: int) -> list[int]:
        """Likewise: how many come here from each rank, or go back."""
        return [samples * count for count in self._held]

    def start_forward(self, pooled: Tensor) -> None:
        """(B, n, W) -> samples to their ranks."""
        samples = len(pooled) // self._ranks
        rows = pooled.detach()[:, : self._mine].reshape(-1, self._plan.width)
        self._start(rows, self.looked_up_rows(samples), self.pooled_rows(samples))

    def finish_forward(self) -> Tensor:
        """(b, T, D): of each sample and table the pieces side by side, or their sum where they are cut by rows."""
        rows = self._finish()
        samples = len(rows) // sum(self._held)
        by_rank = [
            part.view(samples, -1, self._plan.width) for part in rows.split(self.pooled_rows(samples)) if len(part)
        ]
        by_piece = torch.cat(by_rank, dim=1)  # (b, S, W)
        if self._most > 1:
            by_piece = functional.pad(by_piece, (0, 0, 0, 1))
        by_slot = by_piece.index_select(1, self._sources)
        if self._most > 1:
            by_slot = by_slot.view(samples, -1, self._most, self._plan.width).sum(2)
        return by_slot.reshape(samples, len(self._plan.table_rows), self._plan.dim)

    def start_backward(self, gradient: Tensor) -> None:
        """(b, T, D) -> to each piece its part of the gradient."""
        samples = len(gradient)
        by_slot = (gradient / self._ranks).reshape(samples, -1, self._plan.width)
        by_piece = by_slot.index_select(1, self._slots)
        rows = torch.cat([part.reshape(-1, self._plan.width) for part in by_piece.split(self._held, dim=1)])
        self._start(rows, self.pooled_rows(samples), self.looked_up_rows(samples))

    def finish_backward(self, shape: Sequence[int]) -> Tensor:
        """(B, n, W)"""
        rows = self._finish()
        return rows.view(shape) if self._mine else rows.new_zeros(shape)

    def _start(self, rows: Tensor, sent: list[int], received: list[int]) -> None:
        into = rows.new_empty(sum(received), self._plan.width)
        work = dist.all_to_all_single(into, rows, received, sent, async_op=True)
        self._under_way = work, into, rows  # which must live until then

    def _finish(self) -> Tensor:
        work, into, _ = self._under_way
        work.wait()
        self._under_way = None
        return into


class StartExchange(torch.autograd.Function):
    """Sends pooled lookups off; in the backward, waits for their gradient. The token that it returns, and that
    `FinishExchange` takes, is empty: it tells autograd the order of the two."""

    @staticmethod
    def forward(ctx, pooled: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.shape = exchange, pooled.shape
        exchange.start_forward(pooled)
        return pooled.new_zeros(())

    @staticmethod
    def backward(ctx, _) -> tuple[Tensor, None]:
        return ctx.exchange.finish_backward(ctx.shape), None


class FinishExchange(torch.autograd.Function):
    """Waits for pooled lookups; in the backward, sends their gradient off. So it travels during the backward of what
    ran between the two. Then calls `then`: autograd has done all that ran later, the gradients of weights included."""

    @staticmethod
    def forward(ctx, token: Tensor, exchange: Exchange, then: Callable[[], None]) -> Tensor:
        ctx.exchange, ctx.then = exchange, then
        return exchange.finish_forward()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.exchange.start_backward(gradient)
        ctx.then()
        return gradient.new_zeros(()), None, None


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of the MLPs
# ---------------------------------------------------------------------------------------------------------------------


class MeanGradients(DenseGradients):
    """Their means over ranks. The all-reduce of the top MLP runs during the backward of the bottom MLP, that of the
    bottom MLP while tables are updated."""

    def __init__(self, model, ranks: int):
        self._top, self._bottom = (Bucket(list(mlp.children()), ranks) for mlp in (model.top_l, model.bot_l))

    def start_top(self) -> None:
        self._top.start()

    def start_bottom(self) -> None:
        self._bottom.start()

    def finish(self) -> None:
        self._top.finish()
        self._bottom.finish()


class Bucket:
    """The mean over ranks of the gradients of layers, in one all-reduce.

    Gradients that keep their memory get it in one tensor, once and for all; others are copied there. Sums are float32:
    in bfloat16, each further rank would round them once more.
    """

    def __init__(self, layers: Sequence, ranks: int):
        self._layers, self._ranks = layers, ranks
        self._leaves = [leaf for layer in layers for leaf in layer.leaves]
        self._stay = layers[0].gradients_stay
        if self._stay:
            self._flat = self._leaves[0].new_zeros(sum(leaf.numel() for leaf in self._leaves))
            self._hand_out()

    def start(self) -> None:
        if not self._stay:
            self._flat = torch.cat([leaf.grad.flatten() for leaf in self._leaves])
        self._sum = self._flat.float()  # itself, if it is
        self._work = dist.all_reduce(self._sum, async_op=True)

    def finish(self) -> None:
        self._work.wait()
        self._flat.copy_(self._sum.div_(self._ranks))
        if not self._stay:
            self._hand_out()

    def _hand_out(self) -> None:
        """Makes each gradient a part of the one tensor."""
        parts = iter(self._flat.split([leaf.numel() for leaf in self._leaves]))
        for layer in self._layers:
            layer.gradients = [next(parts).view_as(leaf) for leaf in layer.leaves]
