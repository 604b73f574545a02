"""Checkpoints: saving all of a run, and going on from there.

A checkpoint of one rank is a checkpoint of the reference script, which loads it as it is; it has one more key,
"trainer". A checkpoint of several ranks is a folder, which any number of ranks can read, one included.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dlrm.checkpoint.archive import VERSION
from dlrm.checkpoint.file import CheckpointFile, Shard, write_file
from dlrm.distributed.ranks import Ranks
from dlrm.errors import RunError, UsageError
from dlrm.options import Options, flag


class Resumable(Protocol):
    """What a checkpoint can hold: a trainer, between two steps."""

    ranks: Ranks
    tensors: ModelTensors

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is no tensor of the model: the reference script's keys, and "trainer", with the options and
        the progress of the run among others."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was saved, by `state_dict` or by the reference script. Raises UsageError if this run
        cannot go on from it."""
        ...


# ---------------------------------------------------------------------------------------------------------------------
# The tensors of a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


class ModelTensors:
    """The weights of a model and their moments, under the names and in the shapes that checkpoints have for them."""

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ranks: Ranks):
        self._model, self._optimizers, self._ranks = model, optimizers, ranks

    def shards(self) -> Iterator[tuple[Shard, Shard | None]]:
        """Yields what this rank has of each weight and of its moment; SGD has no moments."""
        states = {weight: state for optimizer in self._optimizers for weight, state in optimizer.state.items()}
        plan = self._ranks.plan
        pieces = iter(plan.ranks[self._ranks.rank])
        for name, parameter in self._model.named_parameters():
            weight = Shard(name, parameter, (0,) * parameter.dim(), tuple(parameter.shape))
            if self._ranks.size > 1 and is_table(name):
                piece = next(pieces, None)
                if piece is None:  # the row that a rank without pieces keeps
                    continue
                offsets = piece.first_row, piece.first_column
                weight = Shard(table_name(piece.table), parameter, offsets, self._table_shape(piece.table))
            moment = states.get(parameter, {}).get("sum")
            yield weight, None if moment is None else shard_of_moment(weight, moment)

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all weights, those of other ranks included, in the order that one rank has them in."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self._model.named_parameters()}
        if self._ranks.size == 1:
            return shapes
        tables = range(len(self._ranks.plan.table_rows))
        table_shapes = {table_name(table): self._table_shape(table) for table in tables}
        return table_shapes | {name: shape for name, shape in shapes.items() if not is_table(name)}

    def weights_on_host(self) -> dict[str, Tensor]:
        """Returns the model's state_dict on the host."""
        return {name: tensor.cpu() for name, tensor in self._model.state_dict().items()}

    def weights_have_changed(self) -> None:
        """Updates what the layers keep beside their weights."""
        for layer in self._model.dense_layers():
            layer.update_shadows()

    def _table_shape(self, table: int) -> tuple[int, int]:
        return self._ranks.plan.table_rows[table], self._ranks.plan.dim


def shard_of_moment(weight: Shard, moment: Tensor) -> Shard:
    """Returns the moment of a weight, named as in the reference script's optimizers. It may be one number per row."""
    name = "sum" if moment.dim() == weight.tensor.dim() else "momentum"
    offsets, shape = weight.offsets[: moment.dim()], weight.whole_shape[: moment.dim()]
    return Shard(f"{weight.name}.{name}", moment, offsets, shape)


def table_name(table: int) -> str:
    return f"emb_l.{table}.weight"


def is_table(parameter: str) -> bool:
    return parameter.startswith("emb_l.")


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


def save(path: str, trainer: Resumable) -> None:
    """Writes all of a run, between two steps. Every rank must call this. Raises RunError if it cannot be written."""
    state = trainer.state_dict()
    state["trainer"]["version"] = VERSION
    if trainer.ranks.size > 1:
        from dlrm.checkpoint.folder import write_folder  # its import takes a second

        shards = [shard for weight, moment in trainer.tensors.shards() for shard in (weight, moment) if shard]
        write_folder(path, state, shards, trainer.ranks.host)
    else:
        weights = {"state_dict": trainer.tensors.weights_on_host(), "opt_state_dict": optimizer_state(trainer, state)}
        write_file(path, state | weights)


def optimizer_state(trainer: Resumable, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the moments in the form that the reference script has them in: those of one optimizer of all weights."""
    options = Options(**state["trainer"]["options"])
    step = float(state["trainer"]["progress"]["step"])
    moments = {}
    for number, (_, moment) in enumerate(trainer.tensors.shards()):
        if moment:
            steps = torch.tensor(step) if options.optimizer == "adagrad" else step
            moments[number] = {"step": steps, moment.name.split(".")[-1]: moment.tensor.cpu()}
    return {"state": moments, "param_groups": parameter_groups(len(trainer.tensors.whole_shapes()), options)}


def parameter_groups(count: int, options: Options) -> list[dict[str, Any]]:
    """Returns what torch's own optimizer of `count` parameters says of them; the reference script takes its settings
    from there."""
    optimizer = torch.optim.SGD if options.optimizer == "sgd" else torch.optim.Adagrad
    parameters = [torch.empty(0) for _ in range(count)]
    return optimizer(parameters, lr=options.learning_rate).state_dict()["param_groups"]


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load(trainer: Resumable, options: Options) -> bool:
    """Loads what `--load-model` and `--resume` ask for. Returns False if `--resume` finds nothing to go on from.

    Raises RunError and UsageError, on all ranks, which name the file and what is wrong with it.
    """
    ranks = trainer.ranks
    path = options.load_model or (latest(options.save_model) if options.resume else "")
    path = ranks.gather_objects(path)[0]
    if not path:
        return False
    try:
        checkpoint = ranks.run_on_all(lambda: open_checkpoint(path, trainer.tensors.whole_shapes(), ranks))
        ranks.run_on_all(lambda: restore(trainer, checkpoint, options))
    except (RunError, UsageError) as error:
        raise type(error)(f"{'--load-model' if options.load_model else '--resume'}: {error}") from None
    print_loaded(path, checkpoint.state)
    return True


def print_loaded(path: str, saved: dict[str, Any]) -> None:
    """Prints what is in the checkpoint, in the reference script's lines."""
    print(f"Loading saved model {path}")
    print(
        f"Saved at: epoch = {saved['epoch']}/{saved['nepochs']}, batch = {saved['iter']}/{saved['nbatches']}, "
        f"ntbatch = {saved.get('nbatches_test', 0)}"
    )
    print(f"Training state: loss = {saved.get('train_loss', float('nan')):.6f}")
    auc = f", auc = {saved['test_auc']:.3f}" if "test_auc" in saved else ""
    print(f"Testing state: accuracy = {100 * saved.get('test_acc', 0):3.3f} %{auc}")


def latest(path: str) -> str:
    """Returns the checkpoint at `path`, or the one before it if a kill came between the two; "" if there is none."""
    return next((name for name in (path, f"{path}.previous") if os.path.exists(name)), "")


def open_checkpoint(path: str, names: Iterable[str], ranks: Ranks):
    """Returns a checkpoint that all ranks have verified between them. `names`: the model's parameters, in order."""
    if os.path.isdir(path):
        from dlrm.checkpoint.folder import CheckpointFolder  # its import takes a second

        return CheckpointFolder(path, ranks.rank, ranks.size)
    return CheckpointFile(path, names, verifies=ranks.rank == 0)


def restore(trainer: Resumable, checkpoint, options: Options) -> None:
    """Loads what this rank needs: the weights, and with `--resume` all else."""
    check_shapes(trainer.tensors.whole_shapes(), checkpoint.shapes, options)
    with torch.no_grad():
        for weight, _ in trainer.tensors.shards():
            checkpoint.copy_to(weight)
    trainer.tensors.weights_have_changed()
    if options.resume:
        if "trainer" in checkpoint.state:
            check_same_run(options, checkpoint.state["trainer"]["options"])
        trainer.load_state_dict(checkpoint.state)
        load_moments(trainer, checkpoint, options)


def check_shapes(expected: dict[str, tuple[int, ...]], saved: dict[str, tuple[int, ...]], options: Options) -> None:
    """Raises RunError if the weights differ. The Habana fork saves moments and gradients as well, which are no
    weights."""
    for name in expected:
        if name not in saved:
            raise RunError(f"the checkpoint has no {name}, which is in the model; see {size_flag(name, options)}")
    for name in saved:
        if name not in expected and name.split(".")[-1] in ("weight", "bias"):
            raise RunError(f"the model has no {name}, which is in the checkpoint; see {size_flag(name, options)}")
    for name, shape in expected.items():
        if saved[name] != shape:
            raise RunError(
                f"{name} is {saved[name]} in the checkpoint, but {shape} in the model; see {size_flag(name, options)}"
            )


def size_flag(parameter: str, options: Options) -> str:
    """Returns what decides the size of a parameter: a flag, or the data set with the flag that caps its tables."""
    tables = "--arch-embedding-size" if options.data_generation != "dataset" else "the data set and --max-ind-range"
    flags = {
        "emb_l": tables,
        "bot_l": "--arch-mlp-bot",
        "top_l": "--arch-mlp-top",
        "cross_l": "--arch-interaction-op, --dcn-num-layers and --dcn-low-rank-dim",
        "v_W_l": "--weighted-pooling",
    }
    return flags.get(parameter.split(".")[0], "--arch-...")


def load_moments(trainer: Resumable, checkpoint, options: Options) -> None:
    saved = checkpoint.shapes
    for _, moment in trainer.tensors.shards():
        if moment is None:
            continue
        if saved.get(moment.name) != moment.whole_shape:
            raise UsageError(f"the checkpoint has no moments of --optimizer={options.optimizer}")
        checkpoint.copy_to(moment)


# All settings of model, data and training must be as they were, but for these.
MAY_DIFFER = {"nepochs", "allow_nan", "num_workers", "raw_data_file", "processed_data_file", "data_trace_file"}
MUST_NOT_DIFFER_EITHER = {"data_type", "numpy_rand_seed"}  # of the other groups


def check_same_run(options: Options, saved: dict[str, Any]) -> None:
    """Raises UsageError if a setting differs from that of the run that is to go on."""
    group = ""
    for option in dataclasses.fields(Options):
        group = option.metadata["group"] or group
        decides_the_result = group in ("model", "data", "training") and option.name not in MAY_DIFFER
        now, then = getattr(options, option.name), saved.get(option.name, option.default)
        if (decides_the_result or option.name in MUST_NOT_DIFFER_EITHER) and not is_same(now, then):
            shown = then if isinstance(then, str) and then.isprintable() else repr(then).replace("\n", " ")
            raise UsageError(f"the run that is to go on had {flag(option.name)}={shown:.200}, not {now}")


def is_same(now: Any, then: Any) -> bool:
    """Says whether two settings are equal. A damaged checkpoint may hold anything in the place of a setting, and an old
    one a number where there is a tuple of one number now."""
    return repr(now) in (repr(then), repr((then,)))
