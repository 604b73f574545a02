"""Checkpoints: a file that holds all of a run, and that is whole or not there.

A checkpoint is one of the public script's, which loads it as it is, and has one key more, "trainer". It is a zip
archive as `torch.save` writes it; the archive's comment is the SHA-256 of the file without that comment. Tensors go
straight to the file, and from its mapped pages into place: there is never a second copy of the tables in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import signal
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dlrm_evaluation import Best
from dlrm_options import Options, RunError, UsageError, flag

VERSION = 1


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
# Files
# ---------------------------------------------------------------------------------------------------------------------

SEAL = b"sha256:"
SEAL_LENGTH = len(SEAL) + 64
READ_AT_ONCE = 2**24


class HashingFile:
    """What is written goes to the file and into a SHA-256. Keeps what went wrong: torch tells only that it did."""

    def __init__(self, file: BinaryIO):
        self._file, self._hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def seal(self) -> None:
        """Makes the hash the archive's comment; the archive ends in the comment's length, two bytes, zero so far."""
        comment = SEAL + self._hash.hexdigest().encode()
        self._file.seek(-2, os.SEEK_CUR)
        self._file.write(len(comment).to_bytes(2, "little") + comment)


def write_file(path: str, state: dict[str, Any]) -> None:
    """The file before it becomes `path`.previous; at any moment one of the two is whole. RunError if it can't be
    written: then nothing has changed."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            _write(HashingFile(file), state)
            file.flush()
            os.fsync(file.fileno())
        _keep_previous(path)
        os.replace(temporary, path)
        _sync_folder(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        kept = "; the one before it stays" if Path(path).exists() else ""
        raise RunError(f"--save-model: cannot write {path!r}: {error.strerror}{kept}") from None


def _write(file: HashingFile, state: dict[str, Any]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise file.error or error from None
    file.seal()


def _keep_previous(path: str) -> None:
    """By a second name, so that `path` itself is never missing; on file systems without those it is, for a moment."""
    if not Path(path).exists():
        return
    second_name = f"{path}.previous.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(second_name)
    try:
        os.link(path, second_name)
        os.replace(second_name, f"{path}.previous")
    except OSError:
        os.replace(path, f"{path}.previous")


def _sync_folder(path: str) -> None:
    folder = os.open(Path(path).absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_file(path: str) -> dict[str, Any]:
    """Verified; tensors are mapped pages of the file. RunError, naming the file, if it is damaged or no checkpoint."""
    try:
        sealed = _verify(path)
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError):
        raise RunError(f"{path!r} is damaged, or no checkpoint{_hint(path)}") from None
    except OSError as error:
        raise RunError(f"cannot read {path!r}: {error.strerror or error}") from None
    except Exception as error:  # the unpickler's own error, of something that is not plain data
        raise RunError(f"{path!r} is no checkpoint: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(state, dict) or REQUIRED - state.keys():
        raise RunError(f"{path!r} is no checkpoint of this trainer or of the public script")
    if "trainer" in state and not sealed:
        raise RunError(f"{path!r} is damaged{_hint(path)}")
    if state.get("trainer", {}).get("version", VERSION) != VERSION:
        raise RunError(f"{path!r} is of another version of this trainer")
    return state


REQUIRED = {"state_dict", "opt_state_dict", "epoch", "iter", "nepochs", "nbatches"}
NUMPY_NUMBERS = [  # the public script saves a loss and an accuracy as these
    np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64", "uint8", "uint64")),
]


def _hint(path: str) -> str:
    previous = f"{path}.previous"
    return f"; the one before it is {previous!r}" if Path(previous).exists() else ""


def _verify(path: str) -> bool:
    """Whether the file is one of ours, with its seal; BadZipFile if it is damaged. Other archives have a checksum for
    each part."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - SEAL_LENGTH - 2
        if size > 0:
            file.seek(size)
            length, comment = file.read(2), file.read()
            if length == SEAL_LENGTH.to_bytes(2, "little") and comment.startswith(SEAL):
                if comment[len(SEAL) :] != _hash(file, size).encode():
                    raise zipfile.BadZipFile
                return True
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile
    return False


def _hash(file: BinaryIO, size: int) -> str:
    """Of the first `size` bytes and of two zeros, which were there before the seal."""
    digest = hashlib.sha256()
    file.seek(0)
    while size:
        block = file.read(min(size, READ_AT_ONCE))
        digest.update(block)
        size -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint holds
# ---------------------------------------------------------------------------------------------------------------------


def save(path: str, trainer) -> None:
    """All of a `Trainer`, between two steps."""
    progress, options = trainer.progress, trainer.options
    write_file(
        path,
        {
            "nepochs": options.nepochs,
            "nbatches": len(trainer.data),
            "nbatches_test": len(trainer.test_data),
            "epoch": progress.epoch,
            "iter": progress.iteration,
            "train_loss": progress.train_loss,
            "total_loss": 0.0,
            "test_acc": progress.test_accuracy,
            "test_auc": progress.test_auc,
            "state_dict": {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()},
            "opt_state_dict": optimizer_state(trainer),
            "trainer": {
                "version": VERSION,
                "options": asdict(options),
                "progress": asdict(progress),
                "metrics": trainer.metrics.state(),
                "random": torch.get_rng_state(),
            },
        },
    )


def moments(trainer) -> list[Tensor | None]:
    """Of each parameter of the model, in their order; None with SGD."""
    states = {**trainer.sparse_optimizer.state, **trainer.dense_optimizer.state}
    return [states.get(parameter, {}).get("sum") for parameter in trainer.model.parameters()]


def moment_name(moment: Tensor, parameter: Tensor) -> str:
    """In the public script's optimizers."""
    return "sum" if moment.dim() == parameter.dim() else "momentum"


def optimizer_state(trainer) -> dict[str, Any]:
    """As the public script's one optimizer for tables, bottom MLP and top MLP has it."""
    state = {}
    for number, (parameter, moment) in enumerate(zip(trainer.model.parameters(), moments(trainer), strict=True)):
        if moment is not None:
            step = float(trainer.progress.step)
            step = torch.tensor(step) if trainer.options.optimizer == "adagrad" else step
            state[number] = {"step": step, moment_name(moment, parameter): moment.cpu()}
    sizes = [len(list(part.parameters())) for part in (trainer.model.emb_l, trainer.model.bot_l, trainer.model.top_l)]
    return {"state": state, "param_groups": parameter_groups(sizes, trainer.options)}


def parameter_groups(sizes: list[int], options: Options) -> list[dict[str, Any]]:
    """As torch's own optimizer describes them, whose settings the public script takes from here."""
    parameters = iter([torch.empty(0) for _ in range(sum(sizes))])
    groups = [{"params": [next(parameters) for _ in range(size)]} for size in sizes]
    optimizer = torch.optim.SGD if options.optimizer == "sgd" else torch.optim.Adagrad
    return optimizer(groups, lr=options.learning_rate).state_dict()["param_groups"]


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load(trainer, options: Options) -> bool:
    """What `--load-model` and `--resume` ask for; False if `--resume` finds nothing to go on from. RunError and
    UsageError name the file and what is wrong with it."""
    path = options.load_model or (latest(options.save_model) if options.resume else "")
    if not path:
        return False
    name = "--load-model" if options.load_model else "--resume"
    try:
        state = read_file(path)
        load_weights(trainer.model, state["state_dict"])
        if options.resume:
            resume(trainer, state)
    except (RunError, UsageError) as error:
        raise type(error)(f"{name}: {error}") from None
    trainer.print_loaded(path, state)
    return True


def latest(path: str) -> str:
    """The checkpoint at `path`, or the one before it, if a kill came between the two; empty if there is none."""
    return next((name for name in (path, f"{path}.previous") if Path(name).is_file()), "")


def load_weights(model: torch.nn.Module, saved: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    check_names(parameters, saved)
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape:
            raise RunError(
                f"{name} is {tuple(saved[name].shape)} in the checkpoint, but {tuple(parameter.shape)} in the model; "
                f"see {size_flag(name)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
        for layer in model.dense_layers():
            layer.update_shadows()


def check_names(parameters: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Habana's fork has more of them, moments and gradients, which are no weights."""
    for name in parameters:
        if name not in saved:
            raise RunError(f"the checkpoint has no {name}, which is in the model; see {size_flag(name)}")
    for name in saved:
        if name not in parameters and name.split(".")[-1] in ("weight", "bias"):
            raise RunError(f"the model has no {name}, which is in the checkpoint; see {size_flag(name)}")


def size_flag(parameter: str) -> str:
    part = parameter.split(".")[0]
    return {"emb_l": "--arch-embedding-size", "bot_l": "--arch-mlp-bot", "top_l": "--arch-mlp-top"}.get(
        part, "--arch-..."
    )


def resume(trainer, state: dict[str, Any]) -> None:
    """All but the weights."""
    ours = state.get("trainer")
    if ours:
        check_same_run(trainer.options, ours["options"])
        progress = dict(ours["progress"])
        trainer.progress = Progress(**progress | {"best": Best(**progress["best"])})
        trainer.metrics.load(ours["metrics"])
        torch.set_rng_state(ours["random"].clone())
    else:
        trainer.progress = progress_of_public_script(state, trainer.options)
    trainer.sparse_optimizer.updates = trainer.progress.step
    load_moments(trainer, state["opt_state_dict"]["state"])


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


def load_moments(trainer, saved: dict[int, dict[str, Any]]) -> None:
    for number, (parameter, moment) in enumerate(zip(trainer.model.parameters(), moments(trainer), strict=True)):
        if moment is None:
            continue
        values = saved.get(number, {}).get(moment_name(moment, parameter))
        if not isinstance(values, Tensor) or values.shape != moment.shape:
            raise UsageError(f"the checkpoint has no moments of --optimizer={trainer.options.optimizer}")
        moment.copy_(values)


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


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818 - a wish, not an error
    """SIGTERM or Ctrl-C came, and the run stands where it can go on."""

    def __init__(self, number: int):
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.exit_status = 128 + number


class StopSignals:
    """Inside, SIGTERM and SIGINT are noted, for the loop to see; a second one ends the process at once."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
