"""Generation of random batches: ours draws blocks of numbers, its peer is a Python loop over samples."""

from __future__ import annotations

from benchmarks import random_data_loop
from benchmarks.measure import Result, against, median_ms
from dlrm.data.random_data import RandomData
from dlrm.options import Options

SHAPES = {
    "26 tables, batch 2048, 1 lookup": Options(
        arch_embedding_size=(100_000,) * 26, mini_batch_size=2048, num_batches=1, num_indices_per_lookup=(1,)
    ),
    "1 table, batch 512, up to 38 lookups": Options(
        arch_embedding_size=(3_000_000,), mini_batch_size=512, num_batches=1, num_indices_per_lookup=(38,)
    ),
    "26 tables, batch 2048, up to 10 lookups": Options(
        arch_embedding_size=(100_000,) * 26, mini_batch_size=2048, num_batches=1, num_indices_per_lookup=(10,)
    ),
    "the same, gaussian": Options(
        arch_embedding_size=(100_000,) * 26, mini_batch_size=2048, num_batches=1, num_indices_per_lookup=(10,),
        rand_data_dist="gaussian", rand_data_max=99_999, rand_data_sigma=20_000,
    ),
}  # fmt: skip


def measure(rounds: int) -> list[Result]:
    results = []
    for shape, options in SHAPES.items():
        candidates = {
            "ours": lambda options=options: list(RandomData(options)),
            "Python loop": lambda options=options: list(random_data_loop.batches(options)),
        }
        results += against(f"a batch of random data: {shape}", "ours", median_ms(candidates, rounds))
    return results
