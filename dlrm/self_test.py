"""Does this machine train right? Checks installation, device and kernels, and prints a table of what passed.

python demo_dlrm.py --self-test                                     on the device that --device=auto finds
python demo_dlrm.py --self-test --device=hpu --data_type=bf16       on a Gaudi, with the operators that bf16 runs take
python demo_dlrm.py --self-test --device=hpu --report=eager.json    and with a file to send in
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from dlrm.distributed.launch import prepare_program
from dlrm.options import OptionParser, Options

if __name__ == "__main__":
    prepare_program(sys.argv[1:])  # before torch: a Gaudi plugin that loads with it reads the environment

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dlrm.batch import Batch
from dlrm.data.data_set import open_data_set
from dlrm.data.random_data import RandomData
from dlrm.devices.backend import Backend
from dlrm.kernels.embedding import EmbeddingBags
from dlrm.output.report import package_versions
from dlrm.pipeline import BatchPipeline, PreparedBatch
from dlrm.system.endings import end_by
from dlrm.system.files import check_writable, written_whole
from dlrm.system.memory import free_memory
from dlrm_s_pytorch import Trainer, select_backend

TABLE_ROWS, DIM = (1000, 7, 1), 16
LARGE_DIM = 64  # of tables whose size matters; a row has 256 bytes
LARGE_BYTES = 2**32  # one more does not fit 32 bits
LOOKUPS = 4096  # per table where operations are timed
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}  # products of Gaudi 2 and 3 in fp32 are not IEEE's by default

Check = Callable[[Options, Backend], str]


class CheckError(Exception):
    """A check that failed. The message says what was found and what was expected."""


def expect_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """Returns the largest difference between two tensors, as a text. Raises CheckError if it exceeds `tolerance`."""
    difference = (found.detach().cpu().double() - expected.detach().double()).abs().max().item()
    if not difference <= tolerance:  # true for NaN, too
        raise CheckError(f"differs by {difference:.1e}; {tolerance:.0e} is allowed")
    return f"differs by {difference:.1e} at most; {tolerance:.0e} is allowed"


# ---------------------------------------------------------------------------------------------------------------------
# The machine. Each check returns what it found, as a text, or raises an error
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


# ---------------------------------------------------------------------------------------------------------------------
# What a training step consists of, and whole steps
# ---------------------------------------------------------------------------------------------------------------------


def layer(options: Options, backend: Backend) -> str:
    x, weight, bias = torch.randn(256, 256), torch.randn(256, 256), torch.randn(256)
    module = backend.layer(weight.clone(), bias.clone(), relu=True).to(backend.device)
    with backend.autocast():
        found = module(x.to(backend.device))
    expected = (x.double() @ weight.double().T + bias).relu()
    return expect_close(found, expected, 1.0 if options.data_type == "bf16" else 1e-3)


def dot_interaction(options: Options, backend: Backend) -> str:
    module = backend.interactions["dot"](4, DIM, itself=True).to(backend.device)
    dense, pooled = torch.randn(32, DIM), torch.randn(32, 3, DIM)
    features = torch.cat([dense[:, None], pooled], dim=1).double()
    row, column = torch.tril_indices(4, 4)
    expected = torch.cat([dense.double(), (features @ features.mT)[:, row, column]], dim=1)
    return expect_close(module(dense.to(backend.device), pooled.to(backend.device)), expected, 1e-3)


def tables(optimizer: str, oracle: type[torch.optim.Optimizer]) -> Check:
    """Returns a check of three updates of the tables against `torch.nn.EmbeddingBag` and `torch.optim` on the CPU."""

    def check(options: Options, _: Backend) -> str:
        backend = backend_with(options, optimizer)
        weights = [torch.randn(rows, DIM) for rows in TABLE_ROWS]
        ours = backend.embedding_bags(weight.clone() for weight in weights).to(backend.device)
        our_optimizer = backend.sparse_optimizer(ours, small_options(optimizer=optimizer))
        theirs = [nn.EmbeddingBag.from_pretrained(weight, False, mode="sum", include_last_offset=True)
                  for weight in weights]  # fmt: skip
        their_optimizer = oracle([bag.weight for bag in theirs], lr=0.01)
        data = RandomData(small_options(num_batches=3))
        for batch, prepared in zip(data, BatchPipeline(data, backend).run(data), strict=True):
            pooled = pooled_and_updated(ours, our_optimizer, prepared)
            expected = pool(theirs, batch)
            their_optimizer.zero_grad()
            expected.sin().sum().backward()
            their_optimizer.step()
        backend.synchronize()
        expect_close(pooled, expected, 1e-4)
        return expect_close(torch.cat(ours.weights), torch.cat([bag.weight for bag in theirs]), 1e-4)

    return check


def backend_with(options: Options, optimizer: str) -> Backend:
    """Returns the back end of the options with another optimizer, and with the kernels that exist for it."""
    return select_backend(dataclasses.replace(options, optimizer=optimizer, hpu_kernels=kernels(options, optimizer)))


def kernels(options: Options, optimizer: str) -> str:
    """Returns the `--hpu-kernels` of a check with that optimizer: what the user asked for, where the plugin has it."""
    return "native" if options.hpu_kernels == "native" or optimizer != "adagrad" else options.hpu_kernels


def pooled_and_updated(embeddings: EmbeddingBags, optimizer: torch.optim.Optimizer, prepared: PreparedBatch) -> Tensor:
    """Looks up the rows of a batch, updates them for a loss that is the sum of sines, and returns what was pooled."""
    pooled = embeddings.pool(embeddings(prepared.lookups), prepared.lookups)
    pooled.sin().sum().backward()
    optimizer.step(prepared.lookups)
    return pooled


def pool(embedding_bags: Sequence[nn.EmbeddingBag], batch: Batch) -> torch.Tensor:
    """Returns the sum over each bag, (B, T, D)."""
    lookups = zip(embedding_bags, batch.indices, batch.offsets, strict=True)
    return torch.stack([bag(indices, offsets) for bag, indices, offsets in lookups], dim=1)


def training(interaction: str, optimizer: str) -> Check:
    """Returns a check of the losses of 30 iterations, in the user's type, against those of fp32 on the CPU."""

    def check(options: Options, backend: Backend) -> str:
        model = {"arch_interaction_op": interaction, "optimizer": optimizer}
        expected = losses(small_options(device="cpu", **model))
        found = losses(small_options(**model, **on_device(options, backend, optimizer)))
        return expect_close(found, expected, LOSS_TOLERANCE[options.data_type])

    return check


def on_device(options: Options, backend: Backend, optimizer: str) -> dict[str, object]:
    """Returns the settings that let a model run as the user's flags say."""
    asked = {name: getattr(options, name) for name in ("mode", "data_type", "hpu_graphs")}
    return asked | {"device": backend.device.type, "hpu_kernels": kernels(options, optimizer)}


def losses(options: Options) -> Tensor:
    """Trains an epoch and returns the loss of each iteration, (iterations,), on the host."""
    trainer = Trainer(open_data_set(options), select_backend(options))
    steps = (trainer.train_step(batch)[0] for batch in trainer.prepared(iter(trainer.data)))
    return torch.stack([loss.clone() for loss in steps]).cpu()


def inference(options: Options, backend: Backend) -> str:
    """Checks the click probabilities of a new model against those of fp32 on the CPU."""

    def probabilities(**settings: object) -> Tensor:
        small = small_options(arch_interaction_op="dot", num_batches=3, inference_only=True, **settings)
        trainer = Trainer(open_data_set(small), select_backend(small))
        with torch.inference_mode():
            batches = trainer.pipeline.run(iter(trainer.data))
            return torch.cat([trainer.forward(batch)[1].clone() for batch in batches]).cpu()

    found = probabilities(**on_device(options, backend, "sgd"))
    return expect_close(found, probabilities(device="cpu"), LOSS_TOLERANCE[options.data_type])


def small_options(**settings: object) -> Options:
    """Returns the options of a small model on random data, but for other `settings`."""
    small = {
        "arch_embedding_size": TABLE_ROWS, "arch_sparse_feature_size": DIM, "arch_mlp_bot": (8, 32, DIM),
        "arch_mlp_top": (32, 1), "mini_batch_size": 64, "num_batches": 30, "learning_rate": 0.01,
    }  # fmt: skip
    return Options(**(small | settings))


# ---------------------------------------------------------------------------------------------------------------------
# Large tables
# ---------------------------------------------------------------------------------------------------------------------


def large_options(table_rows: tuple[int, ...], batch_size: int, **settings: object) -> Options:
    """Returns the options of tables with one lookup per bag, and of rows of `LARGE_DIM`."""
    return small_options(
        arch_embedding_size=table_rows, arch_sparse_feature_size=LARGE_DIM, arch_mlp_bot=(8, LARGE_DIM),
        mini_batch_size=batch_size, num_indices_per_lookup=(1,), **settings,
    )  # fmt: skip


def rows_beyond_32_bits(options: Options, _: Backend) -> str:
    """Checks that the last rows of several GB of tables, which share one tensor, are looked up and updated."""
    backend, looked_up = backend_with(options, "sgd"), 16
    rows = (1 + LARGE_BYTES // (8 * 4 * LARGE_DIM),) * 8
    size, free = sum(rows) * 4 * LARGE_DIM, min(backend.memory_limit(), free_memory())
    if free < 1.2 * size:
        return f"not tried: needs {1.2 * size / 2**30:.1f} GiB on the host and the device; {free / 2**30:.1f} are free"
    values = torch.randn(looked_up, len(rows), LARGE_DIM)
    embeddings = backend.embedding_bags(map(table_that_ends_with, rows, values.unbind(1))).to(backend.device)
    optimizer = backend.sparse_optimizer(embeddings, small_options(learning_rate=1.0))
    last_rows = Batch(
        dense=torch.zeros(looked_up, 8),
        indices=[torch.arange(count - looked_up, count) for count in rows],
        offsets=torch.arange(looked_up + 1).repeat(len(rows), 1),
        target=torch.zeros(looked_up, 1),
    )
    pipeline = BatchPipeline(RandomData(large_options(rows, looked_up)), backend)
    for prepared in pipeline.run([last_rows, last_rows]):
        expect_close(pooled_and_updated(embeddings, optimizer, prepared), values, 1e-5)
        values = values - values.cos()  # the update for a sum of sines, with a learning rate of 1
    return f"the last rows of {size / 2**30:.1f} GiB are read and written"


def table_that_ends_with(rows: int, values: Tensor) -> Tensor:
    """Returns a table of zeros, but for the last rows."""
    table = torch.zeros(rows, LARGE_DIM)
    table[-len(values) :] = values
    return table


def gather(rows: int, options: Options, backend: Backend) -> Callable[[], object]:
    stack, places = table_and_places(rows, backend)
    return lambda: stack.index_select(0, places)


def index_copy(rows: int, options: Options, backend: Backend) -> Callable[[], object]:
    stack, places = table_and_places(rows, backend)
    written = torch.ones(LOOKUPS, LARGE_DIM, device=backend.device)
    return lambda: stack.index_copy_(0, places, written)


def table_and_places(rows: int, backend: Backend) -> tuple[Tensor, Tensor]:
    """Returns a table of zeros and `LOOKUPS` places in it, on the device."""
    return torch.zeros(rows, LARGE_DIM, device=backend.device), torch.randint(rows, (LOOKUPS,)).to(backend.device)


def whole_update(rows: int, options: Options, backend: Backend) -> Callable[[], object]:
    """Returns what a training step does with a table, with the user's optimizer."""
    large = large_options((rows,), LOOKUPS, optimizer=options.optimizer, num_batches=1)
    embeddings = backend.embedding_bags([torch.zeros(rows, LARGE_DIM)]).to(backend.device)
    optimizer, data = backend.sparse_optimizer(embeddings, large), RandomData(large)
    prepared = next(BatchPipeline(data, backend).run(data))
    return lambda: pooled_and_updated(embeddings, optimizer, prepared)


def time_by_table_rows(operation: Callable[[int, Options, Backend], Callable[[], object]]) -> Check:
    """Returns a check that tells whether the time of an operation on `LOOKUPS` rows grows with the table. It must not,
    but eager mode may make `index_copy_` copy the whole table."""

    def check(options: Options, backend: Backend) -> str:
        free = min(backend.memory_limit(), free_memory())
        sizes = [rows for rows in (10**4, 10**5, 10**6, 10**7) if 3 * rows * 4 * LARGE_DIM < free]
        times = [milliseconds(operation(rows, options, backend), backend) for rows in sizes]
        grows = "GROWS WITH THE TABLE" if times[-1] > 5 * times[0] else "does not grow with the table"
        return f"{', '.join(f'{ms:.3g} ms ({rows:,} rows)' for ms, rows in zip(times, sizes, strict=True))}: {grows}"

    return check


def milliseconds(action: Callable[[], object], backend: Backend, repeats: int = 20) -> float:
    """Returns the mean time of an action, after three calls of it that are not timed."""
    for count in (3, repeats):
        start = time.perf_counter()
        for _ in range(count):
            result = action()  # has a name, since lazy mode leaves out what nobody can read
            backend.mark_step()
        backend.synchronize()
    del result
    return 1000 * (time.perf_counter() - start) / repeats


# ---------------------------------------------------------------------------------------------------------------------
# What the device counts by itself
# ---------------------------------------------------------------------------------------------------------------------


def no_new_compilation(options: Options, backend: Backend) -> str:
    """Checks that after ten steps of training, 20 more compile nothing."""
    settings = on_device(options, backend, options.optimizer) | {"optimizer": options.optimizer}
    trainer = Trainer(open_data_set(small_options(**settings)), backend)
    compilations = []
    for batch in trainer.prepared(iter(trainer.data)):
        trainer.train_step(batch)
        backend.synchronize()
        compilations.append(backend.metrics()["graph_compilation"]["TotalNumber"])
    if new := compilations[-1] - compilations[9]:
        raise CheckError(f"{new} compilations in steps 11 to 30")
    return "none in steps 11 to 30"


def no_operator_on_the_host(options: Options, backend: Backend) -> str:
    """Checks that no operator ran on the host during all checks before this one."""
    found = backend.metrics()["cpu_fallback"]
    if found["TotalNumber"]:
        raise CheckError(f"ran on the host: {found}")
    return "none"


def checks(options: Options, backend: Backend) -> dict[str, Check]:
    """Returns the checks of a back end by name, in the order in which they run."""
    found = {
        "installation": installation,
        "device": device,
        "copies": copies,
        f"layer, {options.data_type}": layer,
        "dot interaction": dot_interaction,
        "tables, sgd": tables("sgd", torch.optim.SGD),
        "tables, adagrad": tables("adagrad", torch.optim.Adagrad),
    }
    for interaction, optimizer in (("dot", "sgd"), ("dot", "adagrad"), ("cat", "rwsadagrad"), ("dcn", "adagrad")):
        found[f"training, {interaction}, {optimizer}, {options.data_type}"] = training(interaction, optimizer)
    found[f"inference, {options.data_type}"] = inference
    if backend.has_own_memory:
        found |= {
            "rows beyond 4 GiB": rows_beyond_32_bits,
            "time of a gather": time_by_table_rows(gather),
            "time of index_copy_": time_by_table_rows(index_copy),
            f"time of a table's step, {options.optimizer}": time_by_table_rows(whole_update),
        }
    if backend.metrics():
        found |= {"new compilations": no_new_compilation, "operators on the host": no_operator_on_the_host}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What a check found."""

    name: str
    passed: bool
    found: str
    seconds: float

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'}  {self.name:32}  {self.found}"


def run_checks(options: Options, backend: Backend) -> Iterator[Result]:
    """Runs each check. Any error counts as a failed check."""
    for name, check in tqdm(checks(options, backend).items(), leave=False, disable=None):
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            passed, found = True, check(options, backend)
        except Exception as error:
            passed, found = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        yield Result(name, passed, found, time.perf_counter() - start)


def write_report(path: str, options: Options, backend: Backend, results: Sequence[Result]) -> None:
    """Writes all that was found, as JSON, with the settings that a Gaudi's software read from the environment."""
    prefixes = ("PT_", "HABANA", "HCCL")
    report = {
        "device": backend.device.type,
        "name": backend.name,
        "mode": options.mode,
        "data_type": options.data_type,
        "versions": package_versions(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)},
        "checks": [dataclasses.asdict(result) for result in results],
        "metrics": backend.metrics(),
    }
    with written_whole("--report", path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the self-test. Returns 0 if all checks passed, 1 if some failed, and 2 for flags that cannot work."""
    parser = OptionParser(prog="demo_dlrm.py --self-test", description=__doc__.splitlines()[0])
    try:
        return run(Options(**parser.parse_given(sys.argv[1:] if argv is None else argv)))
    except Exception as error:
        return end_by(parser.prog, error)


def run(options: Options) -> int:
    """Runs and prints the checks. Returns the exit status, which is 1 if a check has failed."""
    if options.report:
        check_writable("--report", options.report)
    backend = select_backend(options)
    print(
        f"Self-test of {backend.device.type} in {options.mode} mode and {options.data_type}, "
        f"Python {platform.python_version()}"
    )
    results = []
    for result in run_checks(options, backend):
        tqdm.write(str(result))
        results.append(result)
    failed = sum(not result.passed for result in results)
    print(f"{len(results) - failed} of {len(results)} checks passed")
    if options.report:
        write_report(options.report, options, backend, results)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
