"""Checks of the values in a checkpoint, so that one that no trainer can have written is refused in one line."""

from __future__ import annotations

import itertools
import math
import numbers
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlrm.errors import RunError

Check = Callable[[Any], bool]


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Says whether a value is a real number, or a tensor of one. It may be NaN, as a loss is before its first line."""
    if is_dense(value) and value.dim() == 0 and value.is_floating_point():
        return True
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_share(value: Any) -> bool:
    return is_number(value) and 0 <= float(value) <= 1


def is_share_or_nan(value: Any) -> bool:
    return is_share(value) or (is_number(value) and math.isnan(value))


COUNTER_TYPES = (torch.int32, torch.float64)


def is_counter(value: Any) -> bool:
    """Says whether a value is a tensor of one element that is not negative. Versions before 2026-11 kept int32."""
    return is_dense(value) and value.numel() == 1 and value.dtype in COUNTER_TYPES and bool(value >= 0)


def is_dense(value: Any) -> bool:
    """Says whether a value is an ordinary tensor in the host's memory."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def is_random_state(value: Any) -> bool:
    """Says whether torch's random number generator on the host can take this state."""
    try:
        torch.Generator().set_state(value.clone())
    except (AttributeError, TypeError, RuntimeError):
        return False
    return True


def is_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


RUN: dict[str, Check] = {"epoch": is_count, "iter": is_count, "nepochs": is_count, "nbatches": is_count}
OPTIONAL_IN_RUN: dict[str, Check] = {
    "nbatches_test": is_count,
    "train_loss": is_number,
    "test_acc": is_share,
    "test_auc": is_share_or_nan,
}
BEST: dict[str, Check] = {"accuracy": is_share, "auc": is_share}
PROGRESS: dict[str, Check] = {
    **dict.fromkeys(("epoch", "iteration", "step", "printed"), is_count),
    "train_loss": is_number,
    "test_accuracy": is_share,
    "test_auc": is_share_or_nan,
    "best": lambda value: has_exactly(value, BEST),
}
METRICS: dict[str, Check] = {
    "loss": lambda value: is_dense(value) and value.shape == () and value.is_floating_point(),
    "hits": is_counter,
    "finite": is_counter,
    "samples": is_count,
}
TRAINER: dict[str, Check] = {
    "options": is_names,
    "progress": lambda value: has_exactly(value, PROGRESS),
    "metrics": lambda value: (
        isinstance(value, list) and bool(value) and not any(wrong_values(rank, METRICS) for rank in value)
    ),
    "random": is_random_state,
}


def wrong_values(values: Any, checks: Mapping[str, Check]) -> list[str]:
    """Returns the names whose values are missing or fail their check."""
    if not isinstance(values, Mapping):
        return list(checks)
    return [name for name, check in checks.items() if name not in values or not check(values[name])]


def has_exactly(values: Any, checks: Mapping[str, Check]) -> bool:
    return not wrong_values(values, checks) and len(values) == len(checks)


def check_run(path: str, state: Mapping[str, Any]) -> None:
    """Raises RunError, which names the file and the value, if what a checkpoint says of its run cannot be."""
    wrong = wrong_values(state, RUN)
    wrong += wrong_values(state, {name: check for name, check in OPTIONAL_IN_RUN.items() if name in state})
    if not wrong and state["iter"] > state["nbatches"]:
        wrong = ["iter"]
    if not wrong and "trainer" in state:
        trainer = state["trainer"]
        wrong = [f"trainer.{name}" for name in wrong_values(trainer, TRAINER)]
        if not wrong:
            progress = trainer["progress"]
            agree = (progress["epoch"], progress["iteration"]) == (state["epoch"], state["iter"])
            possible = progress["step"] <= progress["epoch"] * state["nbatches"] + progress["iteration"]
            if not (agree and possible and progress["printed"] <= progress["iteration"]):
                wrong = ["trainer.progress"]
    if wrong:
        raise RunError(f"{path!r} is no checkpoint that can be loaded: its {wrong[0]!r} is missing or wrong")


# ---------------------------------------------------------------------------------------------------------------------
# The manifest of a folder
# ---------------------------------------------------------------------------------------------------------------------

FILE_NAME = re.compile(r"\.?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")  # in the folder, never beside it
SHA_256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(path: str, files: Any, tensors: Any) -> None:
    """Raises RunError, which names the file and the tensor, unless the shards of each tensor cover it exactly once."""
    if not is_names(files) or not all(
        FILE_NAME.fullmatch(name) and isinstance(sha256, str) and SHA_256.fullmatch(sha256)
        for name, sha256 in files.items()
    ):
        raise RunError(f"{path!r} is no checkpoint that can be loaded: its 'files' are wrong")
    if not is_names(tensors):
        raise RunError(f"{path!r} is no checkpoint that can be loaded: its 'tensors' are wrong")
    for name, tensor in tensors.items():
        if reason := why_not_covered(tensor, files):
            raise RunError(f"{path!r} is no checkpoint that can be loaded: {reason} {name!r}")


def why_not_covered(tensor: Any, files: Mapping[str, str]) -> str:
    """Returns, in words that the tensor's name follows, what is wrong with its shards; "" if nothing is."""
    if not isinstance(tensor, Mapping) or not is_shape(tensor.get("shape")):
        return "it has no shape of"
    shape, shards = tensor["shape"], tensor.get("shards")
    if not isinstance(shards, list) or not all(is_shard(shard, len(shape)) for shard in shards):
        return "it has no shards of"
    if any(file not in files for *_, file in shards):
        return "it has no file of a shard of"
    boxes = sorted((offsets, tuple(map(sum, zip(offsets, size, strict=True)))) for offsets, size, _ in shards)
    if any(end > whole for _, ends in boxes for end, whole in zip(ends, shape, strict=True)):
        return "a shard is larger than"
    if any(overlap(*pair) for pair in pairs_that_share_rows(boxes)):
        return "shards overlap in"
    if sum(math.prod(size) for _, size, _ in shards) != math.prod(shape):
        return "shards do not cover"
    return ""


def is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(is_count, value))


def is_shard(value: Any, dimensions: int) -> bool:
    """Says whether a value is (offsets, size, file name), with one offset and one size per dimension."""
    if not isinstance(value, tuple) or len(value) != 3:
        return False
    offsets, size, file = value
    return all(is_shape(part) and len(part) == dimensions for part in (offsets, size)) and isinstance(file, str)


Box = tuple[tuple[int, ...], tuple[int, ...]]  # first element and end of a shard, in each dimension


def pairs_that_share_rows(boxes: Sequence[Box]) -> Iterator[tuple[Box, Box]]:
    """Yields the pairs of boxes that have elements of the same first dimension. `boxes` are in ascending order."""
    for number, box in enumerate(boxes):
        for other in itertools.islice(boxes, number + 1, None):
            if box[1] and other[0][0] >= box[1][0]:
                break
            yield box, other


def overlap(box: Box, other: Box) -> bool:
    (starts, ends), (other_starts, other_ends) = box, other
    return all(map(operator.lt, map(max, starts, other_starts), map(min, ends, other_ends)))
