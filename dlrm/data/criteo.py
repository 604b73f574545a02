"""Batches of the Criteo data sets, with one lookup per bag, or with `--multi-hot-sizes`. `criteo_files.py` finds the
files and reads them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dlrm.batch import Batch, Share
from dlrm.data.bag_files import size_of_bag_files
from dlrm.data.criteo_files import StoredDataSet, computed_ahead, open_stored_data_set, training_order
from dlrm.data.criteo_manifest import MANIFEST_NAME
from dlrm.data.criteo_preprocess import preprocessed_folder
from dlrm.data.criteo_rows import NUM_DENSE, NUM_SPARSE
from dlrm.data.multi_hot import MultiHot
from dlrm.data.sample_order import StoredOrder, pass_draws_of_reference_script
from dlrm.errors import UsageError
from dlrm.options import Options, flag


class CriteoDataSet:
    """A `DataSet` whose files are opened, and compared with what they were made from, once for all its batches."""

    def __init__(self, options: Options):
        """Preprocesses the data set first if need be. Raises UsageError if it is too small to train or to test with."""
        if options.arch_mlp_bot[0] != NUM_DENSE:
            raise UsageError(
                f"--arch-mlp-bot starts with {options.arch_mlp_bot[0]}, but must start with {NUM_DENSE}, the dense "
                f"features of --data-set={options.data_set}"
            )
        if len(options.multi_hot_sizes) not in (1, NUM_SPARSE):
            given = len(options.multi_hot_sizes)
            raise UsageError(f"--multi-hot-sizes has {given} numbers; give one for all tables, or {NUM_SPARSE}")
        self._stored = open_stored_data_set(options)
        training_samples = len(self._stored.splits["train"])
        lookups_per_bag = self._lookups_per_bag(options)
        self.options = dataclasses.replace(
            options,
            arch_embedding_size=capped_table_rows(self._stored.category_counts, options),
            data_size=training_samples,
            num_indices_per_lookup=lookups_per_bag,
            num_indices_per_lookup_fixed=max(lookups_per_bag) > 1 or options.num_indices_per_lookup_fixed,
        )
        stored, whole = self._stored.splits["train"].lookups_per_bag, self.options.lookups_per_bag
        expanded_to = [size if own == 1 else 1 for own, size in zip(stored, whole, strict=True)]
        distribution = options.multi_hot_distribution_type
        self._multi_hot = MultiHot(self.options.arch_embedding_size, expanded_to, distribution)
        split = f"the data set's training split of {training_samples:,} samples"
        self.options.check_fills_a_step(split, "give a smaller --mini-batch-size")
        self._check_test_samples()

    def _lookups_per_bag(self, options: Options) -> tuple[int, ...]:
        """Returns the lookups per bag of each table, or one number for all: those that are stored, or that a category
        is expanded to. Raises UsageError if bags are stored that are not those of `--multi-hot-sizes`."""
        stored = tuple(self._stored.splits["train"].lookups_per_bag)
        if max(stored) == 1:
            return options.multi_hot_sizes
        if options.multi_hot_sizes not in ((1,), stored):
            raise UsageError(
                f"--multi-hot-sizes: the files in {options.processed_data_file} have bags of "
                f"{'-'.join(map(str, stored))}; give that, or leave the flag out"
            )
        return stored

    def _check_test_samples(self) -> None:
        asks = "--inference-only" if self.options.inference_only else f"--test-freq={self.options.test_freq}"
        if (self.options.inference_only or self.options.test_freq > 0) and not len(self._stored.splits["test"]):
            raise UsageError(f"{asks} needs test samples, but the data set has none: its last day is empty")

    def training_data(self) -> CriteoData:
        """Returns the training samples."""
        return CriteoData(self.options, self._stored, self._multi_hot)

    def test_data(self) -> CriteoData:
        """Returns the test samples."""
        return CriteoData(self.options, self._stored, self._multi_hot, test=True)

    def weight_generator(self) -> np.random.RandomState:
        """Returns the generator of the weights, which the reference script has used for the order of samples before."""
        generator = np.random.RandomState(self.options.numpy_rand_seed)
        if not self._stored.shuffled:
            pass_draws_of_reference_script(generator, self.options, self._stored.splits["train"].day_sizes)
        return generator

    def fingerprint(self) -> dict[str, str]:
        """Returns the sizes of the files that the flags name, and a checksum of the preprocessed data."""
        fingerprint = {}
        for name in ("raw_data_file", "processed_data_file"):
            path = Path(getattr(self.options, name))
            if path.is_file():
                fingerprint[f"the size of {flag(name)}"] = str(path.stat().st_size)
        processed = self.options.processed_data_file
        if processed and (size := size_of_bag_files(Path(processed))):
            fingerprint["the size of the files in --processed-data-file"] = str(size)
        manifest = preprocessed_folder(self.options) / MANIFEST_NAME  # has the checksums of all days
        if manifest.is_file():
            fingerprint["the preprocessed data"] = hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
        return fingerprint


class CriteoData:
    """The training or test samples of a Criteo data set, as `Data` has them.

    Only full batches are trained on, while the last batch of the test set may be smaller. All epochs have the same
    batches, as in the reference script.
    """

    is_stored_by_sample = True  # a row holds the lookups of a sample in all tables
    num_dense_features = NUM_DENSE

    def __init__(self, options: Options, stored: StoredDataSet, multi_hot: MultiHot, test: bool = False):
        self._multi_hot, self.max_lookups_per_bag = multi_hot, options.lookups_per_bag
        self.options, self._rows = options, stored.splits["test" if test else "train"]
        self.stored_lookups_per_bag = self._rows.lookups_per_bag
        self._order = StoredOrder() if test else training_order(options, stored)
        self.table_rows: Sequence[int] = capped_table_rows(stored.category_counts, options)
        self.batch_size = options.test_batch_size if test else options.mini_batch_size
        tests_have_workers = test and options.test_num_workers >= 0
        self._workers = options.test_num_workers if tests_have_workers else options.num_workers
        self.samples = len(self._rows) if test else options.batches_per_epoch * options.mini_batch_size
        self._batch_order = None
        if options.mlperf_bin_loader and options.mlperf_bin_shuffle and not test:
            self._batch_order = np.random.RandomState(options.numpy_rand_seed).permutation(len(self))

    def __len__(self) -> int:
        """Returns the number of batches per epoch."""
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of an epoch."""
        return self.batches()

    def batches(self, first: int = 0, width: int = 1, share: Share | None = None) -> Iterator[Batch]:
        """Yields the batches of an epoch, see `Data.batches`. Rows of samples outside the share are not read."""
        whole = Share.whole(width * self.batch_size, len(self.table_rows))
        complete = self.whole_bags([] if share else whole.tables)

        def read(number: int) -> Batch:
            return complete(self._read_joined_batch(number, width, share or whole))

        return computed_ahead(read, range(first, len(self), width), self._workers)

    def whole_bags(self, tables: Sequence[int]) -> Callable[[Batch], Batch]:
        """Returns what expands the categories of a share, see `Data.whole_bags`."""
        return self._multi_hot.for_tables(tables)

    def _read_joined_batch(self, first: int, width: int, share: Share) -> Batch:
        """Reads the share of the batches from `first` on that are joined into one."""
        positions = [self._positions_of_batch(batch) for batch in range(first, min(first + width, len(self)))]
        rows = torch.from_numpy(self._rows.read(np.concatenate(positions)[share.samples]))
        bags = rows[:, 1 + NUM_DENSE :].split(list(self.stored_lookups_per_bag), dim=1)
        sizes = torch.tensor([self.stored_lookups_per_bag[table] for table in share.tables], dtype=torch.int64)
        return Batch(
            dense=self._dense_features(rows[:, 1 : 1 + NUM_DENSE]),
            indices=[self._capped(bags[table].flatten()) for table in share.tables],
            offsets=sizes[:, None] * torch.arange(len(rows) + 1),
            target=rows[:, :1].to(torch.float32),
        )

    def _dense_features(self, stored: torch.Tensor) -> torch.Tensor:
        """Returns the logarithms of stored numbers; the bits of float32 are logarithms already."""
        if self._rows.dense_type == np.float32:
            return stored.contiguous().view(torch.float32)
        return torch.log(stored.to(torch.float32) + 1)

    def _capped(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns category ids modulo `--max-ind-range`, in the memory of `ids`."""
        return ids.remainder_(self.options.max_ind_range) if self.options.max_ind_range > 0 else ids

    def _positions_of_batch(self, batch: int) -> np.ndarray:
        """Returns the positions of a batch's samples among the rows of the split."""
        if self._batch_order is not None:
            batch = self._batch_order[batch]
        begin, end = batch * self.batch_size, min((batch + 1) * self.batch_size, self.samples)
        return self._order.samples_at(begin, end)


def capped_table_rows(category_counts: Sequence[int], options: Options) -> tuple[int, ...]:
    """Returns the rows of each table: one per category, but at most `--max-ind-range`."""
    limit = options.max_ind_range if options.max_ind_range > 0 else max(category_counts)
    return tuple(min(count, limit) for count in category_counts)
