"""Training on several ranks: tables split over them, MLPs on each, so that the result is that of one rank.

A batch is the batch of all ranks. Each rank looks up, for all samples, the pieces of tables that it holds
(`dlrm_placement.py`), and puts its share of the samples through the MLPs; an all-to-all brings what was looked up to
the rank of its sample, and its gradient back. Every rank draws all random data, or reads all rows of a data set, and
makes of them what it needs.

The loss is the mean over the batch of all ranks, so gradients are means over ranks: those of the MLPs are summed and
divided by the number of ranks, and those that go back to the tables are divided by it as well.

B batch of all ranks, b samples of a rank, S pieces, n of them on a rank, W columns of each; T tables, D columns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dlrm_data_pytorch import Batch, Share, samples_of_rank
from dlrm_launch import Launch, find_launch, slurm_master
from dlrm_ops import check_lookups
from dlrm_options import Options, RunError, UsageError, flag
from dlrm_placement import Piece, Plan, check_sharding, make_plan
from dlrm_signals import Stopped

T = TypeVar("T")
SIOCGIFADDR = 0x8915  # of Linux: asks for an interface's address

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

    def agreed(self, signal: int) -> int:
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
        self._iterations, self._ask_after, self._asked = 0, 1, time.monotonic()

    def share(self, data) -> SharedData:
        return SharedData(data, self)

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

    def agreed(self, signal: int) -> int:
        """Ranks ask each other about once a second: it costs a collective on the host, but no wait for the device."""
        self._iterations += 1
        if self._iterations < self._ask_after:
            return 0
        pace = self._iterations / (time.monotonic() - self._asked)
        found = torch.tensor([signal, max(1, int(pace))])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host)
        agreed, self._ask_after = found.tolist()
        self._iterations, self._asked = 0, time.monotonic()
        return agreed

    def memory_limit(self, backend) -> int:
        return memory_for_each(self.launch, backend)

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


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class SharedData:
    """Of each batch, the dense features and targets of this rank's samples, and all samples' lookups in its pieces."""

    def __init__(self, data, ranks: ManyRanks):
        self._data, self._rank, self._size = data, ranks.rank, ranks.size
        self._pieces = ranks.plan.ranks[ranks.rank]
        self._tables = sorted({piece.table for piece in self._pieces})
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
        samples = samples_of_rank(width * self._data.batch_size, self._size)
        share = Share(slice(self._rank * samples, (self._rank + 1) * samples), self._tables)
        return map(self._in_pieces, self._data.batches(first, width, share))

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


# ---------------------------------------------------------------------------------------------------------------------
# Joining and leaving
# ---------------------------------------------------------------------------------------------------------------------


class LocalError(RunError):
    """An error that the other ranks know nothing of, so that this one has to print it."""


@contextlib.contextmanager
def join_ranks(options: Options, given: dict, backend) -> Iterator[OneRank]:
    """The ranks of a run, while it lasts. What goes wrong on all ranks, rank 0 alone says."""
    launch = find_launch()
    check_launch(options, given, launch)
    if launch.size == 1:
        yield OneRank(options, launch)
        return
    with rank_0_speaks(options, launch):
        check_sharding(options, launch.size)
        store, host = join(options, launch, backend)
        with faults_named(launch, store):
            check_same(gathered(fingerprint(options), host))
            room = min(gathered(memory_for_each(launch, backend), host))
            yield ManyRanks(options, launch, make_plan(options, launch.size, room), backend, host)
            dist.barrier(host)
        dist.destroy_process_group()


@contextlib.contextmanager
def faults_named(launch: Launch, store: dist.Store) -> Iterator[None]:
    """Turns the failure of a collective into a `LocalError` that names the ranks that are gone."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(RuntimeError):
            store.set("interrupted", "")
        raise
    except RuntimeError as error:
        if not is_from_network(error):
            raise
        raise first_to_speak(store, LocalError(lost(launch, store, error))) from error
    except LocalError as error:
        raise first_to_speak(store, error) from error


def first_to_speak(store: dist.Store, error: LocalError) -> BaseException:
    """The error for the first rank that asks; others end without a word."""
    with contextlib.suppress(RuntimeError):
        if store.add("spoken", 1) > 1:
            time.sleep(1)  # lest the launcher ends the first before it has spoken
            return SystemExit(1)
    return error


def leave(status: int) -> NoReturn:
    """Ends the process. Where ranks did not part in order, at once: the threads of torch's process group, still at
    work, might abort an interpreter that is being taken down."""
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def memory_for_each(launch: Launch, backend) -> int:
    """Bytes that a rank can take: of its device, or its share of the host."""
    return backend.memory_limit() // (1 if backend.copies else launch.local_size)


def check_launch(options: Options, given: dict, launch: Launch) -> None:
    if "world_size" in given and options.world_size != launch.size:
        how = (
            f"{launch.by} started {launch.size}" if launch.by else "start it by demo_dlrm.py, torchrun, mpirun or srun"
        )
        raise UsageError(f"--world_size={options.world_size}: {how}")
    if options.distributed and not launch.by:
        raise UsageError("--distributed: start it by demo_dlrm.py, torchrun, mpirun or srun")


@contextlib.contextmanager
def rank_0_speaks(options: Options, launch: Launch) -> Iterator[None]:
    """Ranks other than 0 print nothing, unless `--print-all-ranks`; and of an error that all have, nothing at all."""
    try:
        with contextlib.ExitStack() as stack:
            if launch.rank and not options.print_all_ranks:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    except LocalError:
        raise
    except (UsageError, RunError, KeyboardInterrupt, Stopped) as error:
        if not launch.rank:
            raise
        time.sleep(1)  # lest the launcher ends rank 0 before it has spoken
        status = error.exit_status if isinstance(error, Stopped) else {UsageError: 2, RunError: 1}.get(type(error), 130)
        raise SystemExit(status) from error


def join(options: Options, launch: Launch, backend) -> tuple[dist.Store, dist.ProcessGroup]:
    """Starts torch.distributed; the store of the ranks, and their group for what is on the host. UsageError or
    RunError, naming address and port, if that can't be."""
    timeout = timedelta(seconds=options.dist_timeout)
    address, port = "", 0
    try:
        (address, port), store = meeting_point(launch, timeout)
        if interface := interface_towards(address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        store.set(f"here/{launch.rank}", socket.gethostname())
        name = process_group_backend(options, backend)
        dist.init_process_group(name, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
        host = dist.group.WORLD if name == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    except dist.DistError as error:
        raise meeting_failure(launch, options, address, port, str(error)) from error
    return store, host


def meeting_point(launch: Launch, timeout: timedelta) -> tuple[tuple[str, int], dist.Store]:
    """Where ranks find each other. Under mpirun, rank 0 opens a port that is free, and MPI tells the others."""
    if launch.by == "mpirun":
        return meeting_by_mpi(launch, timeout)
    if launch.by == "srun":
        address, port = slurm_master()
    else:
        address, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", 29500))
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(address, port, launch.size, launch.rank == 0 and not by_agent, timeout, False)
    except dist.DistError as error:
        raise dist.DistNetworkError(f"{address}, port {port}: {error}") from error
    return (address, port), dist.PrefixStore("dlrm", store)


def meeting_by_mpi(launch: Launch, timeout: timedelta) -> tuple[tuple[str, int], dist.Store]:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    store = dist.TCPStore("localhost", 0, launch.size, True, timeout, False) if launch.rank == 0 else None
    address = "127.0.0.1" if launch.local_size == launch.size else os.environ.get("MASTER_ADDR") or own_address()
    address, port = world.bcast((address, store.port) if store else None)
    if store is None:
        store = dist.TCPStore(address, port, launch.size, False, timeout, False)
    return (address, port), dist.PrefixStore("dlrm", store)


def own_address() -> str:
    """By which other hosts reach this one: that of its name, unless that is its own alone."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing; it only asks which way out there is
        return probe.getsockname()[0]
    return "127.0.0.1"


def interface_towards(address: str) -> str:
    """The network interface by which this host reaches an address; "" if that can't be told. gloo by itself takes the
    one of the host's name, which may lead nowhere."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24]) == own:
                    return name
    return ""


def process_group_backend(options: Options, backend) -> str:
    """What the device has for its tensors."""
    kind = backend.device.type
    if kind == "hpu":
        import habana_frameworks.torch.distributed.hccl  # noqa: F401 - registers hccl
    usual = {"cpu": "gloo", "cuda": "nccl", "hpu": "hccl"}[kind]
    chosen = options.dist_backend or usual
    if not dist.is_backend_available(chosen):
        raise UsageError(f"--dist-backend={chosen}: torch has no such back end here; {kind} takes {usual}")
    return chosen


def meeting_failure(launch: Launch, options: Options, address: str, port: int, message: str) -> Exception:
    text = " ".join(message.split())
    if "EADDRINUSE" in text:
        return UsageError(f"rank {launch.rank}: MASTER_PORT is in use ({text[:60]}); choose another --master-port")
    where = f" at {address}, port {port}" if address else ""
    return LocalError(
        f"rank {launch.rank}: the {launch.size} ranks did not meet{where} within {options.dist_timeout} s "
        f"(--dist-timeout): {text[:160]}"
    )


def is_from_network(error: RuntimeError) -> bool:
    words = ("gloo", "hccl", "nccl", "connection", "timed out", "timeout")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def lost(launch: Launch, store: dist.Store, error: RuntimeError) -> str:
    """Which ranks are gone. Those that are not tell the store so; meanwhile, a launcher may end this one any time.
    KeyboardInterrupt if that is why."""
    try:
        store.set(f"alive/{launch.rank}", "")
        time.sleep(3)
        gone = [rank for rank in range(launch.size) if not store.check([f"alive/{rank}"])]
        interrupted = store.check(["interrupted"])
    except RuntimeError:
        gone, interrupted = [0], False  # rank 0 holds the store
    if interrupted:
        raise KeyboardInterrupt
    if not gone:
        return f"rank {launch.rank}: the connection between ranks broke: {str(error)[:200]}"
    names = " and ".join(f"rank {rank}" for rank in gone)
    return f"rank {launch.rank}: {names} no longer answered, so the run can't go on"


# ---------------------------------------------------------------------------------------------------------------------
# Equal ranks
# ---------------------------------------------------------------------------------------------------------------------

OWN_TO_A_RANK = ("local_rank", "report", "print_all_ranks")


def fingerprint(options: Options) -> dict[str, str]:
    """What must be the same on all ranks, by name."""
    flags = {flag(f.name): str(getattr(options, f.name)) for f in dataclasses.fields(options)}
    prints = {name: value for name, value in flags.items() if name not in map(flag, OWN_TO_A_RANK)}
    for name in ("raw_data_file", "processed_data_file", "data_trace_file", "load_model"):
        path = Path(getattr(options, name))
        if path.is_file():
            prints[f"the size of {flag(name)}"] = str(path.stat().st_size)
    sources = sorted(Path(__file__).parent.glob("*.py"))
    prints["the source"] = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    return prints | {"torch": torch.__version__, "Python": sys.version.split()[0]}


def check_same(prints: Sequence[dict[str, str]]) -> None:
    """UsageError, on every rank, if a rank differs from rank 0."""
    first, *others = prints
    for rank, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            ours, theirs = first.get(name), other.get(name)
            if ours != theirs:
                raise UsageError(f"{name} is {theirs} on rank {rank}, but {ours} on rank 0; ranks must be alike")


def together(ranks: OneRank, action: Callable[[], T]) -> T:
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
