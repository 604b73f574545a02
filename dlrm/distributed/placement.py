"""Decides which rank holds which pieces of the tables.

A table is one piece, or is cut by rows or by columns into several. Each piece lives on one rank. The weight of a piece
is its share of all memory plus its share of all traffic. Pieces are handed out in the order of their weight, the
heaviest first, each to the rank that has the least weight so far. The plan depends only on the flags and on the memory
per rank, so every rank makes the same plan.

All pieces have the same number of columns, so that one operator can serve all pieces of a rank: the embedding dimension
D, or with `--sharding=column` the same part of D for every table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dlrm.errors import UsageError
from dlrm.options import Options


@dataclass(frozen=True)
class Piece:
    """A block of a table: all of its columns for some rows, some of its columns for all rows, or the whole table."""

    table: int
    first_row: int
    rows: int
    first_column: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    def cut_from(self, table):
        """Returns a view of this piece in `table`, a tensor (rows,) or (rows, columns) for the whole table."""
        return table[(self.rows_slice, self.columns_slice)[: table.ndim]]

    @property
    def rows_slice(self) -> slice:
        return slice(self.first_row, self.first_row + self.rows)

    @property
    def columns_slice(self) -> slice:
        return slice(self.first_column, self.first_column + self.columns)

    def copy_rows(self, block, first: int, into) -> None:
        """Copies this piece's part of `block`, which holds whole rows from row `first` on, into `into`, the tensor of
        this piece."""
        low, high = max(first, self.first_row), min(first + len(block), self.first_row + self.rows)
        if low < high:
            into[low - self.first_row : high - self.first_row].copy_(
                block[low - first : high - first, self.columns_slice]
            )

    def name(self, table_rows: int, dim: int) -> str:
        """Returns the name for a printed plan: `3` for the whole of table 3, `3[0:500]` for rows of it, `3[:,0:8]` for
        columns. `table_rows` and `dim` are the size of the whole table."""
        if self.rows < table_rows:
            return f"{self.table}[{self.first_row}:{self.first_row + self.rows}]"
        if self.columns < dim:
            return f"{self.table}[:,{self.first_column}:{self.first_column + self.columns}]"
        return str(self.table)


@dataclass(frozen=True)
class Plan:
    """The pieces of each rank, in the order of tables, rows and columns. A rank may have none."""

    table_rows: tuple[int, ...]
    dim: int  # the embedding dimension
    ranks: tuple[tuple[Piece, ...], ...]
    lookups: tuple[float, ...]  # expected lookups per table in a batch of all ranks
    bytes_per_weight: float  # bytes of memory per number in a table, with the optimizer's moment

    @property
    def width(self) -> int:
        """The number of columns of each piece."""
        return next(piece.columns for pieces in self.ranks for piece in pieces)

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of all ranks, rank by rank."""
        return [piece for pieces in self.ranks for piece in pieces]

    def held_pieces(self, rank: int) -> tuple[Piece, ...]:
        """Returns the pieces that the rank keeps in memory. A rank without a piece keeps one row that nobody looks up,
        so that no other code has to care about such ranks."""
        return self.ranks[rank] or (Piece(0, 0, 1, 0, self.width),)

    def bytes(self, rank: int) -> int:
        """Returns the bytes of memory that the rank's pieces take, with the optimizer's moments."""
        return round(self.bytes_per_weight * sum(piece.elements for piece in self.held_pieces(rank)))

    def expected_lookups(self, rank: int) -> float:
        """Returns the expected number of lookups per batch of all ranks in the rank's pieces."""
        return sum(self.lookups[p.table] * p.rows / self.table_rows[p.table] for p in self.ranks[rank])

    def __str__(self) -> str:
        """Returns a table with a line per rank, for `--print-plan`."""
        rows = [("rank", "tables", "bytes", "expected lookups a batch")]
        for rank, pieces in enumerate(self.ranks):
            names = " ".join(piece.name(self.table_rows[piece.table], self.dim) for piece in pieces) or "none"
            size = self.bytes(rank) if pieces else 0
            rows.append((str(rank), names, f"{size:,}", f"{self.expected_lookups(rank):,.0f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def make_plan(options: Options, ranks: int, memory: float = math.inf) -> Plan:
    """Returns the plan for `--sharding` on `ranks` ranks, each of which has room for `memory` bytes of tables."""
    rows, dim = options.arch_embedding_size, options.arch_sparse_feature_size
    tables = zip(rows, options.lookups_per_bag, strict=True)
    lookups = tuple(expected_lookups(options, size, largest_bag) for size, largest_bag in tables)
    if options.sharding == "column":
        pieces = cut_by_columns(rows, dim, ranks)
    else:
        counts = count_row_pieces(options, lookups, ranks, memory / bytes_per_weight(options))
        pieces = [piece for table, count in enumerate(counts) for piece in cut_by_rows(table, rows[table], dim, count)]
    pieces_of_ranks = place(pieces, [piece_traffic(piece, rows, lookups, options) for piece in pieces], ranks)
    return Plan(rows, dim, pieces_of_ranks, lookups, bytes_per_weight(options))


def bytes_per_weight(options: Options) -> float:
    """Returns the bytes of memory per number in a table, with the optimizer's moment. A moment per row counts as its
    share per number."""
    weight = 2 if options.table_data_type == "bf16" else 4
    moment = {"sgd": 0, "adagrad": 4, "rwsadagrad": 4 / options.arch_sparse_feature_size}[options.optimizer]
    return weight if options.inference_only else weight + moment


def expected_lookups(options: Options, rows: int, largest_bag: int) -> float:
    """Returns an estimate of the lookups per batch of all ranks in a table with this number of rows.

    A bag has L lookups, or 1 to L, where L is the table's `--num-indices-per-lookup`. Random data drops equal lookups
    of a bag, which this estimate ignores.
    """
    mean = largest_bag if options.num_indices_per_lookup_fixed else (1 + min(rows, largest_bag)) / 2
    return options.mini_batch_size * min(mean, rows)


def piece_traffic(piece: Piece, rows: Sequence[int], lookups: Sequence[float], options: Options) -> float:
    """Returns how many numbers move per iteration for a piece: a row per lookup, and a pooled row per sample. `rows`
    and `lookups` hold the rows and the expected lookups of each table."""
    return piece.columns * (lookups[piece.table] * piece.rows / rows[piece.table] + options.mini_batch_size)


def count_row_pieces(options: Options, lookups: Sequence[float], ranks: int, room: float) -> list[int]:
    """Returns into how many parts each table is cut by rows. `room` is how many numbers fit on a rank."""
    rows, dim = options.arch_embedding_size, options.arch_sparse_feature_size
    if options.sharding == "row":
        return [min(ranks, size) for size in rows]
    counts = [1] * len(rows)
    if options.sharding == "table":
        return counts
    for table, size in enumerate(rows):
        if size * dim > room:
            counts[table] = min(size, math.ceil(size / max(1, room // dim)))
    while sum(counts) < ranks:
        cuttable = [table for table, size in enumerate(rows) if counts[table] < min(size, ranks)]
        if not cuttable:
            break
        total_rows, total_lookups = sum(rows), sum(lookups)
        heaviest = max(cuttable, key=lambda t: (rows[t] / total_rows + lookups[t] / total_lookups) / counts[t])
        counts[heaviest] += 1
    return counts


def cut_by_rows(table: int, rows: int, dim: int, count: int) -> list[Piece]:
    """Returns `count` pieces of a table, whose sizes differ by at most one row."""
    bounds = [rows * part // count for part in range(count + 1)]
    return [Piece(table, low, high - low, 0, dim) for low, high in pairwise(bounds)]


def cut_by_columns(rows: Sequence[int], dim: int, ranks: int) -> list[Piece]:
    """Returns the pieces of all tables, each of which is cut into the same number of equal parts: the smallest number
    that gives every rank a piece, or if there is none, one part per column."""
    parts = next((n for n in range(min(2, ranks), dim) if dim % n == 0 and n * len(rows) >= ranks), dim)
    width = dim // parts
    return [Piece(table, 0, size, part * width, width) for table, size in enumerate(rows) for part in range(parts)]


def place(pieces: Sequence[Piece], traffic: Sequence[float], ranks: int) -> tuple[tuple[Piece, ...], ...]:
    """Returns the pieces of each rank. Hands out the heaviest piece first, each to the rank that has the least weight
    so far. Of equal ones, the first piece and the first rank come first."""
    elements, total_traffic = sum(piece.elements for piece in pieces), sum(traffic)
    weights = [piece.elements / elements + cost / total_traffic for piece, cost in zip(pieces, traffic, strict=True)]
    load, held = [0.0] * ranks, [[] for _ in range(ranks)]
    for number in sorted(range(len(pieces)), key=lambda number: (-weights[number], number)):
        rank = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[rank] += weights[number]
        held[rank].append(number)
    return tuple(tuple(pieces[number] for number in sorted(numbers)) for numbers in held)


def check_sharding(options: Options, ranks: int) -> None:
    """Raises UsageError, which names the flag, if the batch or the tables cannot be divided among the ranks."""
    if options.mini_batch_size % ranks and not options.inference_only:
        lower = options.mini_batch_size // ranks * ranks
        raise UsageError(
            f"--mini-batch-size={options.mini_batch_size} is the batch of all ranks, and does not divide over "
            f"{ranks} of them; use {f'{lower} or ' if lower else ''}{lower + ranks}"
        )
    if options.sharding == "table" and len(options.arch_embedding_size) < ranks:
        raise UsageError(
            f"--sharding=table: there are {len(options.arch_embedding_size)} tables for {ranks} ranks; use "
            "--sharding=auto, row or column to cut them"
        )
    if options.sharding == "column" and options.optimizer == "rwsadagrad":
        raise UsageError(
            "--optimizer=rwsadagrad has one moment for a row, which --sharding=column would cut; use --sharding=auto, "
            "table or row"
        )
