"""Criteo preprocessing the slow way, as the public script does it: a line at a time in Python.

The baseline of the preprocessing benchmark, and the oracle of its tests.
"""

from __future__ import annotations

import numpy as np


def read(files: list[bytes], max_ind_range: int = -1) -> tuple[list[np.ndarray], list[int]]:
    """The rows of each file as (n, 40) integers, and the number of categories of each column."""
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
    """Kaggle's file in days; the first ones take what is left over."""
    return np.array_split(rows, days)
