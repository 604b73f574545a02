"""Criteo's click logs, from text to files that a trainer can read at random.

    python -m dlrm.data.criteo_preprocess --data-set=kaggle --raw-data-file=input/train.txt
    python -m dlrm.data.criteo_preprocess --data-set=terabyte --raw-data-file=input/day --preprocess-memory=16G
    python -m dlrm.data.criteo_preprocess --verify --processed-data-file=input/train_processed

The trainer does the same when it finds no preprocessed data. The result is a folder: `day_0.npy`, `day_1.npy`, ...,
rows of 40 int32 (label, 13 dense features, 26 category ids; the row of MLPerf's binary format), and `manifest.json`,
which says what they were made from.

Ids are numbered by first appearance in the whole text. The text is read once, in chunks, in parallel; in each chunk the
categories of a column are numbered on their own. Then, column by column, those lists of distinct categories (far
shorter than the text) are brought into one numbering, within the memory allowed, and at last each chunk's numbers are
replaced. Whatever is finished is in a file under its final name, so a run that was killed goes on from there.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from dlrm.errors import RunError, UsageError
from dlrm.options import OptionParser, Options, flag
from dlrm.system.files import locked, renamed_when_done

NUM_DENSE, NUM_SPARSE = 13, 26
ROW = 1 + NUM_DENSE + NUM_SPARSE  # numbers in a line of text, and in a row of the output
NPY_HEADER = 128  # bytes before the rows, which numpy pads to a multiple of 64
DAYS = {"kaggle": 7, "terabyte": 24}
FORMAT = 1  # of the folder; to be raised when what is in the files changes
CHUNK_BYTES = 16 * 2**20  # of text; fixed, as the draws of --data-sub-sample-rate go by chunk
CHUNK_MEMORY = 24 * CHUNK_BYTES  # that parsing a chunk takes, at most
ENTRY_MEMORY = 128  # bytes that numbering an entry of a list of categories takes
BLOCK_ENTRIES = 2**18  # of a file that are mapped into memory at a time
UNFINISHED = "unfinished"  # folder within the result's, until that is complete
REPORTED_LINES = 10  # malformed lines that are spelled out


# ---------------------------------------------------------------------------------------------------------------------
# What is read, and what is written
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreprocessJob:
    """Raw text and the settings that decide what comes out of it."""

    data_set: str
    raw: str  # kaggle: the file; terabyte: what comes before _0, _1, ...
    folder: Path  # of the result
    max_ind_range: int = -1
    sub_sample_rate: float = 0.0
    seed: int = 123
    on_bad_line: str = "error"
    memory: int = 4 * 2**30

    @classmethod
    def of(cls, options: Options) -> PreprocessJob:
        return cls(
            options.data_set,
            options.raw_data_file,
            store_folder(options),
            options.max_ind_range,
            options.data_sub_sample_rate,
            options.numpy_rand_seed,
            options.on_bad_line,
            options.preprocess_memory,
        )

    @cached_property
    def inputs(self) -> list[Path]:
        """The text files, in order; RunError if one is missing."""
        return [find_input(Path(name)) for name in raw_names(self.data_set, self.raw)]

    @property
    def chunk_threads(self) -> int:
        """How many threads may have a chunk each in memory."""
        return max(1, min(os.cpu_count() or 1, self.memory // CHUNK_MEMORY))

    def settings(self) -> dict[str, object]:
        """By flag, what the result depends on."""
        settings = {
            "--data-set": self.data_set,
            "--max-ind-range": self.max_ind_range,
            "--data-sub-sample-rate": self.sub_sample_rate,
        }
        return settings | ({"--numpy-rand-seed": self.seed} if self.sub_sample_rate else {})


def raw_names(data_set: str, raw: str) -> list[str]:
    return [raw] if data_set == "kaggle" else [f"{raw}_{day}" for day in range(DAYS[data_set])]


def find_input(path: Path) -> Path:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise UsageError(f"--raw-data-file: there is no file {str(path)!r}, with or without .gz")


def store_folder(options: Options) -> Path:
    """Where preprocessed data is or will be: `--processed-data-file`, else beside the raw data."""
    if options.processed_data_file:
        path = Path(options.processed_data_file)
        return path.with_suffix("") if path.suffix == ".npz" else path
    raw = Path(options.raw_data_file)
    return raw.with_name(raw.name.split(".")[0] + "_processed")


def text_fingerprint(path: Path) -> dict[str, object]:
    """Name, size, and a checksum of 64 samples spread over a file of up to terabytes."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for k in range(64):
            file.seek(size * k // 64)
            digest.update(file.read(2**16))
    return {"file": path.name, "bytes": size, "samples": digest.hexdigest()}


class Manifest(NamedTuple):
    """What `manifest.json` of a folder says; `rows` is empty until the folder is complete. Other files that were made
    from a data set have one that says with which settings."""

    settings: dict[str, object]
    inputs: Sequence[dict] = ()  # text fingerprints
    rows: Sequence[int] = ()  # of each day
    counts: Sequence[int] = ()  # categories of each column
    checksums: Sequence[int] = ()  # CRC-32 of each day's rows
    bad_lines: int = 0
    format: int = FORMAT

    @classmethod
    def of(cls, job: PreprocessJob) -> Manifest:
        return cls(job.settings(), [text_fingerprint(path) for path in job.inputs])

    @classmethod
    def read(cls, folder: Path, name: str = "manifest.json") -> Manifest | None:
        path = folder / name
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise RunError(f"{path}: not a manifest of preprocessed data: {error}") from None

    def write(self, folder: Path, name: str = "manifest.json") -> None:
        with renamed_when_done(folder / name) as file:
            file.write((json.dumps(self._asdict(), indent=2) + "\n").encode())

    @property
    def complete(self) -> bool:
        return bool(self.rows)

    def check_matches(self, wanted: Manifest, path: Path) -> None:
        """RunError that says what differs, if what `path` names was made from other data or with other settings."""
        # A setting that only one of them has is there because of another one, which differs.
        differences = [f"{name}={value}, not {wanted.settings[name]}" for name, value in self.settings.items()
                       if wanted.settings.get(name, value) != value]  # fmt: skip
        if self.format != wanted.format:
            differences.append(f"format {self.format}, not {wanted.format}")
        if wanted.inputs and len(self.inputs) != len(wanted.inputs):
            differences.append(f"{len(self.inputs)} raw files, not {len(wanted.inputs)}")
        for then, now in zip(self.inputs, wanted.inputs, strict=False):
            changed = [key for key in ("file", "bytes", "samples") if then.get(key) != now[key]]
            if changed:
                differences.append(f"{then.get('file')}, which has changed since ({', '.join(changed)})")
        if differences:
            raise RunError(
                f"{path} is stale: it was made with {'; '.join(differences)}. "
                "Delete it, or name another folder by --processed-data-file"
            )


def write_rows(path: Path, blocks: Iterable[np.ndarray], rows: int | None = None) -> int:
    """Writes (n, 40) int32 blocks one after the other; with `rows`, their sum, as .npy. Returns the CRC-32."""
    checksum = 0
    with renamed_when_done(path) as file:
        if rows is not None:
            header = {"descr": "<i4", "fortran_order": False, "shape": (rows, ROW)}
            np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            content = np.ascontiguousarray(block, dtype="<i4").data.cast("B") if block.size else b""
            checksum = zlib.crc32(content, checksum)
            file.write(content)
    return checksum


# ---------------------------------------------------------------------------------------------------------------------
# Text -> numbers
# ---------------------------------------------------------------------------------------------------------------------


class BadLine(NamedTuple):
    """`line` counts from 1, in the chunk or in the file."""

    line: int
    reason: str


@dataclass
class Parsed:
    """The well-formed lines of a chunk."""

    rows: np.ndarray  # (n, 14) int32: label, dense features
    codes: np.ndarray  # (26, n) uint32: categories
    lines: int  # in the chunk, malformed ones included
    bad: list[BadLine]
    crlf: int  # lines that end in CR LF


def parse(text: bytes) -> Parsed:
    """Numbers from tab-separated text. An empty field is 0, a negative dense feature as well."""
    crlf = text.count(b"\r\n") if b"\r" in text else 0
    if crlf:
        text = text.replace(b"\r\n", b"\n")
    truncated = bool(text) and not text.endswith(b"\n")
    if truncated:
        text += b"\n"
    content = np.frombuffer(text, dtype=np.uint8)
    ends = np.flatnonzero(content == ord("\n"))
    tabs = np.searchsorted(np.flatnonzero(content == ord("\t")), ends)
    well_formed = np.diff(tabs, prepend=0) == ROW - 1
    if truncated and not re.search(rb"\t[0-9a-fA-F]{8}\n\Z", text):
        well_formed[-1] = False
    begins = np.append(0, ends[:-1] + 1)
    places = np.flatnonzero(well_formed)  # lines that are in the frame
    if len(places) < len(ends):
        text = b"".join(text[begins[k] : ends[k] + 1] for k in places)
    rows, codes, readable = read_fields(text, len(places))
    if not readable.all():
        well_formed[places[~readable]] = False
        rows, codes = rows[readable], codes[:, readable]
    bad = []
    if not well_formed.all():
        for k in np.flatnonzero(~well_formed):
            line = content[begins[k] : ends[k]].tobytes()
            bad.append(BadLine(int(k) + 1, what_is_wrong(line) or "truncated: the file ends within it"))
    return Parsed(rows, codes, len(ends), bad, crlf)


def read_fields(text: bytes, lines: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`rows` and `codes` of `Parsed`, and which of the lines could be read; each line has 40 fields."""
    if not lines:
        return np.empty((0, 1 + NUM_DENSE), np.int32), np.empty((NUM_SPARSE, 0), np.uint32), np.empty(0, bool)
    import polars  # which takes a while to come in, and only preprocessing needs

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
    """Why a line cannot be read; empty if it can."""
    fields = line.split(b"\t")
    if len(fields) != ROW:
        return f"{len(fields)} fields instead of {ROW}"
    if fields[0] not in (b"", b"0", b"1"):
        return f"field 1: a label is 0 or 1, not {readable_field(fields[0])}"
    for number, field in enumerate(fields[1 : 1 + NUM_DENSE], start=2):
        if field and not (re.fullmatch(rb"[-+]?\d+", field) and -(2**31) <= int(field) < 2**31):
            return f"field {number}: not an integer of 32 bits: {readable_field(field)}"
    for number, field in enumerate(fields[1 + NUM_DENSE :], start=2 + NUM_DENSE):
        if field and not re.fullmatch(rb"[0-9a-fA-F]{1,8}", field):
            return f"field {number}: not a hexadecimal number of 32 bits: {readable_field(field)}"
    return ""


def readable_field(field: bytes) -> str:
    return repr(field[:20].decode(errors="replace")) + ("..." if len(field) > 20 else "")


def read_chunk(path: Path, number: int) -> bytes:
    """The lines of a file that start in the `number`-th stretch of CHUNK_BYTES."""
    with path.open("rb") as file:
        if number:
            file.seek(number * CHUNK_BYTES - 1)
            file.readline()  # belongs to the chunk before
        length = (number + 1) * CHUNK_BYTES - 1 - file.tell()
        return file.read(length) + file.readline() if length >= 0 else b""


def compressed_chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """The chunks of a gzip'd file, as a share of the file's bytes and text."""
    read = 0
    with path.open("rb") as raw, gzip.open(raw) as file:
        try:
            while text := file.read(CHUNK_BYTES) + file.readline():
                before, read = read, raw.tell()
                yield read - before, text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RunError(f"{path}: damaged gzip file: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Parts: parsed chunks, on disk until all categories are numbered
# ---------------------------------------------------------------------------------------------------------------------


def save_part(path: Path, parsed: Parsed, job: PreprocessJob, draw: Sequence[int]) -> int:
    """Writes a chunk whose categories are numbered on their own; returns its number of rows.

    `numbers_j` holds a column as places in `codes_j`, the categories in order of first appearance.
    """
    places = np.arange(len(parsed.rows))
    if job.sub_sample_rate:
        uniforms = np.random.default_rng([job.seed, *draw]).random(len(places))
        places = places[(parsed.rows[:, 0] != 0) | (uniforms >= job.sub_sample_rate)]
        parsed.rows, parsed.codes = parsed.rows[places], parsed.codes[:, places]
    arrays = {
        "rows": parsed.rows,
        "lines": np.array([parsed.lines, parsed.lines - len(parsed.bad), parsed.crlf]),
        "bad_lines": np.array([bad.line for bad in parsed.bad], dtype=np.int64),
        "bad_reasons": np.array([bad.reason for bad in parsed.bad[:REPORTED_LINES]], dtype=np.str_),
    }
    if job.sub_sample_rate:
        arrays["places"] = places  # among the well-formed lines
    sizes = []
    for column, codes in enumerate(parsed.codes):
        if job.max_ind_range > 0:
            codes = codes % np.uint32(job.max_ind_range)
        first, numbers = first_appearances(codes)
        arrays[f"codes_{column}"] = codes[first]
        arrays[f"numbers_{column}"] = numbers.astype(np.min_scalar_type(max(len(first) - 1, 0)))
        sizes.append(len(first))
    with renamed_when_done(path) as file:
        np.savez(file, sizes=np.array(sizes), **arrays)
    return len(parsed.rows)


def first_appearances(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where values appear for the first time, and for each value its place among those."""
    _, first, numbers = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[numbers]


def delete_bad_parts(work: Path) -> None:
    """Those that a killed run with --on-bad-line=skip left lines out of, so that these lines are met again."""
    for part in Part.all(work):
        if len(part["bad_lines"]):
            done_path(work, part.source).unlink(missing_ok=True)
            part.path.unlink()


def done_path(work: Path, source: int) -> Path:
    """The file that is there when all parts of a compressed input are."""
    return work / f"done_{source:02}"


def parse_inputs(job: PreprocessJob, work: Path) -> None:
    """Fills `work` with the parts of all inputs, in parallel."""
    if job.on_bad_line == "error":
        delete_bad_parts(work)
    started, total = time.perf_counter(), sum(path.stat().st_size for path in job.inputs)
    lock, stop, rows = threading.Lock(), threading.Event(), 0
    bar = tqdm(desc="reading text", total=total, unit="B", unit_scale=True, disable=None, leave=False)

    def parse_one(source: int, chunk: int, read) -> None:
        nonlocal rows
        path = work / f"part_{source:02}_{chunk:06}.npz"
        if stop.is_set() or path.exists():
            return
        parsed = parse(read())
        if parsed.bad and job.on_bad_line == "error":
            raise BadInputError(source, chunk, parsed.bad[0])
        kept = save_part(path, parsed, job, (source, chunk))
        with lock:
            rows += kept
            bar.set_postfix_str(f"{rows / (time.perf_counter() - started):,.0f} rows/s", refresh=False)

    def advance(size: int) -> None:
        with lock:
            bar.update(size)

    def parse_plain(source: int, path: Path, chunk: int) -> None:
        parse_one(source, chunk, lambda: read_chunk(path, chunk))
        advance(min(CHUNK_BYTES, path.stat().st_size - chunk * CHUNK_BYTES))

    def parse_compressed(source: int, path: Path) -> None:
        done = done_path(work, source)
        if done.exists():
            return
        for chunk, (size, text) in enumerate(compressed_chunks(path)):
            parse_one(source, chunk, lambda text=text: text)
            if stop.is_set():  # perhaps this very chunk was passed over
                return
            advance(size)
        done.touch()

    with bar, ThreadPoolExecutor(job.chunk_threads, thread_name_prefix="parse") as pool:
        tasks = []
        for source, path in enumerate(job.inputs):
            if path.suffix == ".gz":
                tasks.append(pool.submit(parse_compressed, source, path))
            else:
                chunks = range(-(-path.stat().st_size // CHUNK_BYTES))
                tasks += [pool.submit(parse_plain, source, path, chunk) for chunk in chunks]
        try:
            for task in tasks:
                task.result()
        except BadInputError as bad:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise RunError(bad.message(job, work) + "; --on-bad-line=skip leaves such lines out") from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


class BadInputError(Exception):
    def __init__(self, source: int, chunk: int, bad: BadLine):
        super().__init__(source, chunk, bad)
        self.source, self.chunk, self.bad = source, chunk, bad

    def message(self, job: PreprocessJob, work: Path) -> str:
        """All chunks before this one are in `work`, as chunks of a file start in order."""
        before = sum(int(Part(work, self.source, chunk)["lines"][0]) for chunk in range(self.chunk))
        return f"{job.inputs[self.source]}, line {before + self.bad.line}: {self.bad.reason}"


class Part:
    """A part's arrays, read when asked for."""

    def __init__(self, work: Path, source: int, chunk: int):
        self.source = source
        self.path = work / f"part_{source:02}_{chunk:06}.npz"

    @classmethod
    def all(cls, work: Path) -> list[Part]:
        names = sorted(path.stem.split("_") for path in work.glob("part_*.npz"))
        return [cls(work, int(source), int(chunk)) for _, source, chunk in names]

    def __getitem__(self, name: str) -> np.ndarray:
        with np.load(self.path) as arrays:
            return arrays[name]

    def arrays(self):
        return np.load(self.path)


# ---------------------------------------------------------------------------------------------------------------------
# One numbering of each column's categories
# ---------------------------------------------------------------------------------------------------------------------


ENTRY = np.dtype([("place", "<i8"), ("code", "<u4")])  # of the lists of a column, one after the other


def number_column(column: int, parts: Sequence[Part], starts: np.ndarray, work: Path, memory: int) -> int:
    """Writes the id of each entry of each part's `codes_{column}`, and returns how many ids there are.

    Entries are split by their codes into shares that fit in memory. In each share it is found where codes appear for
    the first time; then those places are counted across all shares. What is as long as all entries together is in
    files.
    """
    result, count_path = work / f"ids_{column}.bin", work / f"count_{column}.npy"
    if result.exists():
        return int(np.load(count_path))
    total, limit = int(starts[-1]), max(1, memory // ENTRY_MEMORY)
    shares = [work / f"share_{column}_{share}.tmp" for share in range(1 + total // limit)]
    split_by_code(column, parts, starts, shares, limit)
    with tempfile.TemporaryFile(dir=work) as file, renamed_when_done(result) as result_file:
        is_new, ids = DiskArray(file, np.bool_, total), DiskArray(result_file, np.int32, total)
        count = sum(mark_new_places(share, is_new) for share in shares)
        for share in shares:
            write_ids(share, is_new, ids)
        with renamed_when_done(count_path) as count_file:  # whoever finds the ids finds it, too
            np.save(count_file, count)
    return count


def split_by_code(column: int, parts: Sequence[Part], starts: np.ndarray, shares: Sequence[Path], limit: int) -> None:
    """Writes each ENTRY to the file of its share, by ascending places; `limit` of them and a part's are in memory."""
    for path in shares:
        path.write_bytes(b"")
    waiting, count = [], 0
    for start, part in zip(starts, parts, strict=False):
        codes = part[f"codes_{column}"]
        waiting.append(np.empty(len(codes), ENTRY))
        waiting[-1]["place"], waiting[-1]["code"] = np.arange(start, start + len(codes)), codes
        count += len(codes)
        if count > limit:
            append_to_shares(np.concatenate(waiting), shares)
            waiting, count = [], 0
    append_to_shares(np.concatenate([np.empty(0, ENTRY), *waiting]), shares)


def append_to_shares(entries: np.ndarray, shares: Sequence[Path]) -> None:
    share_of = entries["code"] % len(shares)
    order = np.argsort(share_of, kind="stable")
    ends = np.searchsorted(share_of, np.arange(1, len(shares)), sorter=order)
    for path, mine in zip(shares, np.split(order, ends), strict=True):
        with path.open("ab") as file:
            entries[mine].tofile(file)


def mark_new_places(share: Path, is_new: DiskArray) -> int:
    """Marks where its codes appear for the first time, and returns how many there are. It then holds the places of its
    entries, those marked, and for each entry which of them it stands for."""
    entries = np.fromfile(share, ENTRY)
    first, numbers = first_appearances(entries["code"])
    new = entries["place"][first]
    is_new.put(new, np.ones(len(new), dtype=np.bool_))
    with share.open("wb") as file:
        for array in (entries["place"], new, numbers):
            np.save(file, array)
    return len(new)


def write_ids(share: Path, is_new: DiskArray, ids: DiskArray) -> None:
    """Deletes the share."""
    with share.open("rb") as file:
        places, new, numbers = (np.load(file) for _ in range(3))
    ids.put(places, is_new.count_before(new)[numbers])
    share.unlink()


class DiskArray:
    """An array of zeros in an empty file, of which a block at a time is mapped into memory."""

    def __init__(self, file: BinaryIO, dtype: type, length: int):
        self._file, self._dtype, self._length = file, np.dtype(dtype), length
        file.truncate(length * self._dtype.itemsize)

    def _blocks(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, slice]]:
        """Each block, which of the ascending places lie in it, and where these are among all places."""
        for begin in range(0, self._length, BLOCK_ENTRIES):
            end = min(begin + BLOCK_ENTRIES, self._length)
            block = np.memmap(self._file, self._dtype, "r+", begin * self._dtype.itemsize, end - begin)
            here = slice(*np.searchsorted(places, [begin, end]))
            yield block, places[here] - begin, here

    def put(self, places: np.ndarray, values: np.ndarray) -> None:
        for block, inside, here in self._blocks(places):
            block[inside] = values[here]

    def count_before(self, places: np.ndarray) -> np.ndarray:
        """How many entries are set before each of the places, which are set themselves."""
        before, counts = 0, np.empty(len(places), dtype=np.int32)
        for block, inside, here in self._blocks(places):
            counts[here] = before + np.cumsum(block)[inside] - 1
            before += np.count_nonzero(block)
        return counts


def number_categories(job: PreprocessJob, parts: Sequence[Part], starts: np.ndarray, work: Path) -> list[int]:
    """`starts[k, j]` is where part k begins in the list of column j. Returns the number of ids of each column."""
    threads = min(4, job.chunk_threads)
    memory = job.memory // 2 // threads  # the parser's allocator may still hold the other half
    with ThreadPoolExecutor(threads, thread_name_prefix="number") as pool:
        counts = pool.map(
            lambda column: number_column(column, parts, starts[:, column], work, memory), range(NUM_SPARSE)
        )
        return list(tqdm(counts, desc="numbering categories", total=NUM_SPARSE, disable=None, leave=False))


# ---------------------------------------------------------------------------------------------------------------------
# Days
# ---------------------------------------------------------------------------------------------------------------------


class DaySlice(NamedTuple):
    """Rows `begin` to `end` of a part."""

    part: int
    begin: int
    end: int


def cut_days(job: PreprocessJob, parts: Sequence[Part]) -> list[list[DaySlice]]:
    """The pieces of each day: a file is a day, except that Kaggle's one file is cut in 7 by lines, as equal as can
    be. What sub-sampling drops counts as a line."""
    lines = [int(part["lines"][1]) for part in parts]
    if job.data_set == "terabyte":
        sizes = [sum(n for n, part in zip(lines, parts, strict=True) if part.source == day)
                 for day in range(DAYS["terabyte"])]  # fmt: skip
    else:
        smaller, extra = divmod(sum(lines), DAYS["kaggle"])
        sizes = [smaller + (day < extra) for day in range(DAYS["kaggle"])]
    ends = np.cumsum(sizes)
    days = [[] for _ in sizes]
    for k, (part, start) in enumerate(zip(parts, accumulate(lines, initial=0), strict=False)):
        places = start + (part["places"] if job.sub_sample_rate else np.arange(lines[k]))
        cuts = [0, *np.searchsorted(places, ends)]
        for day, pieces in enumerate(days):
            if cuts[day] < cuts[day + 1]:
                pieces.append(DaySlice(k, int(cuts[day]), int(cuts[day + 1])))
    return days


def write_days(
    job: PreprocessJob, parts: Sequence[Part], starts: np.ndarray, work: Path
) -> tuple[list[int], list[int]]:
    """The day files; returns rows and checksum of each."""
    days = cut_days(job, parts)
    rows = [sum(piece.end - piece.begin for piece in pieces) for pieces in days]
    bar = tqdm(desc="writing days", total=sum(rows), unit=" rows", unit_scale=True, disable=None, leave=False)

    def blocks(pieces: list[DaySlice]) -> Iterator[np.ndarray]:
        for piece in pieces:
            block = np.empty((piece.end - piece.begin, ROW), dtype=np.int32)
            with parts[piece.part].arrays() as arrays:
                block[:, : 1 + NUM_DENSE] = arrays["rows"][piece.begin : piece.end]
                for column in range(NUM_SPARSE):
                    begin, end = starts[piece.part : piece.part + 2, column]
                    ids = np.fromfile(work / f"ids_{column}.bin", np.int32, end - begin, offset=4 * begin)
                    numbers = arrays[f"numbers_{column}"][piece.begin : piece.end]
                    block[:, 1 + NUM_DENSE + column] = ids[numbers]
            yield block
            bar.update(len(block))

    def write(day: int) -> int:
        path, checksum_path = job.folder / f"day_{day}.npy", work / f"crc_{day}.npy"
        if path.exists() and checksum_path.exists():
            bar.update(rows[day])
            return int(np.load(checksum_path))
        checksum = write_rows(path, blocks(days[day]), rows[day])
        with renamed_when_done(checksum_path) as file:
            np.save(file, checksum)
        return checksum

    with bar, ThreadPoolExecutor(job.chunk_threads, thread_name_prefix="write") as pool:
        return rows, list(pool.map(write, range(len(days))))


# ---------------------------------------------------------------------------------------------------------------------
# The whole of it
# ---------------------------------------------------------------------------------------------------------------------


def preprocess(job: PreprocessJob) -> Manifest:
    """The manifest of the finished folder, which may have been there before. RunError and UsageError say what is
    wrong."""
    wanted = Manifest.of(job)
    found = matching_manifest(job, wanted)
    if found and found.complete:
        return found
    if importlib.util.find_spec("polars") is None:
        raise UsageError("preprocessing needs the package polars: pip install -r requirements-data.txt")
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with locked(job.folder):
            found = matching_manifest(job, wanted)  # as another process may have left it
            return found if found and found.complete else _preprocess(job, wanted, resumed=found is not None)
    except OSError as error:
        raise RunError(f"preprocessing into {job.folder}: {error}; the next run goes on from here") from error


def matching_manifest(job: PreprocessJob, wanted: Manifest) -> Manifest | None:
    """That of the folder; RunError if it is of other data or settings, or if files of a complete one are missing.
    `wanted` has no inputs where the text is gone."""
    found = Manifest.read(job.folder)
    if found:
        found.check_matches(wanted, job.folder)
    if found and found.complete:
        shutil.rmtree(job.folder / UNFINISHED, ignore_errors=True)  # a run was killed just before it would have
        check_sizes(job.folder, found)
        check_lines(job, found)
    return found


def _preprocess(job: PreprocessJob, manifest: Manifest, resumed: bool) -> Manifest:
    if not resumed and {path.name for path in job.folder.iterdir()} - {"manifest.json.tmp"}:
        raise RunError(f"{job.folder} holds other files, and no manifest.json; name an empty folder")
    size, started = sum(path.stat().st_size for path in job.inputs), time.perf_counter()
    verb = "Going on with" if resumed else "Preprocessing"
    # On stderr: of several ranks one does it, whose stdout may be closed.
    print(f"{verb} {job.raw} ({size / 1e9:,.2f} GB) into {job.folder}", file=sys.stderr)
    manifest.write(job.folder)
    work = job.folder / UNFINISHED
    work.mkdir(exist_ok=True)
    parse_inputs(job, work)
    parts = Part.all(work)
    sizes = np.array([part["sizes"] for part in parts]).reshape(-1, NUM_SPARSE)
    starts = np.concatenate([np.zeros((1, NUM_SPARSE), np.int64), np.cumsum(sizes, axis=0)])
    if not len(parts):
        raise RunError(f"{job.raw}: there is no line in it")
    counts = number_categories(job, parts, starts, work)
    rows, checksums = write_days(job, parts, starts, work)
    bad_lines = report_lines(job, parts)
    if not sum(rows):
        raise RunError(f"{job.raw}: there is no well-formed line in it")
    manifest = manifest._replace(rows=rows, counts=counts, checksums=checksums, bad_lines=bad_lines)
    manifest.write(job.folder)
    shutil.rmtree(work, ignore_errors=True)
    seconds = time.perf_counter() - started
    print(
        f"{sum(rows):,} rows in {seconds:,.1f} s: {sum(rows) / seconds:,.0f} rows/s, {size / seconds / 1e6:,.0f} MB/s",
        file=sys.stderr,
    )
    return manifest


def report_lines(job: PreprocessJob, parts: Sequence[Part]) -> int:
    """Prints how many lines were malformed, and the first of them; returns how many."""
    bad_lines = 0
    for source, path in enumerate(job.inputs):
        start, bad, crlf = 0, [], 0
        count = 0
        for part in (part for part in parts if part.source == source):
            lines, _, with_cr = part["lines"]
            numbers = part["bad_lines"]
            bad += [BadLine(start + int(n), str(r)) for n, r in zip(numbers, part["bad_reasons"], strict=False)]
            start, crlf, count = start + int(lines), crlf + int(with_cr), count + len(numbers)
        if crlf:
            print(f"{path}: {crlf:,} of {start:,} lines end in CR LF, and were read as if in LF", file=sys.stderr)
        if count:
            print(f"{path}: {count:,} of {start:,} lines are malformed, and were left out:", file=sys.stderr)
            for line, reason in bad[:REPORTED_LINES]:
                print(f"{path}, line {line}: {reason}", file=sys.stderr)
        bad_lines += count
    return bad_lines


def check_lines(job: PreprocessJob, manifest: Manifest) -> None:
    """RunError if lines were left out that this job does not leave out."""
    if manifest.bad_lines and job.on_bad_line == "error":
        raise RunError(
            f"{job.folder} was made with --on-bad-line=skip, which left out {manifest.bad_lines:,} malformed lines; "
            "give that flag again, or delete the folder and mend the text"
        )


def check_sizes(folder: Path, manifest: Manifest) -> None:
    for day, rows in enumerate(manifest.rows):
        path = folder / f"day_{day}.npy"
        if not path.is_file():
            raise RunError(f"{path} is missing; delete {folder} to preprocess again")
        if path.stat().st_size != NPY_HEADER + 4 * ROW * rows:
            raise RunError(f"{path} is not as long as {rows:,} rows; delete {folder} to preprocess again")


def verify(folder: Path) -> None:
    """RunError names the first day file whose checksum is not the manifest's."""
    manifest = Manifest.read(folder)
    if manifest is None or not manifest.complete:
        raise RunError(f"{folder}: there is no complete preprocessed data set in it")
    check_sizes(folder, manifest)
    for day, expected in enumerate(manifest.checksums):
        path = folder / f"day_{day}.npy"
        checksum = 0
        with path.open("rb") as file:
            file.seek(NPY_HEADER)
            while content := file.read(2**24):
                checksum = zlib.crc32(content, checksum)
        if checksum != expected:
            raise RunError(f"{path} is damaged: its checksum is {checksum:08x}, not {expected:08x}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="criteo_preprocess", description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--verify", action="store_true", help="compare preprocessed data with its checksums")
    try:
        ours, rest = parser.parse_known_args(argv)
        if {"-h", "--help"} & set(rest):
            print(__doc__)
            return 0
        options = Options(**({"data_generation": "dataset"} | OptionParser(prog="criteo_preprocess").parse_given(rest)))
        if ours.verify:
            verify(store_folder(options))
        elif not options.raw_data_file:
            raise UsageError(f"{flag('raw_data_file')} names the text to preprocess")
        else:
            preprocess(PreprocessJob.of(options))
        return 0
    except (UsageError, RunError) as error:
        print(f"criteo_preprocess: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("criteo_preprocess: interrupted; the next run goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
