"""Manifests, which say what files of rows were made from, and checks that the files belong to the text and flags."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dlrm.data.criteo_rows import NPY_HEADER, ROW_BYTES, day_path
from dlrm.errors import RunError
from dlrm.system.files import renamed_when_done

MANIFEST_NAME = "manifest.json"
FORMAT = 1  # of a preprocessed folder; to be raised when the content of its files changes


class Manifest(NamedTuple):
    """The content of `manifest.json` in a preprocessed folder. MLPerf's binary files have a similar file beside them,
    of which only `settings` are given."""

    settings: dict[str, object]  # the value of each flag that the rows depend on
    inputs: Sequence[dict] = ()  # one text fingerprint per file
    rows: Sequence[int] = ()  # in each day; empty until the folder is complete
    counts: Sequence[int] = ()  # categories of each column
    checksums: Sequence[int] = ()  # CRC-32 of each day's rows
    bad_lines: int = 0  # malformed lines that were left out
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path, name: str = MANIFEST_NAME) -> Manifest | None:
        """Returns the manifest in a folder, or None if there is none. Raises RunError if the file holds something
        else."""
        path = folder / name
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise RunError(f"{path}: not a manifest of preprocessed data: {error}") from None

    def write(self, folder: Path, name: str = MANIFEST_NAME) -> None:
        """Writes the manifest to a file in a folder."""
        with renamed_when_done(folder / name) as file:
            file.write((json.dumps(self._asdict(), indent=2) + "\n").encode())

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


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises RunError if a day file of a complete folder is missing or has another size than the manifest says."""
    for day, rows in enumerate(manifest.rows):
        path = day_path(folder, day)
        if not path.is_file():
            raise RunError(f"{path} is missing; delete {folder} to preprocess again")
        if path.stat().st_size != NPY_HEADER + ROW_BYTES * rows:
            raise RunError(f"{path} is not as long as {rows:,} rows; delete {folder} to preprocess again")


def verify(folder: Path) -> None:
    """Raises RunError, which names the day file, if the checksum of one is not that of the manifest."""
    manifest = Manifest.read(folder)
    if manifest is None or not manifest.complete:
        raise RunError(f"{folder}: there is no complete preprocessed data set in it")
    check_sizes(folder, manifest)
    for day, expected in enumerate(manifest.checksums):
        path = day_path(folder, day)
        checksum = 0
        with path.open("rb") as file:
            file.seek(NPY_HEADER)
            while content := file.read(2**24):
                checksum = zlib.crc32(content, checksum)
        if checksum != expected:
            raise RunError(f"{path} is damaged: its checksum is {checksum:08x}, not {expected:08x}")
