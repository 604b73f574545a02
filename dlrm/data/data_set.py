"""Says what a source of batches offers, and how the flags choose one. A new source is one more class like these.

Three sources satisfy these protocols: random data and traces (`random_data.py`, `trace.py`), and the Criteo data sets
(`criteo.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from dlrm.batch import Batch, Share
from dlrm.data.criteo import CriteoDataSet
from dlrm.data.random_data import RandomDataSet
from dlrm.options import Options


class Data(Protocol):
    """The samples of one split of a data set, as batches. Every epoch gives the same batches in the same order."""

    samples: int  # per epoch
    batch_size: int  # samples per batch; the last batch of a test set may be smaller
    num_dense_features: int
    table_rows: Sequence[int]  # one entry per table
    max_lookups_per_bag: Sequence[int]  # one entry per table
    stored_lookups_per_bag: Sequence[int]  # one entry per table: without those that `whole_bags` adds
    is_stored_by_sample: bool  # whether reading the lookups of a sample means reading its row; see `batches`

    def __len__(self) -> int:
        """Returns the number of batches per epoch."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of an epoch."""
        ...

    def batches(self, first: int = 0, width: int = 1, share: Share | None = None) -> Iterator[Batch]:
        """Yields the batches of an epoch from batch `first` on, each `width` of them joined into one.

        With a `share`, a joined batch has the dense features and targets of the share's samples, and the lookups in
        the share's tables: those of all samples where they can be had without reading rows, and those of the share's
        own samples where `is_stored_by_sample`, as they are stored. Raises RunError if a stored row cannot be read.
        """
        ...

    def whole_bags(self, tables: Sequence[int]) -> Callable[[Batch], Batch]:
        """Returns a function that adds to stored lookups in these tables those that come with them.

        The lookups of a share are small until then, and may travel between ranks. Raises UsageError if memory has no
        room for what that needs.
        """
        ...


class DataSet(Protocol):
    """The training and test samples that the flags name."""

    options: Options  # those of the run, with the sizes that the data set decides

    def training_data(self) -> Data:
        """Returns the training samples."""
        ...

    def test_data(self) -> Data:
        """Returns the test samples."""
        ...

    def weight_generator(self) -> np.random.RandomState:
        """Returns the generator that the weights are drawn from, in the state that it has in the reference script."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Returns what must be the same on all ranks so that they train on the same data, by name."""
        ...


def open_data_set(options: Options) -> DataSet:
    """Returns the data set that `--data-generation` names. Preprocesses it first if need be."""
    return CriteoDataSet(options) if options.data_generation == "dataset" else RandomDataSet(options)
