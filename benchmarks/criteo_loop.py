"""Criteo preprocessing in a slow Python loop over lines, as the reference script does it.

The loop is a peer in the preprocessing benchmark, and the tests of preprocessing expect its results.
"""

from __future__ import annotations

import numpy as np


def read(files: list[bytes], max_ind_range: int = -1) -> tuple[list[np.ndarray], list[int]]:
    """Returns the rows of each file as an int64 array (n, 40), and the number of categories of each of the 26 columns.

    Each file is given as the bytes of its lines. Categories are taken modulo `max_ind_range` if that is positive.
    """
    dictionaries = [{} for _ in range(26)]
    days = []
    for text in files:
        rows = []
        for line in text.replace(b"\r\n", b"\n").splitlines():
            label, *fields = (field or b"0" for field in line.split(b"\t"))
            row = [int(label), *(max(int(field), 0) for field in fields[:13])]
            for dictionary, field in zip(dictionaries, fields[13:], strict=True):
                code = int(field, 16)
                code = code % max_ind_range if max_ind_range > 0 else code
                row.append(dictionary.setdefault(code, len(dictionary)))
            rows.append(row)
        days.append(np.array(rows, dtype=np.int64).reshape(-1, 40))
    return days, [len(dictionary) for dictionary in dictionaries]


def cut(rows: np.ndarray, days: int = 7) -> list[np.ndarray]:
    """Returns the rows of Kaggle's file by day. If days cannot be equally long, the first ones have one row more."""
    return np.array_split(rows, days)
