"""Which rank holds what of the tables.

A table is one piece, or is cut by rows or by columns; each piece lives on one rank. Pieces are handed out heaviest
first, each to the rank that has least so far, where weight is a piece's share of all memory plus its share of all
traffic. The result depends on the flags and on the memory of a rank alone, so every rank finds the same.

Without column cuts, all pieces are as wide as the tables, D. With them, every table is cut in the same number of parts,
so that all pieces are equally wide again: one operator serves all pieces of a rank.
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
    """Rows and columns of a table, or all of it."""

    table: int
    first_row: int
    rows: int
    first_column: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    def cut_from(self, table):
        """Its part of a whole table, or of whatever has as many rows, and as many columns if any."""
        return table[(self.rows_slice, self.columns_slice)[: table.ndim]]

    @property
    def rows_slice(self) -> slice:
        return slice(self.first_row, self.first_row + self.rows)

    @property
    def columns_slice(self) -> slice:
        return slice(self.first_column, self.first_column + self.columns)

    def copy_rows(self, block, first: int, into) -> None:
        """Of a block of whole rows of the table, `first` being the first, those of this piece, into its tensor."""
        low, high = max(first, self.first_row), min(first + len(block), self.first_row + self.rows)
        if low < high:
            into[low - self.first_row : high - self.first_row].copy_(
                block[low - first : high - first, self.columns_slice]
            )

    def name(self, table_rows: int, dim: int) -> str:
        """`3` for a whole table, `3[0:500]` for rows of it, `3[:,0:8]` for columns."""
        if self.rows < table_rows:
            return f"{self.table}[{self.first_row}:{self.first_row + self.rows}]"
        if self.columns < dim:
            return f"{self.table}[:,{self.first_column}:{self.first_column + self.columns}]"
        return str(self.table)


@dataclass(frozen=True)
class Plan:
    """The pieces of each rank, each rank's in the order of tables, rows and columns. Some ranks may have none."""

    table_rows: tuple[int, ...]
    dim: int
    ranks: tuple[tuple[Piece, ...], ...]
    lookups: tuple[float, ...]  # expected lookups of a global batch in each table
    bytes_per_weight: float  # of a table, with what the optimizer keeps

    @property
    def width(self) -> int:
        """Columns of every piece."""
        return next(piece.columns for pieces in self.ranks for piece in pieces)

    @property
    def pieces(self) -> list[Piece]:
        """All of them, rank by rank."""
        return [piece for pieces in self.ranks for piece in pieces]

    def held_pieces(self, rank: int) -> tuple[Piece, ...]:
        """What the rank keeps in memory. One that has no piece keeps a row that nobody looks up, so that nothing else
        has to know of such ranks."""
        return self.ranks[rank] or (Piece(0, 0, 1, 0, self.width),)

    def bytes(self, rank: int) -> int:
        return round(self.bytes_per_weight * sum(piece.elements for piece in self.held_pieces(rank)))

    def expected_lookups(self, rank: int) -> float:
        return sum(self.lookups[p.table] * p.rows / self.table_rows[p.table] for p in self.ranks[rank])

    def __str__(self) -> str:
        """A line for each rank."""
        rows = [("rank", "tables", "bytes", "expected lookups a batch")]
        for rank, pieces in enumerate(self.ranks):
            names = " ".join(piece.name(self.table_rows[piece.table], self.dim) for piece in pieces) or "none"
            size = self.bytes(rank) if pieces else 0
            rows.append((str(rank), names, f"{size:,}", f"{self.expected_lookups(rank):,.0f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def make_plan(options: Options, ranks: int, memory: float = math.inf) -> Plan:
    """The plan for `--sharding` on that many ranks, each with room for `memory` bytes of tables; UsageError if there is
    none."""
    rows, dim = options.arch_embedding_size, options.arch_sparse_feature_size
    lookups = tuple(expected_lookups(options, size) for size in rows)
    if options.sharding == "column":
        pieces = cut_by_columns(rows, dim, ranks)
    else:
        counts = count_row_pieces(options, lookups, ranks, memory / bytes_per_weight(options))
        pieces = [piece for table, count in enumerate(counts) for piece in cut_by_rows(table, rows[table], dim, count)]
    placed = place(pieces, [piece_traffic(piece, rows, lookups, options) for piece in pieces], ranks)
    return Plan(rows, dim, placed, lookups, bytes_per_weight(options))


def bytes_per_weight(options: Options) -> float:
    """Of a table: its weight, and the optimizer's moment, which may be one for a row."""
    weight = 2 if options.table_data_type == "bf16" else 4
    moment = {"sgd": 0, "adagrad": 4, "rwsadagrad": 4 / options.arch_sparse_feature_size}[options.optimizer]
    return weight if options.inference_only else weight + moment


def expected_lookups(options: Options, rows: int) -> float:
    """Of a global batch in a table of so many rows: bags have 1 to L lookups, or L. Equal ones count once, which the
    estimate leaves out."""
    largest = min(rows, options.num_indices_per_lookup)
    mean = options.num_indices_per_lookup if options.num_indices_per_lookup_fixed else (1 + largest) / 2
    return options.mini_batch_size * min(mean, rows)


def piece_traffic(piece: Piece, rows: Sequence[int], lookups: Sequence[float], options: Options) -> float:
    """Numbers that move for a piece in an iteration: a row for each lookup, and a pooled row for each sample."""
    return piece.columns * (lookups[piece.table] * piece.rows / rows[piece.table] + options.mini_batch_size)


def count_row_pieces(options: Options, lookups: Sequence[float], ranks: int, room: float) -> list[int]:
    """Into how many parts each table is cut by rows; `room` is what fits on a rank, in numbers."""
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
    """Parts that differ by a row at most."""
    bounds = [rows * part // count for part in range(count + 1)]
    return [Piece(table, low, high - low, 0, dim) for low, high in pairwise(bounds)]


def cut_by_columns(rows: Sequence[int], dim: int, ranks: int) -> list[Piece]:
    """Each table in as few equal parts as give every rank a piece, or else in single columns."""
    parts = next((n for n in range(min(2, ranks), dim) if dim % n == 0 and n * len(rows) >= ranks), dim)
    width = dim // parts
    return [Piece(table, 0, size, part * width, width) for table, size in enumerate(rows) for part in range(parts)]


def place(pieces: Sequence[Piece], traffic: Sequence[float], ranks: int) -> tuple[tuple[Piece, ...], ...]:
    """Heaviest first, each to the rank that has least; ties go by the order of pieces and ranks."""
    elements, total_traffic = sum(piece.elements for piece in pieces), sum(traffic)
    weights = [piece.elements / elements + cost / total_traffic for piece, cost in zip(pieces, traffic, strict=True)]
    load, held = [0.0] * ranks, [[] for _ in range(ranks)]
    for number in sorted(range(len(pieces)), key=lambda number: (-weights[number], number)):
        rank = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[rank] += weights[number]
        held[rank].append(number)
    return tuple(tuple(pieces[number] for number in sorted(numbers)) for numbers in held)


def check_sharding(options: Options, ranks: int) -> None:
    """UsageError, naming the flag, where the batch or the tables can't be shared out."""
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
