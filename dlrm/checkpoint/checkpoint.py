"""Checkpoints: all of a run, and how it goes on from there.

A checkpoint of one rank is one of the public script's, which loads it as it is, and has one key more, "trainer". One of
several ranks is a folder, which any number of ranks can read, one included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlrm.checkpoint.file import VERSION, CheckpointFile, Shard, write_file
from dlrm.distributed.ranks import OneRank, on_all_ranks
from dlrm.errors import RunError, UsageError
from dlrm.evaluation import Best
from dlrm.options import Options, flag


@dataclass
class Progress:
    """Where a run stands, between two steps of the optimizers."""

    epoch: int = 0
    iteration: int = 0  # of this epoch, done
    step: int = 0  # of the optimizers, in all epochs
    printed: int = 0  # iteration of the last line
    train_loss: float = math.nan  # as printed last
    test_accuracy: float = 0.0
    test_auc: float = 0.0
    best: Best = field(default_factory=Best)


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint holds
# ---------------------------------------------------------------------------------------------------------------------


def save(path: str, trainer) -> None:
    """All of a `Trainer`, between two steps, by all ranks."""
    run = run_state(trainer)
    if trainer.ranks.size > 1:
        from dlrm.checkpoint.folder import write_folder  # takes a second to come in

        kept = [shard for weight, moment in shards(trainer) for shard in (weight, moment) if shard]
        write_folder(path, run, kept, trainer.ranks.host)
    else:
        weights = {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()}
        write_file(path, run | {"state_dict": weights, "opt_state_dict": optimizer_state(trainer)})


def run_state(trainer) -> dict[str, Any]:
    """All that is no tensor of the model."""
    progress, options = trainer.progress, trainer.options
    return {
        "nepochs": options.nepochs,
        "nbatches": len(trainer.data),
        "nbatches_test": len(trainer.test_data),
        "epoch": progress.epoch,
        "iter": progress.iteration,
        "train_loss": progress.train_loss,
        "total_loss": 0.0,
        "test_acc": progress.test_accuracy,
        "test_auc": progress.test_auc,
        "trainer": {
            "version": VERSION,
            "options": asdict(options),
            "progress": asdict(progress),
            "metrics": trainer.ranks.gathered(trainer.metrics.state()),
            "random": torch.get_rng_state(),  # all ranks draw the same
        },
    }


def shards(trainer) -> Iterator[tuple[Shard, Shard | None]]:
    """What this rank has: each weight, and its moment; None with SGD."""
    states = {parameter: state for optimizer in trainer.optimizers for parameter, state in optimizer.state.items()}
    ranks = trainer.ranks
    pieces = iter(ranks.plan.ranks[ranks.rank])
    for name, parameter in trainer.model.named_parameters():
        weight = Shard(name, parameter, (0,) * parameter.dim(), tuple(parameter.shape))
        if ranks.size > 1 and is_table(name):
            piece = next(pieces, None)
            if piece is None:  # a row that nobody looks up
                continue
            offsets = piece.first_row, piece.first_column
            weight = Shard(table_name(piece.table), parameter, offsets, table_shape(ranks, piece.table))
        moment = states.get(parameter, {}).get("sum")
        yield weight, None if moment is None else moment_of(weight, moment)


def moment_of(weight: Shard, moment: Tensor) -> Shard:
    """Under its name in the public script's optimizers; it may be one number a row."""
    name = "sum" if moment.dim() == weight.tensor.dim() else "momentum"
    offsets, shape = weight.offsets[: moment.dim()], weight.whole_shape[: moment.dim()]
    return Shard(f"{weight.name}.{name}", moment, offsets, shape)


def table_name(table: int) -> str:
    return f"emb_l.{table}.weight"


def is_table(parameter: str) -> bool:
    return parameter.startswith("emb_l.")


def table_shape(ranks: OneRank, table: int) -> tuple[int, int]:
    return ranks.plan.table_rows[table], ranks.plan.dim


def whole_shapes(trainer) -> dict[str, tuple[int, ...]]:
    """Of all weights, those of other ranks included, in the order that one rank has them in."""
    ranks = trainer.ranks
    shapes = {name: tuple(parameter.shape) for name, parameter in trainer.model.named_parameters()}
    if ranks.size == 1:
        return shapes
    tables = {table_name(table): table_shape(ranks, table) for table in range(len(ranks.plan.table_rows))}
    return tables | {name: shape for name, shape in shapes.items() if not is_table(name)}


def optimizer_state(trainer) -> dict[str, Any]:
    """As the public script's one optimizer of all parameters has it."""
    state, step = {}, float(trainer.progress.step)
    for number, (_, moment) in enumerate(shards(trainer)):
        if moment:
            steps = torch.tensor(step) if trainer.options.optimizer == "adagrad" else step
            state[number] = {"step": steps, moment.name.split(".")[-1]: moment.tensor.cpu()}
    return {"state": state, "param_groups": parameter_groups(len(whole_shapes(trainer)), trainer.options)}


def parameter_groups(count: int, options: Options) -> list[dict[str, Any]]:
    """As torch's own optimizer describes them, whose settings the public script takes from here."""
    optimizer = torch.optim.SGD if options.optimizer == "sgd" else torch.optim.Adagrad
    parameters = [torch.empty(0) for _ in range(count)]
    return optimizer(parameters, lr=options.learning_rate).state_dict()["param_groups"]


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load(trainer, options: Options) -> bool:
    """What `--load-model` and `--resume` ask for; False if `--resume` finds nothing to go on from. RunError and
    UsageError, on all ranks, name the file and what is wrong with it."""
    path = options.load_model or (latest(options.save_model) if options.resume else "")
    path = trainer.ranks.gathered(path)[0]
    if not path:
        return False
    try:
        checkpoint = on_all_ranks(trainer.ranks, lambda: open_checkpoint(path, whole_shapes(trainer), trainer.ranks))
        on_all_ranks(trainer.ranks, lambda: restore(trainer, checkpoint))
    except (RunError, UsageError) as error:
        raise type(error)(f"{'--load-model' if options.load_model else '--resume'}: {error}") from None
    print_loaded(path, checkpoint.state)
    return True


def print_loaded(path: str, saved: dict[str, Any]) -> None:
    """What is in the checkpoint, in the public script's lines."""
    print(f"Loading saved model {path}")
    print(
        f"Saved at: epoch = {saved['epoch']}/{saved['nepochs']}, batch = {saved['iter']}/{saved['nbatches']}, "
        f"ntbatch = {saved.get('nbatches_test', 0)}"
    )
    print(f"Training state: loss = {saved.get('train_loss', float('nan')):.6f}")
    auc = f", auc = {saved['test_auc']:.3f}" if "test_auc" in saved else ""
    print(f"Testing state: accuracy = {100 * saved.get('test_acc', 0):3.3f} %{auc}")


def latest(path: str) -> str:
    """The checkpoint at `path`, or the one before it, if a kill came between the two; empty if there is none."""
    return next((name for name in (path, f"{path}.previous") if Path(name).exists()), "")


def open_checkpoint(path: str, names, ranks: OneRank):
    """Verified by all ranks together. `names` of the model's parameters, in their order."""
    if Path(path).is_dir():
        from dlrm.checkpoint.folder import CheckpointFolder  # takes a second to come in

        return CheckpointFolder(path, ranks.rank, ranks.size)
    return CheckpointFile(path, names, verifies=ranks.rank == 0)


def restore(trainer, checkpoint) -> None:
    """What this rank needs of it: the weights; with `--resume` all else."""
    check_shapes(whole_shapes(trainer), checkpoint.shapes)
    with torch.no_grad():
        for weight, _ in shards(trainer):
            checkpoint.copy_to(weight)
        for layer in trainer.model.dense_layers():
            layer.update_shadows()
    if trainer.options.resume:
        resume(trainer, checkpoint)


def check_shapes(expected: dict[str, tuple[int, ...]], saved: dict[str, tuple[int, ...]]) -> None:
    """Habana's fork saves more, moments and gradients, which are no weights."""
    for name in expected:
        if name not in saved:
            raise RunError(f"the checkpoint has no {name}, which is in the model; see {size_flag(name)}")
    for name in saved:
        if name not in expected and name.split(".")[-1] in ("weight", "bias"):
            raise RunError(f"the model has no {name}, which is in the checkpoint; see {size_flag(name)}")
    for name, shape in expected.items():
        if saved[name] != shape:
            raise RunError(
                f"{name} is {saved[name]} in the checkpoint, but {shape} in the model; see {size_flag(name)}"
            )


def size_flag(parameter: str) -> str:
    flags = {"emb_l": "--arch-embedding-size", "bot_l": "--arch-mlp-bot", "top_l": "--arch-mlp-top"}
    return (flags | {"v_W_l": "--weighted-pooling"}).get(parameter.split(".")[0], "--arch-...")


def resume(trainer, checkpoint) -> None:
    """All but the weights."""
    state, ours = checkpoint.state, checkpoint.state.get("trainer")
    if ours:
        check_same_run(trainer.options, ours["options"])
        progress = dict(ours["progress"])
        trainer.progress = Progress(**progress | {"best": Best(**progress["best"])})
        trainer.metrics.load(ours["metrics"], trainer.ranks)
        torch.set_rng_state(ours["random"].clone())
    else:
        trainer.progress = progress_of_public_script(state, trainer.options)
    trainer.sparse_optimizer.updates = trainer.progress.step
    load_moments(trainer, checkpoint)


def load_moments(trainer, checkpoint) -> None:
    saved = checkpoint.shapes
    for _, moment in shards(trainer):
        if moment is None:
            continue
        if saved.get(moment.name) != moment.whole_shape:
            raise UsageError(f"the checkpoint has no moments of --optimizer={trainer.options.optimizer}")
        checkpoint.copy_to(moment)


def progress_of_public_script(state: dict[str, Any], options: Options) -> Progress:
    if state["nbatches"] != options.batches_per_epoch:
        raise UsageError(
            f"the checkpoint is of epochs of {state['nbatches']} batches, this run's have {options.batches_per_epoch}"
        )
    accuracy, auc = float(state.get("test_acc", 0)), float(state.get("test_auc", 0))
    iterations = state["epoch"] * state["nbatches"] + state["iter"]
    return Progress(
        epoch=state["epoch"],
        iteration=state["iter"],
        step=iterations // options.mlperf_grad_accum_iter,
        printed=state["iter"],
        train_loss=float(state.get("train_loss", math.nan)),
        test_accuracy=accuracy,
        test_auc=auc,
        best=Best(accuracy, auc),
    )


# What may differ in a run that goes on; all else of model, data and training must be as it was.
FREE = {"nepochs", "allow_nan", "num_workers", "raw_data_file", "processed_data_file", "data_trace_file"}
BOUND = {"data_type", "numpy_rand_seed"}


def check_same_run(options: Options, saved: dict[str, Any]) -> None:
    group = ""
    for option in dataclasses.fields(Options):
        group = option.metadata["group"] or group
        bound = option.name in BOUND or (group in ("model", "data", "training") and option.name not in FREE)
        now, then = getattr(options, option.name), saved.get(option.name, option.default)
        if bound and now != then:
            raise UsageError(f"the run that is to go on had {flag(option.name)}={then}, not {now}")
