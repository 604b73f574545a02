"""The exchange of pooled rows between the ranks that hold tables and the ranks that have samples.

B samples of all ranks, b samples per rank, S pieces of tables, n of them held by this rank, W columns per piece; T
tables, D columns per table.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dlrm.distributed.placement import Plan


class Exchange(abc.ABC):
    """What a forward pass does with pooled rows between reading them and using them.

    What the caller computes between `start` and `finish` runs while the rows travel; in the backward pass, its gradient
    is computed while the gradient of the rows travels.
    """

    @abc.abstractmethod
    def start(self, pooled: Tensor) -> Tensor:
        """Sends (B, n, W), the pooled rows of this rank's pieces for all samples. Returns what `finish` takes."""

    @abc.abstractmethod
    def finish(self, sent: Tensor) -> Tensor:
        """Returns (b, T, D), the pooled rows of all tables for this rank's samples."""


class NoExchange(Exchange):
    """One rank has all tables and all samples."""

    def start(self, pooled: Tensor) -> Tensor:
        return pooled

    def finish(self, sent: Tensor) -> Tensor:
        return sent


class AllToAll(Exchange):
    """All-to-all collectives between several ranks, one at a time.

    No rank sends or receives nothing, which hccl does not allow: a rank without a piece takes part with the row that it
    keeps instead (`Plan.held_pieces`). Nobody uses the zeros that it sends.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device):
        self._plan, self._ranks = plan, len(plan.ranks)
        self._pieces_per_rank = [len(plan.held_pieces(rank)) for rank in range(self._ranks)]
        self._own_pieces, self._has_pieces = self._pieces_per_rank[rank], bool(plan.ranks[rank])
        parts = plan.dim // plan.width
        sent = [(piece, piece in pieces) for r, pieces in enumerate(plan.ranks) for piece in plan.held_pieces(r)]
        slots = [piece.table * parts + piece.first_column // plan.width for piece, _ in sent]
        used = [slot if is_of_plan else None for slot, (_, is_of_plan) in zip(slots, sent, strict=True)]
        sources = [[n for n, s in enumerate(used) if s == slot] for slot in range(len(plan.table_rows) * parts)]
        self._most_row_pieces = max(map(len, sources))  # per slot: the pieces that a table's rows are cut into
        padded = [found + [len(slots)] * (self._most_row_pieces - len(found)) for found in sources]
        self._slots = torch.tensor(slots, dtype=torch.int32, device=device)
        self._sources = torch.tensor(padded, dtype=torch.int32, device=device).flatten()
        self._under_way = None
        self.gradient_arrived: Callable[[], None] = lambda: None

    def call_when_gradient_arrives(self, action: Callable[[], None]) -> None:
        """Registers what to call in each backward pass when the gradient of the pooled rows has been computed.

        Autograd has by then run the backward of all that `finish` went into, the gradients of weights included.
        """
        self.gradient_arrived = action

    def start(self, pooled: Tensor) -> Tensor:
        return StartAllToAll.apply(pooled, self)

    def finish(self, sent: Tensor) -> Tensor:
        return FinishAllToAll.apply(sent, self)

    def rows_by_piece(self, samples: int) -> list[int]:
        """Returns how many rows of W numbers this rank sends to each rank in the forward pass, and receives from it in
        the backward pass, for `samples` samples per rank."""
        return [samples * self._own_pieces] * self._ranks

    def rows_by_sample(self, samples: int) -> list[int]:
        """Returns how many rows of W numbers this rank receives from each rank in the forward pass, and sends to it in
        the backward pass, for `samples` samples per rank."""
        return [samples * count for count in self._pieces_per_rank]

    def start_forward(self, pooled: Tensor) -> None:
        """Sends (B, n, W) to the ranks of the samples."""
        samples = len(pooled) // self._ranks
        rows = pooled.detach().reshape(-1, self._plan.width)
        self._start(rows, self.rows_by_piece(samples), self.rows_by_sample(samples))

    def finish_forward(self) -> Tensor:
        """Returns (b, T, D). Pieces cut by columns stand side by side in it, and pieces cut by rows are summed."""
        rows = self._finish()
        samples = len(rows) // sum(self._pieces_per_rank)
        by_rank = [part.view(samples, -1, self._plan.width) for part in rows.split(self.rows_by_sample(samples))]
        by_piece = torch.cat(by_rank, dim=1)  # (b, S, W)
        if self._most_row_pieces > 1:
            by_piece = functional.pad(by_piece, (0, 0, 0, 1))
        by_slot = by_piece.index_select(1, self._sources)
        if self._most_row_pieces > 1:
            by_slot = by_slot.view(samples, -1, self._most_row_pieces, self._plan.width).sum(2)
        return by_slot.reshape(samples, len(self._plan.table_rows), self._plan.dim)

    def start_backward(self, gradient: Tensor) -> None:
        """Sends each piece its part of the gradient (b, T, D), divided by the number of ranks."""
        samples = len(gradient)
        by_slot = (gradient / self._ranks).reshape(samples, -1, self._plan.width)
        by_piece = by_slot.index_select(1, self._slots)
        parts = by_piece.split(self._pieces_per_rank, dim=1)
        rows = torch.cat([part.reshape(-1, self._plan.width) for part in parts])
        self._start(rows, self.rows_by_sample(samples), self.rows_by_piece(samples))

    def finish_backward(self, shape: Sequence[int]) -> Tensor:
        """Returns the gradient of this rank's pooled rows, in their shape (B, n, W)."""
        rows = self._finish()
        return rows.view(shape) if self._has_pieces else rows.new_zeros(shape)

    def _start(self, rows: Tensor, sent: list[int], received: list[int]) -> None:
        into = rows.new_empty(sum(received), self._plan.width)
        work = dist.all_to_all_single(into, rows, received, sent, async_op=True)
        self._under_way = work, into, rows  # the tensors must live until the work is done

    def _finish(self) -> Tensor:
        work, into, _ = self._under_way
        work.wait()
        self._under_way = None
        return into


class StartAllToAll(torch.autograd.Function):
    """Sends pooled rows off; its backward waits for their gradient.

    The tensor that it returns, and that `FinishAllToAll` takes, is empty: it tells autograd the order of the two.
    """

    @staticmethod
    def forward(ctx, pooled: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange, ctx.shape = exchange, pooled.shape
        exchange.start_forward(pooled)
        return pooled.new_zeros(())

    @staticmethod
    def backward(ctx, _) -> tuple[Tensor, None]:
        return ctx.exchange.finish_backward(ctx.shape), None


class FinishAllToAll(torch.autograd.Function):
    """Waits for pooled rows; its backward sends their gradient off, and then says that it has arrived."""

    @staticmethod
    def forward(ctx, sent: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish_forward()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start_backward(gradient)
        ctx.exchange.gradient_arrived()
        return gradient.new_zeros(()), None
