"""Preprocesses Criteo's click logs: from text to files that the trainer can read in any order.

    python -m dlrm.data.criteo_preprocess --data-set=kaggle --raw-data-file=input/train.txt
    python -m dlrm.data.criteo_preprocess --data-set=terabyte --raw-data-file=input/day --preprocess-memory=16G
    python -m dlrm.data.criteo_preprocess --verify --processed-data-file=input/train_processed

The trainer does this itself when it finds no preprocessed data. The result is a folder with one file of rows per day,
day_0.npy, day_1.npy, ..., and manifest.json, which says what they were made from. A row is 40 int32: the label, 13
dense features, 26 category ids. With --verify, the files of a folder are compared with their checksums instead.

Category ids count the categories of a column in the order in which they first appear in the whole text. The text is
read once, in chunks, several at a time, and the categories of each chunk are numbered separately. Then, column by
column, the chunks' lists of categories, which are much shorter than the text, are numbered as one. At last the numbers
in each chunk are replaced. Whatever is finished is kept in a file, so a run that was killed goes on from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dlrm.data.arrays import NpzFile, load_array
from dlrm.data.criteo_manifest import MANIFEST_NAME, Manifest, check_complete, text_fingerprint, verify
from dlrm.data.criteo_numbering import first_appearances, ids_path, number_column
from dlrm.data.criteo_rows import DAYS, NUM_DENSE, NUM_SPARSE, ROW, day_path, write_rows
from dlrm.data.criteo_text import BadLine, ParsedChunk, compressed_chunks, parse, read_chunk
from dlrm.errors import RunError, UsageError
from dlrm.options import OptionParser, Options, flag
from dlrm.system.endings import end_by, mend_streams
from dlrm.system.files import is_temporary_name, locked, name_without_endings, renamed_when_done

CHUNK_BYTES = 16 * 2**20  # of text; fixed, as the random numbers of --data-sub-sample-rate are drawn chunk by chunk
CHUNK_MEMORY = 24 * CHUNK_BYTES  # bytes that parsing a chunk takes at most
UNFINISHED = "unfinished"  # folder inside that of the result, for what has been done until all is done
REPORTED_LINES = 10  # malformed lines per file that are printed


# ---------------------------------------------------------------------------------------------------------------------
# What is read, and what is written
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreprocessJob:
    """The text to read, the folder to write, and the settings that decide what is written."""

    data_set: str
    raw: str  # kaggle: the file; terabyte: the files' names without _0, _1, ...
    folder: Path
    max_ind_range: int = -1
    sub_sample_rate: float = 0.0
    seed: int = 123
    on_bad_line: str = "error"
    memory: int = 4 * 2**30

    @classmethod
    def from_options(cls, options: Options) -> PreprocessJob:
        """Returns the job that the flags describe."""
        return cls(
            options.data_set,
            options.raw_data_file,
            preprocessed_folder(options),
            options.max_ind_range,
            options.data_sub_sample_rate,
            options.numpy_rand_seed,
            options.on_bad_line,
            options.preprocess_memory,
        )

    @cached_property
    def inputs(self) -> list[Path]:
        """The text files in order. Raises UsageError if one is missing."""
        days = [self.raw] if self.data_set == "kaggle" else [f"{self.raw}_{day}" for day in range(DAYS[self.data_set])]
        return [find_input(Path(name)) for name in days]

    @property
    def chunk_threads(self) -> int:
        """The number of threads, so many that each can have one chunk in memory."""
        return max(1, min(os.cpu_count() or 1, self.memory // CHUNK_MEMORY))

    def settings(self) -> dict[str, object]:
        """Returns the value of each flag that the result depends on."""
        settings = {
            "--data-set": self.data_set,
            "--max-ind-range": self.max_ind_range if self.max_ind_range > 0 else -1,  # 0 or less: no limit
            "--data-sub-sample-rate": self.sub_sample_rate,
        }
        return settings | ({"--numpy-rand-seed": self.seed} if self.sub_sample_rate else {})

    def new_manifest(self) -> Manifest:
        """Returns the manifest of a result that has no rows yet."""
        return Manifest(self.settings(), [text_fingerprint(path) for path in self.inputs])


def find_input(path: Path) -> Path:
    """Returns the path, or the path with .gz, of a text file. Raises UsageError if there is neither."""
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise UsageError(f"--raw-data-file: there is no file {str(path)!r}, with or without .gz")


def preprocessed_folder(options: Options) -> Path:
    """Returns where preprocessed data is or will be: in `--processed-data-file`, or else beside the raw data."""
    if options.processed_data_file:
        path = Path(options.processed_data_file)
        return path.with_suffix("") if path.suffix == ".npz" else path
    raw = Path(options.raw_data_file)
    return raw.with_name(name_without_endings(raw) + "_processed")


# ---------------------------------------------------------------------------------------------------------------------
# Parsed chunks, which stay on the disk until all categories are numbered
# ---------------------------------------------------------------------------------------------------------------------


class ChunkFile:
    """The file of a parsed chunk. Its arrays are read when they are asked for.

    `rows` are the label and the dense features of each row. `codes_j` are the distinct categories of column j in order
    of first appearance, and `numbers_j` says for each row which of them it has. `sizes` are the lengths of the lists of
    codes. `lines` holds the number of all lines, of well-formed lines, and of those that end in CR LF. `bad_lines` are
    the numbers of the malformed lines, and `bad_reasons` says why the first of them are malformed. After sub-sampling,
    `places` says which of the well-formed lines the rows are.
    """

    def __init__(self, work: Path, input_number: int, chunk_number: int):
        self.input_number, self.chunk_number = input_number, chunk_number
        self.path = work / f"part_{input_number:02}_{chunk_number:06}.npz"

    @classmethod
    def all_in(cls, work: Path) -> list[ChunkFile]:
        """Returns the chunks that have been parsed, in the order of the text."""
        names = sorted(path.stem.split("_") for path in work.glob("part_*.npz"))
        return [cls(work, int(input_number), int(chunk_number)) for _, input_number, chunk_number in names]

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one array."""
        with self.arrays() as arrays:
            return arrays[name]

    def arrays(self) -> NpzFile:
        """Opens the file, for several arrays to be read from it."""
        return NpzFile(self.path)

    def write(self, chunk: ParsedChunk, job: PreprocessJob) -> int:
        """Drops negative samples as `--data-sub-sample-rate` says, numbers the categories of the chunk, and writes its
        arrays. Returns the number of rows."""
        kept = np.arange(len(chunk.rows))
        if job.sub_sample_rate:
            generator = np.random.default_rng([job.seed, self.input_number, self.chunk_number])
            uniforms = generator.random(len(kept))
            kept = kept[(chunk.rows[:, 0] != 0) | (uniforms >= job.sub_sample_rate)]
            chunk.rows, chunk.codes = chunk.rows[kept], chunk.codes[:, kept]
        arrays = {
            "rows": chunk.rows,
            "lines": np.array([chunk.lines, chunk.lines - len(chunk.bad_lines), chunk.crlf_lines]),
            "bad_lines": np.array([bad.line for bad in chunk.bad_lines], dtype=np.int64),
            "bad_reasons": np.array([bad.reason for bad in chunk.bad_lines[:REPORTED_LINES]], dtype=np.str_),
        }
        if job.sub_sample_rate:
            arrays["places"] = kept
        sizes = []
        for column, codes in enumerate(chunk.codes):
            if job.max_ind_range > 0:
                codes = codes % np.uint32(job.max_ind_range)
            first, numbers = first_appearances(codes)
            arrays[f"codes_{column}"] = codes[first]
            arrays[f"numbers_{column}"] = numbers.astype(np.min_scalar_type(max(len(first) - 1, 0)))
            sizes.append(len(first))
        with renamed_when_done(self.path) as file:
            np.savez(file, sizes=np.array(sizes), **arrays)
        return len(chunk.rows)


class BadLineError(Exception):
    """A malformed line that ends the run."""

    def __init__(self, chunk_file: ChunkFile, bad_line: BadLine):
        """Counts the line of `bad_line` within its chunk."""
        super().__init__(chunk_file, bad_line)
        self.chunk_file, self.bad_line = chunk_file, bad_line

    def message(self, job: PreprocessJob, work: Path) -> str:
        """Returns a message with the number of the line in its file. Needs all chunks of the file before this one in
        `work`."""
        input_number = self.chunk_file.input_number
        chunks_before = [ChunkFile(work, input_number, number) for number in range(self.chunk_file.chunk_number)]
        line = sum(int(chunk["lines"][0]) for chunk in chunks_before) + self.bad_line.line
        return f"{job.inputs[input_number]}, line {line}: {self.bad_line.reason}"


def all_parsed_path(work: Path, input_number: int) -> Path:
    """Returns the file that is there when all chunks of a compressed input are."""
    return work / f"done_{input_number:02}"


def delete_chunks_with_bad_lines(work: Path) -> None:
    """Deletes the chunks in which a killed run with --on-bad-line=skip left lines out, so that they are read again."""
    for chunk in ChunkFile.all_in(work):
        if len(chunk["bad_lines"]):
            all_parsed_path(work, chunk.input_number).unlink(missing_ok=True)
            chunk.path.unlink()


def parse_inputs(job: PreprocessJob, work: Path) -> None:
    """Fills `work` with the parsed chunks of all inputs, several at a time. Raises RunError for a malformed line unless
    such lines are to be skipped."""
    if job.on_bad_line == "error":
        delete_chunks_with_bad_lines(work)
    started, total = time.perf_counter(), sum(path.stat().st_size for path in job.inputs)
    lock, stop, rows = threading.Lock(), threading.Event(), 0
    bar = tqdm(desc="reading text", total=total, unit="B", unit_scale=True, disable=None, leave=False)

    def parse_chunk(input_number: int, chunk_number: int, read_text: Callable[[], bytes]) -> None:
        nonlocal rows
        chunk_file = ChunkFile(work, input_number, chunk_number)
        if stop.is_set() or chunk_file.path.exists():
            return
        chunk = parse(read_text())
        if chunk.bad_lines and job.on_bad_line == "error":
            raise BadLineError(chunk_file, chunk.bad_lines[0])
        rows_of_chunk = chunk_file.write(chunk, job)
        with lock:
            rows += rows_of_chunk
            bar.set_postfix_str(f"{rows / (time.perf_counter() - started):,.0f} rows/s", refresh=False)

    def advance(size: int) -> None:
        with lock:
            bar.update(size)

    def parse_chunk_of_plain_text(input_number: int, path: Path, chunk_number: int) -> None:
        parse_chunk(input_number, chunk_number, lambda: read_chunk(path, chunk_number, CHUNK_BYTES))
        advance(min(CHUNK_BYTES, path.stat().st_size - chunk_number * CHUNK_BYTES))

    def parse_compressed(input_number: int, path: Path) -> None:
        all_parsed = all_parsed_path(work, input_number)
        if all_parsed.exists():
            return
        for chunk_number, (size, text) in enumerate(compressed_chunks(path, CHUNK_BYTES)):
            parse_chunk(input_number, chunk_number, lambda text=text: text)
            if stop.is_set():  # perhaps before this chunk was parsed
                return
            advance(size)
        all_parsed.touch()

    with bar, ThreadPoolExecutor(job.chunk_threads, thread_name_prefix="parse") as pool:
        tasks = []
        for input_number, path in enumerate(job.inputs):
            if path.suffix == ".gz":
                tasks.append(pool.submit(parse_compressed, input_number, path))
            else:
                chunks = range(-(-path.stat().st_size // CHUNK_BYTES))
                tasks += [pool.submit(parse_chunk_of_plain_text, input_number, path, number) for number in chunks]
        try:
            for task in tasks:  # in the order of the text, so that all chunks before a failed one are there
                task.result()
        except BadLineError as error:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise RunError(error.message(job, work) + "; --on-bad-line=skip leaves such lines out") from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def number_categories(job: PreprocessJob, chunks: Sequence[ChunkFile], starts: np.ndarray, work: Path) -> list[int]:
    """Numbers the categories of each column in all chunks, and returns the number of ids of each column.

    `starts[k, j]` is where the list of chunk k begins among the entries of column j (see `number_column`).
    """
    threads = min(4, job.chunk_threads)
    memory = job.memory // 2 // threads  # the parser's allocator may still hold the other half

    def number(column: int) -> int:
        codes_of_chunks = (chunk[f"codes_{column}"] for chunk in chunks)
        return number_column(column, codes_of_chunks, starts[:, column], work, memory)

    with ThreadPoolExecutor(threads, thread_name_prefix="number") as pool:
        counts = pool.map(number, range(NUM_SPARSE))
        return list(tqdm(counts, desc="numbering categories", total=NUM_SPARSE, disable=None, leave=False))


# ---------------------------------------------------------------------------------------------------------------------
# Days
# ---------------------------------------------------------------------------------------------------------------------


class ChunkRange(NamedTuple):
    """Rows `begin` to `end` of a chunk."""

    chunk: int  # its number in the whole text
    begin: int
    end: int


def cut_days(job: PreprocessJob, chunks: Sequence[ChunkFile]) -> list[list[ChunkRange]]:
    """Returns the ranges of rows that make up each day.

    Each file of Terabyte is a day. Kaggle's one file is cut into 7 days with equal numbers of lines, or one line more
    in the first ones. Lines that sub-sampling drops are counted.
    """
    lines = [int(chunk["lines"][1]) for chunk in chunks]
    if job.data_set == "terabyte":
        sizes = [sum(n for n, chunk in zip(lines, chunks, strict=True) if chunk.input_number == day)
                 for day in range(DAYS["terabyte"])]  # fmt: skip
    else:
        smaller, extra = divmod(sum(lines), DAYS["kaggle"])
        sizes = [smaller + (day < extra) for day in range(DAYS["kaggle"])]
    day_ends = np.cumsum(sizes)
    days = [[] for _ in sizes]
    for k, (chunk, start) in enumerate(zip(chunks, accumulate(lines, initial=0), strict=False)):
        line_of_row = start + (chunk["places"] if job.sub_sample_rate else np.arange(lines[k]))
        cuts = [0, *np.searchsorted(line_of_row, day_ends)]
        for day, ranges in enumerate(days):
            if cuts[day] < cuts[day + 1]:
                ranges.append(ChunkRange(k, int(cuts[day]), int(cuts[day + 1])))
    return days


def write_days(
    job: PreprocessJob, chunks: Sequence[ChunkFile], starts: np.ndarray, work: Path
) -> tuple[list[int], list[int]]:
    """Writes the day files, and returns the number of rows and the checksum of each day."""
    days = cut_days(job, chunks)
    rows = [sum(end - begin for _, begin, end in ranges) for ranges in days]
    bar = tqdm(desc="writing days", total=sum(rows), unit=" rows", unit_scale=True, disable=None, leave=False)

    def blocks(ranges: list[ChunkRange]) -> Iterator[np.ndarray]:
        for chunk, begin, end in ranges:
            block = np.empty((end - begin, ROW), dtype=np.int32)
            with chunks[chunk].arrays() as arrays:
                block[:, : 1 + NUM_DENSE] = arrays["rows"][begin:end]
                for column in range(NUM_SPARSE):
                    first_entry, end_entry = starts[chunk : chunk + 2, column]
                    ids = np.fromfile(ids_path(work, column), np.int32, end_entry - first_entry, offset=4 * first_entry)
                    block[:, 1 + NUM_DENSE + column] = ids[arrays[f"numbers_{column}"][begin:end]]
            yield block
            bar.update(len(block))

    def write_day(day: int) -> int:
        path, checksum_path = day_path(job.folder, day), work / f"crc_{day}.npy"
        if path.exists() and checksum_path.exists():
            bar.update(rows[day])
            return int(load_array(checksum_path))
        checksum = write_rows(path, blocks(days[day]), rows[day])
        with renamed_when_done(checksum_path) as file:
            np.save(file, checksum)
        return checksum

    with bar, ThreadPoolExecutor(job.chunk_threads, thread_name_prefix="write") as pool:
        return rows, list(pool.map(write_day, range(len(days))))


# ---------------------------------------------------------------------------------------------------------------------
# The whole job
# ---------------------------------------------------------------------------------------------------------------------


def preprocess(job: PreprocessJob) -> Manifest:
    """Returns the manifest of the complete folder, and does the job first if that has not been done.

    Raises UsageError if a text file or a package is missing. Raises RunError if the folder was made from other data or
    with other settings, if the text is malformed, or if a file cannot be read or written.
    """
    wanted = job.new_manifest()
    found = matching_manifest(job, wanted)
    if found and found.complete:
        return found
    if importlib.util.find_spec("polars") is None:
        raise UsageError("preprocessing needs the package polars: pip install -r requirements-data.txt")
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with locked(job.folder):
            found = matching_manifest(job, wanted)  # which another process may have written meanwhile
            return found if found and found.complete else _preprocess(job, wanted, resumed=found is not None)
    except OSError as error:
        raise RunError(f"preprocessing into {job.folder}: {error}; the next run goes on from here") from error


def matching_manifest(job: PreprocessJob, wanted: Manifest) -> Manifest | None:
    """Returns the manifest of the job's folder, or None if there is none. `wanted` has no inputs if the text is gone.

    Raises RunError if the folder was made from other data or with other settings, if files of a complete folder are
    missing, or if malformed lines were left out and the job does not skip such lines.
    """
    found = Manifest.read(job.folder)
    if found:
        found.check_matches(wanted, job.folder)
    if found and found.complete:
        shutil.rmtree(job.folder / UNFINISHED, ignore_errors=True)  # left there if a run was killed at its very end
        check_complete(job.folder, found)
        if found.bad_lines and job.on_bad_line == "error":
            raise RunError(
                f"{job.folder} was made with --on-bad-line=skip, which left out {found.bad_lines:,} malformed lines; "
                "give that flag again, or delete the folder and mend the text"
            )
    return found


def _preprocess(job: PreprocessJob, manifest: Manifest, resumed: bool) -> Manifest:
    """Does the job, or what a killed run left of it. Returns the manifest with what has been written."""
    if not resumed and not all(is_temporary_name(path.name, of=MANIFEST_NAME) for path in job.folder.iterdir()):
        raise RunError(f"{job.folder} holds other files, and no manifest.json; name an empty folder")
    size, started = sum(path.stat().st_size for path in job.inputs), time.perf_counter()
    verb = "Going on with" if resumed else "Preprocessing"
    # On stderr, since one of several ranks does the job, and the stdout of that rank may be closed.
    print(f"{verb} {job.raw} ({size / 1e9:,.2f} GB) into {job.folder}", file=sys.stderr)
    manifest.write(job.folder)
    work = job.folder / UNFINISHED
    work.mkdir(exist_ok=True)
    parse_inputs(job, work)
    chunks = ChunkFile.all_in(work)
    sizes = np.array([chunk["sizes"] for chunk in chunks]).reshape(-1, NUM_SPARSE)
    starts = np.concatenate([np.zeros((1, NUM_SPARSE), np.int64), np.cumsum(sizes, axis=0)])
    if not len(chunks):
        raise RunError(f"{job.raw}: there is no line in it")
    counts = number_categories(job, chunks, starts, work)
    rows, checksums = write_days(job, chunks, starts, work)
    bad_lines = report_lines(job, chunks)
    if not sum(rows):
        well_formed = sum(int(chunk["lines"][1]) for chunk in chunks)
        reason = f"--data-sub-sample-rate={job.sub_sample_rate:g} drops all of its" if well_formed else "there are no"
        raise RunError(f"{job.raw}: {reason} well-formed lines")
    manifest = manifest._replace(rows=rows, counts=counts, checksums=checksums, bad_lines=bad_lines)
    manifest.write(job.folder)
    shutil.rmtree(work, ignore_errors=True)
    seconds = time.perf_counter() - started
    print(
        f"{sum(rows):,} rows in {seconds:,.1f} s: {sum(rows) / seconds:,.0f} rows/s, {size / seconds / 1e6:,.0f} MB/s",
        file=sys.stderr,
    )
    return manifest


def report_lines(job: PreprocessJob, chunks: Sequence[ChunkFile]) -> int:
    """Prints how many lines of each file end in CR LF or are malformed, and the first malformed ones. Returns the
    number of malformed lines in all files."""
    bad_lines_of_all = 0
    for input_number, path in enumerate(job.inputs):
        lines = crlf_lines = num_bad_lines = 0
        first_bad_lines = []
        for chunk in chunks:
            if chunk.input_number == input_number:
                numbers, reasons = chunk["bad_lines"], chunk["bad_reasons"]
                first_bad_lines += [(lines + int(n), str(r)) for n, r in zip(numbers, reasons, strict=False)]
                lines_of_chunk, _, crlf_lines_of_chunk = chunk["lines"]
                lines, crlf_lines = lines + int(lines_of_chunk), crlf_lines + int(crlf_lines_of_chunk)
                num_bad_lines += len(numbers)
        if crlf_lines:
            print(f"{path}: {crlf_lines:,} of {lines:,} lines end in CR LF, and were read as if in LF", file=sys.stderr)
        if num_bad_lines:
            print(f"{path}: {num_bad_lines:,} of {lines:,} lines are malformed, and were left out:", file=sys.stderr)
            for line, reason in first_bad_lines[:REPORTED_LINES]:
                print(f"{path}, line {line}: {reason}", file=sys.stderr)
        bad_lines_of_all += num_bad_lines
    return bad_lines_of_all


def main(argv: Sequence[str] | None = None) -> int:
    """Preprocesses or verifies what the command line names. Returns the exit status."""
    prog = "python -m dlrm.data.criteo_preprocess"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0], add_help=False)
    mend_streams()
    parser.add_argument("--verify", action="store_true", help="compare preprocessed data with its checksums")
    try:
        ours, rest = parser.parse_known_args(argv)
        if {"-h", "--help"} & set(rest):
            print(__doc__)
            return 0
        options = Options(**({"data_generation": "dataset"} | OptionParser(prog=prog).parse_given(rest)))
        if ours.verify:
            verify(preprocessed_folder(options))
        elif not options.raw_data_file:
            raise UsageError(f"{flag('raw_data_file')} names the text to preprocess")
        else:
            preprocess(PreprocessJob.from_options(options))
        return 0
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the next run goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        return end_by(prog, error)


if __name__ == "__main__":
    sys.exit(main())
