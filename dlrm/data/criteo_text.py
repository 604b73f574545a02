"""Turns chunks of Criteo's text into numbers, and says why a malformed line cannot be read."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dlrm.data.criteo_rows import NUM_DENSE, NUM_SPARSE, ROW
from dlrm.errors import RunError


class BadLine(NamedTuple):
    """A malformed line."""

    line: int  # from 1, in the chunk or in the file
    reason: str


@dataclass
class ParsedChunk:
    """The well-formed lines of a chunk."""

    rows: np.ndarray  # (n, 14) int32: label, dense features
    codes: np.ndarray  # (26, n) uint32: the categories, as in the text
    lines: int  # in the chunk, malformed ones included
    bad_lines: list[BadLine]
    crlf_lines: int  # that end in CR LF


# ---------------------------------------------------------------------------------------------------------------------
# Chunks of a file
# ---------------------------------------------------------------------------------------------------------------------


def read_chunk(path: Path, number: int, chunk_bytes: int) -> bytes:
    """Returns the lines of a file that start in chunk `number`, where the file is cut after each `chunk_bytes`."""
    with path.open("rb") as file:
        if number:
            file.seek(number * chunk_bytes - 1)
            file.readline()  # belongs to the chunk before
        length = (number + 1) * chunk_bytes - 1 - file.tell()
        return file.read(length) + file.readline() if length >= 0 else b""


def compressed_chunks(path: Path, chunk_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a gzip'd file in chunks of about `chunk_bytes`. Each comes with the number of bytes that were
    read from the file for it. Raises RunError if the file is damaged."""
    position = 0
    with path.open("rb") as raw, gzip.open(raw) as file:
        try:
            while text := file.read(chunk_bytes) + file.readline():
                before, position = position, raw.tell()
                yield position - before, text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RunError(f"{path}: damaged gzip file: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------------------------------


def parse(text: bytes) -> ParsedChunk:
    """Returns the numbers in lines of tab-separated text. An empty field and a negative dense feature become 0."""
    crlf_lines = text.count(b"\r\n") if b"\r" in text else 0
    if crlf_lines:
        text = text.replace(b"\r\n", b"\n")
    truncated = bool(text) and not text.endswith(b"\n")
    if truncated:
        text += b"\n"
    content = np.frombuffer(text, dtype=np.uint8)
    ends = np.flatnonzero(content == ord("\n"))
    tabs_before_end = np.searchsorted(np.flatnonzero(content == ord("\t")), ends)
    well_formed = np.diff(tabs_before_end, prepend=0) == ROW - 1
    if truncated and not re.search(rb"\t[0-9a-fA-F]{8}\n\Z", text):
        well_formed[-1] = False
    begins = np.append(0, ends[:-1] + 1)
    complete_lines = np.flatnonzero(well_formed)
    if len(complete_lines) < len(ends):
        text = b"".join(text[begins[line] : ends[line] + 1] for line in complete_lines)
    rows, codes, readable = read_fields(text, len(complete_lines))
    if not readable.all():
        well_formed[complete_lines[~readable]] = False
        rows, codes = rows[readable], codes[:, readable]
    bad_lines = []
    if not well_formed.all():
        for line in np.flatnonzero(~well_formed):
            reason = what_is_wrong(content[begins[line] : ends[line]].tobytes())
            bad_lines.append(BadLine(int(line) + 1, reason or "the file ends within it, or lacks a newline behind it"))
    return ParsedChunk(rows, codes, len(ends), bad_lines, crlf_lines)


def read_fields(text: bytes, lines: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `rows` and `codes` as in `ParsedChunk`, and which of the lines could be read, (lines,) bool. Each line of
    the text has 40 fields."""
    if not lines:
        return np.empty((0, 1 + NUM_DENSE), np.int32), np.empty((NUM_SPARSE, 0), np.uint32), np.empty(0, bool)
    import polars  # takes long to import, and only preprocessing needs it

    names = [str(column) for column in range(ROW)]
    numbers, categories = names[: 1 + NUM_DENSE], names[1 + NUM_DENSE :]
    schema = dict.fromkeys(numbers, polars.Int32) | dict.fromkeys(categories, polars.String)
    frame = polars.read_csv(
        text, separator="\t", has_header=False, schema=schema, quote_char=None, encoding="utf8-lossy",
        ignore_errors=True,
    )  # fmt: skip
    frame = frame.with_columns(
        polars.col(categories).str.to_integer(base=16, strict=False, dtype=polars.Int64), polars.col(numbers)
    )
    content = np.frombuffer(text, dtype=np.uint8)
    separators = np.flatnonzero((content == ord("\t")) | (content == ord("\n")))
    empty = (np.diff(separators, prepend=-1) == 1).reshape(lines, ROW)
    readable = np.ones(lines, dtype=bool)
    for column, name in enumerate(names):
        nulls = frame[name].is_null()
        if nulls.any():
            readable &= ~nulls.to_numpy() | empty[:, column]
    frame = frame.fill_null(0)
    codes = frame.select(categories).to_numpy().T
    readable &= ((codes >= 0) & (codes < 2**32)).all(axis=0)
    rows = np.ascontiguousarray(frame.select(numbers).to_numpy())
    readable &= (rows[:, 0] == 0) | (rows[:, 0] == 1)
    return np.maximum(rows, 0), codes.astype(np.uint32), readable


def what_is_wrong(line: bytes) -> str:
    """Returns why a line cannot be read. The text is empty if the line can be read."""
    fields = line.split(b"\t")
    if len(fields) != ROW:
        return f"{len(fields)} fields instead of {ROW}"
    if fields[0] not in (b"", b"0", b"1"):
        return f"field 1: a label is 0 or 1, not {shortened(fields[0])}"
    for number, field in enumerate(fields[1 : 1 + NUM_DENSE], start=2):
        if field and not (re.fullmatch(rb"[-+]?\d+", field) and -(2**31) <= int(field) < 2**31):
            return f"field {number}: not an integer of 32 bits: {shortened(field)}"
    for number, field in enumerate(fields[1 + NUM_DENSE :], start=2 + NUM_DENSE):
        if field and not re.fullmatch(rb"[0-9a-fA-F]{1,8}", field):
            return f"field {number}: not a hexadecimal number of 32 bits: {shortened(field)}"
    return ""


def shortened(field: bytes) -> str:
    """Returns a field in quotes, cut off after 20 bytes."""
    return repr(field[:20].decode(errors="replace")) + ("..." if len(field) > 20 else "")
