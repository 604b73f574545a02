"""Preprocessing of Criteo text, compared with a loop over lines."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings

from benchmarks import criteo_loop
from benchmarks.criteo_memory import most_memory
from dlrm.data import criteo_preprocess
from dlrm.data.criteo_files import open_stored_data_set
from dlrm.data.criteo_manifest import Manifest, verify
from dlrm.data.criteo_preprocess import PreprocessJob, preprocess, preprocessed_folder
from dlrm.errors import RunError, UsageError
from dlrm.options import Options

pytest.importorskip("polars", reason="preprocessing needs polars: pip install -r requirements-data.txt")

LINE = b"\t".join([b"1", *[b"5"] * 13, *[b"0000beef"] * 26]) + b"\n"


def random_text(rows: int, seed: int = 0) -> bytes:
    """Returns lines with empty fields, negative numbers, and both frequent and rare categories."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        dense = [str(x) if x > -3 else "" for x in rng.integers(-4, 2000, 13)]
        sparse = [f"{int(x) * 2654435761 % 2**32:08x}" if x else "" for x in (rng.pareto(0.5, 26) % 5000).astype(int)]
        lines.append("\t".join([str(rng.integers(2)), *dense, *sparse]))
    return ("\n".join(lines) + "\n").encode()


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def days_of(folder) -> list[np.ndarray]:
    return [np.load(folder / f"day_{day}.npy") for day in range(len(list(folder.glob("day_*.npy"))))]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(criteo_preprocess, "CHUNK_BYTES", 1000)


numbers = st.one_of(st.just(""), st.integers(-(2**31), 2**31 - 1).map(str), st.integers(0, 9).map(str))
categories = st.one_of(
    st.just(""), st.integers(0, 2**32 - 1).map("{:08x}".format), st.integers(0, 5).map("{:x}".format),
    st.integers(2**31 - 2, 2**31 + 2).map("{:08X}".format),
)  # fmt: skip
lines = st.tuples(st.sampled_from(["0", "1", ""]), *[numbers] * 13, *[categories] * 26).map("\t".join)


@given(
    st.lists(lines, min_size=1, max_size=30),
    st.sampled_from([-1, 1, 7, 1000, 2**31 - 1]),
    st.integers(150, 3000),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
)
@settings(deadline=None, max_examples=20)
def test_rows_equal_those_of_a_loop_over_lines(tmp_path_factory, rows, max_ind_range, chunk_bytes, compressed, newline):
    folder = tmp_path_factory.mktemp("criteo")
    text = "".join(row + newline for row in rows).encode()
    raw = folder / "train.txt"
    (folder / "train.txt.gz" if compressed else raw).write_bytes(gzip.compress(text) if compressed else text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(criteo_preprocess, "CHUNK_BYTES", chunk_bytes)
        manifest = preprocess(PreprocessJob("kaggle", str(raw), folder / "out", max_ind_range, memory=4096))
    (expected,), counts = criteo_loop.read([text], max_ind_range)
    assert manifest.counts == counts
    for ours, theirs in zip(days_of(folder / "out"), criteo_loop.cut(expected), strict=True):
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("small_chunks")
def test_terabyte_days_are_files_with_or_without_gzip(tmp_path):
    texts = [random_text(5 + day, seed=day) for day in range(24)]
    for day, text in enumerate(texts):
        name = f"day_{day}.gz" if day % 2 else f"day_{day}"
        (tmp_path / name).write_bytes(gzip.compress(text) if day % 2 else text)
    manifest = preprocess(PreprocessJob("terabyte", str(tmp_path / "day"), tmp_path / "out", 100))
    expected, counts = criteo_loop.read(texts, 100)
    assert manifest.counts == counts
    assert manifest.rows == [5 + day for day in range(24)]
    for ours, theirs in zip(days_of(tmp_path / "out"), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("small_chunks")
def test_a_run_that_a_malformed_line_stopped_goes_on(tmp_path):
    texts = [random_text(12, seed=day) for day in range(24)]
    for day, text in enumerate(texts):
        (tmp_path / f"day_{day}.gz").write_bytes(gzip.compress(text + (b"1\t2\n" if day == 1 else b"")))
    with pytest.raises(RunError, match=r"day_1.gz, line 13: 2 fields instead of 40"):
        preprocess(PreprocessJob("terabyte", str(tmp_path / "day"), tmp_path / "out"))
    preprocess(PreprocessJob("terabyte", str(tmp_path / "day"), tmp_path / "out", on_bad_line="skip"))
    np.testing.assert_array_equal(np.concatenate(days_of(tmp_path / "out")), np.concatenate(criteo_loop.read(texts)[0]))


@pytest.mark.usefixtures("small_chunks")
def test_sub_sampling_drops_only_negatives_and_always_the_same(tmp_path):
    text = random_text(200)
    (tmp_path / "train.txt").write_bytes(text)
    for name in ("one", "two"):
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / name, sub_sample_rate=0.5))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    whole = criteo_loop.cut(criteo_loop.read([text])[0][0])
    for kept, day in zip(days_of(tmp_path / "one"), whole, strict=True):
        assert (kept[:, 0] == 1).sum() == (day[:, 0] == 1).sum()
        assert 0 < (kept[:, 0] == 0).sum() < (day[:, 0] == 0).sum()
        assert set(map(tuple, kept[:, :14])) <= set(map(tuple, day[:, :14]))


def test_sub_sampling_that_leaves_nothing_says_so(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"0" + LINE[1:])
    job = PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out", sub_sample_rate=0.999999)
    with pytest.raises(
        RunError, match=r"train\.txt: --data-sub-sample-rate=0\.999999 drops all of its well-formed lines"
    ):
        preprocess(job)


def test_no_limit_of_ids_is_the_same_whichever_number_says_so(tmp_path):
    (tmp_path / "train.txt").write_bytes(random_text(50))
    for limit in (-1, 0, -7):
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out", max_ind_range=limit))


@pytest.mark.parametrize(
    ("raw", "folder"), [("train.txt", "train_processed"), (".a.txt.gz", ".a_processed"), ("..a", "..a_processed")]
)
def test_the_folder_has_the_name_of_the_text(raw, folder):
    assert preprocessed_folder(Options(raw_data_file=f"x/{raw}")) == Path("x") / folder


def test_a_last_line_without_its_end_is_malformed(tmp_path):
    (tmp_path / "train.txt").write_bytes(random_text(9) + LINE[:-9])
    job = PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out")
    with pytest.raises(RunError, match=r"line 10: the file ends within it, or lacks a newline behind it"):
        preprocess(job)


BAD = {
    "fields": (LINE.replace(b"\t5", b"", 1), "39 fields instead of 40"),
    "too many": (LINE[:-1] + b"\tff\n", "41 fields instead of 40"),
    "blank": (b"\n", "1 fields instead of 40"),
    "hex": (LINE.replace(b"beef", b"beeg", 1), "field 15: not a hexadecimal number of 32 bits: '0000beeg'"),
    "long hex": (LINE.replace(b"0000beef", b"10000beef", 1), "field 15: not a hexadecimal number"),
    "number": (LINE.replace(b"\t5", b"\t5.5", 1), "field 2: not an integer of 32 bits: '5.5'"),
    "large": (LINE.replace(b"\t5", b"\t2147483648", 1), "field 2: not an integer of 32 bits"),
    "label": (b"2" + LINE[1:], "field 1: a label is 0 or 1, not '2'"),
    "bytes": (LINE.replace(b"beef", b"be\xff\xfe", 1), "field 15: not a hexadecimal number"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.usefixtures("small_chunks")
def test_a_malformed_line_is_named_or_left_out(tmp_path, capsys, kind):
    line, reason = BAD[kind]
    good = random_text(40).splitlines(keepends=True)
    (tmp_path / "train.txt").write_bytes(b"".join([*good[:17], line, *good[17:]]))
    with pytest.raises(RunError, match="line 18: ") as refusal:
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out"))
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    manifest = preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out", on_bad_line="skip"))
    assert manifest.bad_lines == 1
    assert f"train.txt, line 18: {reason}" in capsys.readouterr().err
    np.testing.assert_array_equal(np.concatenate(days_of(tmp_path / "out")), criteo_loop.read([b"".join(good)])[0][0])
    with pytest.raises(RunError, match=r"out was made with --on-bad-line=skip, which left out 1 malformed lines"):
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.usefixtures("small_chunks")
def test_a_line_that_a_killed_run_skipped_ends_the_next_run(tmp_path, monkeypatch, suffix):
    good = random_text(40).splitlines(keepends=True)
    text = b"".join([*good[:17], b"1\t2\n", *good[17:]])
    (tmp_path / f"train.txt{suffix}").write_bytes(gzip.compress(text) if suffix else text)
    skipping = PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out", on_bad_line="skip")
    with monkeypatch.context() as patch:
        patch.setattr(criteo_preprocess, "number_categories", lambda *_: 1 / 0)  # fails when all text has been read
        with pytest.raises(ZeroDivisionError):
            preprocess(skipping)
    with pytest.raises(RunError, match="line 18: 2 fields instead of 40; --on-bad-line=skip leaves such lines out"):
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out"))
    assert preprocess(skipping).bad_lines == 1


def test_a_truncated_last_line_and_crlf_are_reported(tmp_path, capsys):
    (tmp_path / "train.txt").write_bytes(10 * LINE.replace(b"\n", b"\r\n") + LINE[:-4])
    with pytest.raises(RunError, match="line 11: the file ends within it"):
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out"))
    manifest = preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out", on_bad_line="skip"))
    assert sum(manifest.rows) == 10
    assert "10 of 11 lines end in CR LF" in capsys.readouterr().err


def test_a_last_line_without_newline_counts_if_it_is_whole(tmp_path):
    (tmp_path / "train.txt").write_bytes(10 * LINE + LINE[:-1])
    assert sum(preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out")).rows) == 11


def test_a_damaged_gzip_file_is_named(tmp_path):
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(random_text(100))[:-100])
    with pytest.raises(RunError, match=r"train.txt.gz: damaged gzip file"):
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out"))


def test_a_stale_folder_is_refused_and_says_what_differs(tmp_path):
    raw = tmp_path / "train.txt"
    raw.write_bytes(random_text(50))
    job = PreprocessJob("kaggle", str(raw), tmp_path / "out", 100)
    first = preprocess(job)
    assert preprocess(job) == first  # without doing anything
    with pytest.raises(RunError, match=r"out is stale: it was made with --max-ind-range=100, not 7\. Delete it"):
        preprocess(PreprocessJob("kaggle", str(raw), tmp_path / "out", 7))
    os.utime(raw)
    assert preprocess(job) == first  # the time of the file does not matter
    raw.write_bytes(random_text(50, seed=1))
    with pytest.raises(RunError, match=r"train.txt, which has changed since"):
        preprocess(job)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"--raw-data-file: there is no file .*day_0"):
        preprocess(PreprocessJob("terabyte", str(tmp_path / "day"), tmp_path / "out"))
    (tmp_path / "train.txt").write_bytes(LINE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").touch()
    with pytest.raises(RunError, match=r"holds other files, and no manifest"):
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out"))


def test_an_error_says_how_to_install_polars(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_bytes(LINE)
    monkeypatch.setattr(criteo_preprocess.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"polars: pip install -r requirements-data.txt"):
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out"))


def test_memory_stays_below_the_limit(tmp_path):
    """The text is almost twice as large as the limit, and no category appears twice in it."""
    limit, rows = 32 * 2**20, 260_000
    lines = np.full((rows, 2 + 13 * 2 + 26 * 9), ord("\t"), dtype=np.uint8)
    lines[:, : 2 + 13 * 2 : 2] = ord("1")
    rng, digits = np.random.default_rng(0), np.frombuffer(b"0123456789abcdef", np.uint8)
    lines[:, 2 + 13 * 2 :].reshape(rows, 26, 9)[:, :, :8] = digits[rng.integers(0, 16, (rows, 26, 8), np.uint8)]
    lines[:, -1] = ord("\n")
    lines.tofile(tmp_path / "train.txt")
    taken = most_memory(tmp_path / "train.txt", tmp_path / "out", limit, chunk_bytes=2**20)
    assert taken < limit < lines.size / 1.8
    assert sum(Manifest.read(tmp_path / "out").rows) == rows


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path, suffix):
    text = random_text(400)
    (tmp_path / f"train.txt{suffix}").write_bytes(gzip.compress(text) if suffix else text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(criteo_preprocess, "CHUNK_BYTES", 4000)
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "undisturbed"))
    program = (
        f"import pathlib, polars; from dlrm.data import criteo_preprocess\n"
        f"criteo_preprocess.CHUNK_BYTES = 4000; print('ready', flush=True)\n"
        f"criteo_preprocess.preprocess(criteo_preprocess.PreprocessJob('kaggle', {str(tmp_path / 'train.txt')!r}, "
        f"pathlib.Path({str(tmp_path / 'killed')!r})))"
    )
    kills, delays = 0, np.random.default_rng(0).uniform(0.02, 0.5, 8)
    for delay in delays:
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(criteo_preprocess, "CHUNK_BYTES", 4000)
        preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "killed"))
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "undisturbed")


def test_verify_finds_a_flipped_byte(tmp_path, capsys):
    (tmp_path / "train.txt").write_bytes(random_text(50))
    preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out"))
    command = ["--verify", f"--processed-data-file={tmp_path / 'out'}"]
    assert criteo_preprocess.main(command) == 0
    content = bytearray((tmp_path / "out" / "day_3.npy").read_bytes())
    content[200] ^= 1
    (tmp_path / "out" / "day_3.npy").write_bytes(content)
    assert criteo_preprocess.main(command) == 1
    assert "day_3.npy is damaged" in capsys.readouterr().err


@pytest.fixture
def preprocessed(tmp_path) -> Path:
    """A complete folder of 50 rows."""
    (tmp_path / "train.txt").write_bytes(random_text(50))
    preprocess(PreprocessJob("kaggle", str(tmp_path / "train.txt"), tmp_path / "out"))
    return tmp_path / "out"


def test_a_manifest_with_a_wrong_digit_is_refused(preprocessed):
    path = preprocessed / "manifest.json"
    text = path.read_text()
    digits = [position for position, character in enumerate(text) if character.isdigit()]
    assert len(digits) > 100
    for position in digits:
        path.write_text(f"{text[:position]}{(int(text[position]) + 1) % 10}{text[position + 1 :]}")
        with pytest.raises(RunError, match=r"manifest\.json"):
            Manifest.read(preprocessed)
    path.write_text(text)
    verify(preprocessed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checksums": []}, "its content does not have its checksum"),
        ({"rows": [8, 7, 7], "checksums": [1, 2, 3]}, "it does not have 7 days and 26 columns"),
        ({"counts": [3]}, "it does not have 7 days and 26 columns"),
        ({"settings": {}}, "it does not have None days"),
        ({"settings": [1]}, "'settings' is wrong"),
        ({"settings": {"--data-set": []}}, "'settings' is wrong"),
        ({"rows": [8.5] * 7}, "'rows' is wrong"),
        ({"rows": [-8] * 7}, "'rows' is wrong"),
        ({"counts": [True] * 26}, "'counts' is wrong"),
        ({"inputs": [7]}, "'inputs' is wrong"),
        ({"bad_lines": "0"}, "'bad_lines' is wrong"),
        ({"fromat": 1}, "'fromat' is wrong"),
    ],
)
def test_a_manifest_of_another_form_is_refused(preprocessed, change, message):
    """Manifests of older versions have no checksum, so their form is checked as well."""
    path = preprocessed / "manifest.json"
    stored = json.loads(path.read_text())
    del stored["checksum"]
    path.write_text(json.dumps(stored))
    verify(preprocessed)
    path.write_text(json.dumps(stored | change))
    with pytest.raises(RunError, match=message):
        verify(preprocessed)


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{", b"[" * 10**5, b"\xff", b'{"settings": NaN}'])
def test_a_file_that_is_no_manifest_is_refused(preprocessed, content):
    (preprocessed / "manifest.json").write_bytes(content)
    with pytest.raises(RunError, match=r"manifest\.json is no manifest of preprocessed data: "):
        Manifest.read(preprocessed)


def test_a_day_file_with_another_header_is_refused(preprocessed):
    content = (preprocessed / "day_3.npy").read_bytes()
    for wrong in (content.replace(b"(7, 40)", b"(8, 40)"), content.replace(b"<i4", b"<f4"), b"\0" * len(content)):
        assert len(wrong) == len(content)
        (preprocessed / "day_3.npy").write_bytes(wrong)
        for read in (verify, lambda folder: open_stored_data_set(Options(processed_data_file=str(folder)))):
            with pytest.raises(RunError, match=r"day_3\.npy is damaged: its header is not that of 7 rows"):
                read(preprocessed)


def test_the_command_line_preprocesses(tmp_path, capsys):
    (tmp_path / "train.txt").write_bytes(random_text(50))
    assert criteo_preprocess.main([f"--raw-data-file={tmp_path / 'train.txt'}", "--preprocess-memory=512M"]) == 0
    assert "50 rows in" in capsys.readouterr().err
    assert json.loads((tmp_path / "train_processed" / "manifest.json").read_text())["rows"] == [8, 7, 7, 7, 7, 7, 7]
    assert Manifest.read(tmp_path / "train_processed").complete
