"""Random batches from a slow Python loop over samples, which asks numpy's legacy generator for each bag.

The loop is a peer in the data generation benchmark, and the tests of data generation expect its results: it states
sample by sample what `dlrm.data.random_data.RandomData` computes in blocks.
"""

from __future__ import annotations

import numpy as np

from dlrm.options import Options


def batches(options: Options):
    """Yields (dense, indices, bag lengths, target) for each full batch of an epoch.

    `dense` is fp32 (B, features) and `target` fp32 (B, 1). `indices` holds one int64 array per table, with its bags one
    after the other; `bag lengths` holds one list of B numbers per table.
    """
    generator = np.random.RandomState(options.numpy_rand_seed)
    for _ in range(options.batches_per_epoch):
        dense = generator.rand(options.mini_batch_size, options.arch_mlp_bot[0]).astype(np.float32)
        tables = [[bag(generator, rows, size, options) for _ in range(options.mini_batch_size)]
                  for rows, size in zip(options.arch_embedding_size, options.lookups_per_bag, strict=True)]  # fmt: skip
        target = generator.rand(options.mini_batch_size, 1).astype(np.float32)
        yield (
            dense,
            [np.concatenate(bags) for bags in tables],
            [[len(bag) for bag in bags] for bags in tables],
            np.round(target) if options.round_targets else target,
        )


def bag(generator: np.random.RandomState, rows: int, size: int, options: Options) -> np.ndarray:
    """Draws the rows of one bag of `size` lookups, or at most so many: ascending, without duplicates."""
    if not options.num_indices_per_lookup_fixed:
        size = int(np.round(max(1.0, generator.random_sample() * min(rows, size))))
    if options.rand_data_dist == "uniform":
        return np.unique(np.round(generator.random_sample(size) * (rows - 1)).astype(np.int64))
    low, high, mean = options.rand_data_min, options.rand_data_max, options.rand_data_mu
    normals = generator.normal((low + high) / 2 if mean == -1 else mean, options.rand_data_sigma, size)
    return np.unique(np.clip(normals, low, high)).astype(np.int64)
