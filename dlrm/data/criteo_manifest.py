"""Manifests, which say what files of rows were made from, and checks that the files belong to the text and flags."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dlrm.data.criteo_rows import DAYS, NPY_HEADER, NUM_SPARSE, ROW_BYTES, SPLITS, binary_path, check_header, day_path
from dlrm.errors import RunError
from dlrm.system.files import read_json, renamed_when_done

MANIFEST_NAME = "manifest.json"
FORMAT = 1  # of a preprocessed folder; to be raised when the content of its files changes


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def is_list_of(is_valid: Callable[[object], bool], values: object) -> bool:
    return isinstance(values, list) and all(map(is_valid, values))


def is_fingerprint(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"file", "bytes", "samples"}


def are_settings(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str | int | float) for each in value.values())


VALID = {  # what each field of a stored manifest must be
    "settings": are_settings,
    "inputs": partial(is_list_of, is_fingerprint),
    "rows": partial(is_list_of, is_count),
    "counts": partial(is_list_of, is_count),
    "checksums": partial(is_list_of, is_count),
    "bad_lines": is_count,
    "format": is_count,
}


class Manifest(NamedTuple):
    """The content of `manifest.json` in a preprocessed folder, beside its own checksum.

    MLPerf's binary files have a similar file beside them. It has a file per split in place of days, and neither inputs
    nor counts.
    """

    settings: dict[str, object]  # the value of each flag that the rows depend on
    inputs: Sequence[dict] = ()  # one text fingerprint per file
    rows: Sequence[int] = ()  # in each day; empty until all files are there
    counts: Sequence[int] = ()  # categories of each column
    checksums: Sequence[int] = ()  # CRC-32 of each day's rows
    bad_lines: int = 0  # malformed lines that were left out
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path, name: str = MANIFEST_NAME) -> Manifest | None:
        """Returns the manifest in a folder, or None if there is none. Raises RunError if the file holds something
        else, or has another checksum than its own. Manifests of older versions have none."""
        path = folder / name
        if not path.is_file():
            return None
        stored = read_json(path, "manifest of preprocessed data")
        checksum = stored.pop("checksum", None)
        for field, value in stored.items():
            if field not in VALID or not VALID[field](value):
                raise RunError(f"{path} is no manifest of preprocessed data: {field!r} is wrong")
        if "settings" not in stored:
            raise RunError(f"{path} is no manifest of preprocessed data: 'settings' is missing")
        manifest = cls(**stored)
        if checksum not in (None, manifest.checksum) or len(manifest.rows) != len(manifest.checksums):
            raise RunError(f"{path} is damaged: its content does not have its checksum")
        return manifest

    def write(self, folder: Path, name: str = MANIFEST_NAME) -> None:
        """Writes the manifest to a file in a folder."""
        with renamed_when_done(folder / name) as file:
            file.write((json.dumps(self._asdict() | {"checksum": self.checksum}, indent=2) + "\n").encode())

    @property
    def checksum(self) -> str:
        """CRC-32 of all fields."""
        return f"{zlib.crc32(json.dumps(self._asdict(), sort_keys=True).encode()):08x}"

    @property
    def complete(self) -> bool:
        """Whether all days are there."""
        return bool(self.rows)

    def check_matches(self, wanted: Manifest, path: Path) -> None:
        """Raises RunError, which says what differs, if this manifest has other settings or other inputs than the wanted
        one. `path` names the files that this manifest describes."""
        # Where only one of the two has a setting, it is because of another setting, which differs as well.
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


def text_fingerprint(path: Path) -> dict[str, object]:
    """Returns the name and the size of a file, and a checksum of 64 samples of it. The file may have terabytes."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for k in range(64):
            file.seek(size * k // 64)
            digest.update(file.read(2**16))
    return {"file": path.name, "bytes": size, "samples": digest.hexdigest()}


def check_complete(folder: Path, manifest: Manifest) -> None:
    """Raises RunError if the manifest of a complete folder does not have all days of its data set, or if a day file is
    missing or has another size than the manifest says."""
    days = DAYS.get(manifest.settings.get("--data-set"))
    if len(manifest.rows) != days or len(manifest.counts) != NUM_SPARSE:
        raise RunError(f"{folder / MANIFEST_NAME} is damaged: it does not have {days} days and {NUM_SPARSE} columns")
    for day, rows in enumerate(manifest.rows):
        check_size(day_path(folder, day), rows, NPY_HEADER, f"delete {folder} to preprocess again")


def check_size(path: Path, rows: int, header_bytes: int, advice: str) -> None:
    """Raises RunError if a file of rows is missing or does not have this number of rows."""
    if not path.is_file():
        raise RunError(f"{path} is missing; {advice}")
    if path.stat().st_size != header_bytes + ROW_BYTES * rows:
        raise RunError(f"{path} is not as long as {rows:,} rows; {advice}")


def binary_manifest_name(stem: Path) -> str:
    """Returns the name of the manifest beside the binary files. MLPerf's own files have none."""
    return f"{stem.name}_bin.json"


def check_binary_sizes(stem: Path, manifest: Manifest) -> None:
    """Raises RunError if a binary file is missing or has another size than the manifest says.

    Manifests of older versions say nothing.
    """
    if len(manifest.rows) not in (0, len(SPLITS)):
        raise RunError(f"{stem.with_name(binary_manifest_name(stem))} is damaged: it does not have {len(SPLITS)} files")
    for split, rows in zip(SPLITS, manifest.rows, strict=False):
        check_size(binary_path(stem, split), rows, 0, f"delete {binary_path(stem, '*')} to write them again")


def verify(stem: Path) -> None:
    """Compares the preprocessed data in a folder, and the binary files beside it, with their checksums.

    Raises RunError, which names the file, if one is damaged or missing, or if nothing is complete.
    """
    of_days, of_binaries = Manifest.read(stem), Manifest.read(stem.parent, binary_manifest_name(stem))
    if not of_binaries and not (of_days and of_days.complete):
        raise RunError(f"{stem}: there is no complete preprocessed data set in it")
    if of_days:
        verify_days(stem, of_days)
    if of_binaries:
        verify_binaries(stem, of_binaries)


def verify_binaries(stem: Path, manifest: Manifest) -> None:
    """Raises RunError, which names the file, if a binary file is damaged or missing."""
    if not manifest.complete:
        raise RunError(f"{binary_path(stem, '*')}: not complete, or of a version that wrote no checksums; delete them")
    check_binary_sizes(stem, manifest)
    for split, expected in zip(SPLITS, manifest.checksums, strict=True):
        check_checksum(binary_path(stem, split), 0, expected)


def verify_days(folder: Path, manifest: Manifest) -> None:
    """Raises RunError, which names the file, if a day file is damaged or missing."""
    check_complete(folder, manifest)
    for day, (rows, expected) in enumerate(zip(manifest.rows, manifest.checksums, strict=True)):
        path = day_path(folder, day)
        with path.open("rb") as file:
            check_header(file, path, rows)
        check_checksum(path, NPY_HEADER, expected)


def check_checksum(path: Path, header_bytes: int, expected: int) -> None:
    """Raises RunError if the CRC-32 of the rows in a file is another than expected. Reads the whole file."""
    checksum = 0
    with path.open("rb") as file:
        file.seek(header_bytes)
        while content := file.read(2**24):
            checksum = zlib.crc32(content, checksum)
    if checksum != expected:
        raise RunError(f"{path} is damaged: its checksum is {checksum:08x}, not {expected:08x}")
