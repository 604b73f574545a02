"""Files of Criteo samples with whole bags: those of MLPerf's DLRM-dcnv2, and HugeCTR's raw files of the same data.

MLPerf's program (mlcommons/training, recommendation_v2/torchrec_dlrm) writes these for day i:

    day_i_labels.npy                int32, (rows, 1)
    day_i_dense.npy                 float32, (rows, 13), whose logarithms are taken already
    day_i_sparse.npy                int32 or int64, (rows, 26), one lookup per table
    day_i_sparse_multi_hot.npz      members 0 to 25, each int32, (rows, lookups per bag), not compressed

HugeCTR's train_data.bin and val_data.bin are rows and nothing else: the label, int32, the dense features, float32, and
the lookups of all tables, int32.

A row here is what HugeCTR's is, with the bits of the dense features in int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlrm.data.arrays import expect_random_reads, map_array, map_member
from dlrm.data.criteo_rows import NUM_DENSE, NUM_SPARSE, RowFile, StoredRows
from dlrm.errors import RunError, UsageError

HEAD = 1 + NUM_DENSE  # numbers in a row before the lookups


def path_of(folder: Path, day: int, part: str) -> Path:
    """Returns a file of MLPerf's for a day, such as that of the part "dense.npy"."""
    return folder / f"day_{day}_{part}"


def size_of_bag_files(folder: Path) -> int:
    """Returns the bytes of all files in the folder that have the names of either format."""
    names = ("day_*_dense.npy", "day_*_labels.npy", "day_*_sparse.npy", "day_*_sparse_multi_hot.npz", "*_data.bin")
    return sum(path.stat().st_size for name in names for path in folder.glob(name))


class MlperfDay(StoredRows):
    """A day in MLPerf's files, of which only what a batch needs is read."""

    dense_type = np.float32

    def __init__(self, folder: Path, day: int, multi_hot: bool):
        """`multi_hot`: whether the lookups are those of day_i_sparse_multi_hot.npz, or of day_i_sparse.npy. Raises
        RunError, which names the file and the member, if a file does not fit the others."""
        self.files = str(folder / f"day_{day}_*")
        self._dense = mapped(path_of(folder, day, "dense.npy"), np.float32, NUM_DENSE)
        self._labels = mapped(path_of(folder, day, "labels.npy"), np.int32, 1, len(self._dense))
        if multi_hot:
            path = path_of(folder, day, "sparse_multi_hot.npz")
            self._bags = [mapped(path, np.int32, None, len(self), str(table)) for table in range(NUM_SPARSE)]
        else:
            self._bags = [mapped(path_of(folder, day, "sparse.npy"), (np.int32, np.int64), NUM_SPARSE, len(self))]
        self.lookups_per_bag = [bags.shape[1] for bags in self._bags] if multi_hot else [1] * NUM_SPARSE
        self.width = HEAD + sum(self.lookups_per_bag)

    def __len__(self) -> int:
        return len(self._dense)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        lookups = [bags[positions].astype(np.int32, copy=False) for bags in self._bags]
        return np.concatenate([self._labels[positions], self._dense[positions].view(np.int32), *lookups], axis=1)

    def expect_random_reads(self) -> None:
        for array in (self._labels, self._dense, *self._bags):
            expect_random_reads(array)

    def place(self, position: int) -> str:
        return f"{self.files}, row {position + 1:,}"


def mapped(
    path: Path, types: type | Sequence[type], columns: int | None, rows: int | None = None, member: str = ""
) -> np.ndarray:
    """Maps a .npy file, or a member of a .npz file. Raises RunError, which names the file and the member, if it is not
    an array of one of these types with so many columns and rows."""
    place = f"{path}, member {member}" if member else str(path)
    try:
        array = map_member(path, member) if member else map_array(path)
    except FileNotFoundError:
        raise RunError(f"{path} is missing") from None
    except Exception as error:  # for damaged files, numpy and zipfile raise errors of several types
        raise RunError(f"{place}: not readable: {error}") from None
    return checked(array, place, types, columns, rows)


def checked(
    array: np.ndarray, place: str, types: type | Sequence[type], columns: int | None, rows: int | None
) -> np.ndarray:
    """Returns the array. Raises RunError, which names the place, if it is not of one of these types and of this shape;
    None stands for any number of columns, of at least one, or of rows."""
    types = types if isinstance(types, Sequence) else [types]
    shape = f"({rows if rows is not None else 'rows'}, {columns or 'lookups per bag'})"
    fits = array.ndim == 2 and rows in (None, len(array)) and columns in (None, array.shape[1]) and array.shape[1]
    if array.dtype not in types or not fits:
        expected = " or ".join(np.dtype(dtype).name for dtype in types)
        raise RunError(f"{place}: {array.dtype} {array.shape}; expected {expected} {shape}")
    return array


class HugectrRows(RowFile):
    """A file of HugeCTR's."""

    dense_type = np.float32

    def __init__(self, path: Path, lookups_per_bag: Sequence[int]):
        """Raises UsageError if the file is no whole number of rows with these bags."""
        self.lookups_per_bag, self.width = lookups_per_bag, HEAD + sum(lookups_per_bag)
        row, size = 4 * self.width, path.stat().st_size
        if size % row:
            raise UsageError(
                f"--multi-hot-sizes: {path} has {size:,} bytes, which are not a whole number of rows of {row:,} bytes; "
                "give the number of lookups of each table in the file"
            )
        super().__init__(path, size // row)
