"""Does this machine train right? Checks installation, device and kernels, and prints a table of what passed.

python demo_dlrm.py --self-test                             on the device that --device=auto finds
python demo_dlrm.py --self-test --device=hpu --mode=lazy    on a Gaudi, in lazy mode
"""

from __future__ import annotations

import dataclasses
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from dlrm.distributed.launch import prepare_program
from dlrm.options import OptionParser, Options

if __name__ == "__main__":
    prepare_program(sys.argv[1:])  # before torch: a Gaudi plugin that loads with it reads the environment

import torch
from torch import nn
from tqdm import tqdm

from dlrm.batch import Batch
from dlrm.data.data_set import open_data_set
from dlrm.data.random_data import RandomData
from dlrm.devices.backend import Backend
from dlrm.output.report import package_versions
from dlrm.pipeline import BatchPipeline
from dlrm.system.endings import end_by
from dlrm_s_pytorch import Trainer, select_backend

TABLE_ROWS, DIM = (1000, 7, 1), 16


class CheckError(Exception):
    """A check that failed. The message says what was found and what was expected."""


def expect_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """Returns the largest difference between two tensors, as a text. Raises CheckError if it exceeds `tolerance`."""
    difference = (found.detach().cpu().double() - expected.detach().double()).abs().max().item()
    if not difference <= tolerance:  # true for NaN, too
        raise CheckError(f"differs by {difference:.1e}, more than {tolerance:.0e}")
    return f"differs by {difference:.1e} at most"


# ---------------------------------------------------------------------------------------------------------------------
# The checks: each returns what it found, as a text, or raises an error
# ---------------------------------------------------------------------------------------------------------------------


def installation(options: Options, backend: Backend) -> str:
    return ", ".join(f"{name} {version}" for name, version in package_versions().items())


def device(options: Options, backend: Backend) -> str:
    return f"{backend.name}, {backend.memory_limit() / 2**30:.1f} GiB free"


def copies(options: Options, backend: Backend) -> str:
    sent = torch.arange(1 << 20, dtype=torch.float32)
    if not torch.equal(sent.to(backend.device).cpu(), sent):
        raise CheckError("a tensor came back changed")
    return "4 MiB to the device and back"


def matrix_product(options: Options, backend: Backend) -> str:
    a, b = torch.randn(2, 256, 256)
    return expect_close(a.to(backend.device) @ b.to(backend.device), a.double() @ b.double(), 1e-3)


def matrix_product_in_bf16(options: Options, backend: Backend) -> str:
    a, b = torch.randn(2, 256, 256)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        product = a.to(backend.device) @ b.to(backend.device)
    if product.dtype != torch.bfloat16:
        raise CheckError(f"autocast gave {product.dtype}")
    return expect_close(product, a.double() @ b.double(), 1.0)


def dot_interaction(options: Options, backend: Backend) -> str:
    module = backend.interactions["dot"](4, DIM, itself=True).to(backend.device)
    dense, pooled = torch.randn(32, DIM), torch.randn(32, 3, DIM)
    features = torch.cat([dense[:, None], pooled], dim=1).double()
    row, column = torch.tril_indices(4, 4)
    expected = torch.cat([dense.double(), (features @ features.mT)[:, row, column]], dim=1)
    return expect_close(module(dense.to(backend.device), pooled.to(backend.device)), expected, 1e-3)


def tables(optimizer: str, oracle: type[torch.optim.Optimizer]) -> Callable[[Options, Backend], str]:
    """Returns a check of three updates of the tables against `torch.nn.EmbeddingBag` and `torch.optim` on the CPU."""

    def check(options: Options, _: Backend) -> str:
        backend = select_backend(
            dataclasses.replace(options, optimizer=optimizer, hpu_kernels=kernels(options, optimizer))
        )
        weights = [torch.randn(rows, DIM) for rows in TABLE_ROWS]
        ours = backend.embedding_bags(weight.clone() for weight in weights).to(backend.device)
        our_optimizer = backend.sparse_optimizer(ours, small_options(optimizer=optimizer))
        theirs = [nn.EmbeddingBag.from_pretrained(weight, False, mode="sum", include_last_offset=True)
                  for weight in weights]  # fmt: skip
        their_optimizer = oracle([bag.weight for bag in theirs], lr=0.01)
        data = RandomData(small_options(num_batches=3))
        for batch, prepared in zip(data, BatchPipeline(data, backend).run(data), strict=True):
            pooled = ours.pool(ours(prepared.lookups), prepared.lookups)
            pooled.sin().sum().backward()
            our_optimizer.step(prepared.lookups)
            backend.mark_step()
            expected = pool(theirs, batch)
            their_optimizer.zero_grad()
            expected.sin().sum().backward()
            their_optimizer.step()
        backend.synchronize()
        expect_close(pooled, expected, 1e-4)
        return expect_close(torch.cat(ours.weights), torch.cat([bag.weight for bag in theirs]), 1e-4)

    return check


def pool(embedding_bags: Sequence[nn.EmbeddingBag], batch: Batch) -> torch.Tensor:
    """Returns the sum over each bag, (B, T, D)."""
    lookups = zip(embedding_bags, batch.indices, batch.offsets, strict=True)
    return torch.stack([bag(indices, offsets) for bag, indices, offsets in lookups], dim=1)


def training(data_type: str, optimizer: str, tolerance: float) -> Callable[[Options, Backend], str]:
    """Returns a check of the losses of 30 iterations against those of fp32 on the CPU."""

    def check(options: Options, backend: Backend) -> str:
        on_device = {"device": backend.device.type, "mode": options.mode, "data_type": data_type}
        on_device |= {"hpu_graphs": options.hpu_graphs, "hpu_kernels": kernels(options, optimizer)}
        expected = losses(small_options(device="cpu", optimizer=optimizer))
        return expect_close(losses(small_options(optimizer=optimizer, **on_device)), expected, tolerance)

    return check


def kernels(options: Options, optimizer: str) -> str:
    """Returns the `--hpu-kernels` of a check with that optimizer: what the user asked for, where the plugin has it."""
    return "native" if options.hpu_kernels == "native" or optimizer != "adagrad" else options.hpu_kernels


def losses(options: Options) -> torch.Tensor:
    """Trains an epoch and returns the loss of each iteration, (iterations,), on the host."""
    trainer = Trainer(open_data_set(options), select_backend(options))
    steps = (trainer.train_step(batch)[0] for batch in trainer.pipeline.run(iter(trainer.data)))
    return torch.stack([loss.clone() for loss in steps]).cpu()


def small_options(num_batches: int = 30, **settings) -> Options:
    """Returns the options of a small model on random data."""
    return Options(
        arch_embedding_size=TABLE_ROWS, arch_sparse_feature_size=DIM, arch_mlp_bot=(8, 32, DIM), arch_mlp_top=(32, 1),
        mini_batch_size=64, num_batches=num_batches, learning_rate=0.01, **settings,
    )  # fmt: skip


def no_operator_on_the_host(options: Options, backend: Backend) -> str:
    """Checks the device's own count of operators that ran on the host during all checks before this one."""
    stats = backend.operators_run_on_host()
    if stats.get("TotalNumber"):
        raise CheckError(f"ran on the host: {stats}")
    return "none"


CHECKS = {
    "installation": installation,
    "device": device,
    "copies": copies,
    "matrix product": matrix_product,
    "matrix product, bf16": matrix_product_in_bf16,
    "dot interaction": dot_interaction,
    "tables, sgd": tables("sgd", torch.optim.SGD),
    "tables, adagrad": tables("adagrad", torch.optim.Adagrad),
    "training, sgd, fp32": training("fp32", "sgd", 1e-4),
    "training, adagrad, fp32": training("fp32", "adagrad", 1e-4),
    "training, sgd, bf16": training("bf16", "sgd", 0.05),
    "training, adagrad, bf16": training("bf16", "adagrad", 0.05),
}
COUNT_CHECKS = {"operators on the host": no_operator_on_the_host}


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def run_checks(options: Options, backend: Backend) -> Iterator[tuple[str, bool, str]]:
    """Runs each check and yields its name, whether it passed, and what it found. Any error counts as a failed check."""
    checks = CHECKS | ({} if backend.operators_run_on_host() is None else COUNT_CHECKS)
    for name, check in tqdm(checks.items(), leave=False, disable=None):
        torch.manual_seed(0)
        try:
            yield name, True, check(options, backend)
        except Exception as error:
            yield name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the self-test. Returns 0 if all checks passed, 1 if some failed, and 2 for flags that cannot work."""
    parser = OptionParser(prog="demo_dlrm.py --self-test", description=__doc__.splitlines()[0])
    try:
        return run(Options(**parser.parse_given(sys.argv[1:] if argv is None else argv)))
    except Exception as error:
        return end_by(parser.prog, error)


def run(options: Options) -> int:
    """Runs and prints the checks. Returns the exit status, which is 1 if a check has failed."""
    backend = select_backend(options)
    print(f"Self-test of {backend.device.type} in {options.mode} mode, Python {platform.python_version()}")
    results = list(run_checks(options, backend))
    for name, passed, found in results:
        print(f"{'ok    ' if passed else 'FAILED'}  {name:24}  {found}")
    failed = sum(not passed for _, passed, _ in results)
    print(f"{len(results) - failed} of {len(results)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
