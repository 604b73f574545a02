"""Checkpoints of one rank: files, which appear whole or not at all and are verified when they are read.

A file is an archive of `torch.save` (`archive.py`). The reference script writes and reads the same format. Tensors go
straight to the file, and from its mapped pages to where they belong, so tables are never in memory a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dlrm.checkpoint.archive import read_file, write_sealed
from dlrm.checkpoint.location import discard, not_written, put_in_place
from dlrm.checkpoint.values import check_run, is_dense, is_names
from dlrm.errors import RunError
from dlrm.system.files import temporary_path


class Shard(NamedTuple):
    """The part of a tensor that one rank has: all of it, or some rows and columns, which start at `offsets`."""

    name: str
    tensor: Tensor
    offsets: tuple[int, ...]
    whole_shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The slices of the whole tensor that are this part."""
        return slices(self.offsets, self.tensor.shape)


def slices(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    """Returns the slice of each dimension that starts at its offset and has its length."""
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_file(path: str, state: dict[str, Any]) -> None:
    """Writes a checkpoint file. The checkpoint at `path` becomes `path`.previous.

    At any moment, one of the two is whole. Raises RunError if it cannot be written; the checkpoints on the disk then
    stay as they were.
    """
    temporary = str(temporary_path(path))
    try:
        write_sealed(temporary, state)
        put_in_place(temporary, path)
    except (OSError, RunError) as error:
        discard(temporary)
        raise not_written(path, error) if isinstance(error, OSError) else error from None


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class CheckpointFile:
    """A checkpoint file of this trainer or of the reference script.

    `state` is all that it holds.
    """

    def __init__(self, path: str, names: Iterable[str], verifies: bool = True):
        """Opens a checkpoint. `names` are the model's parameters in their order, by which moments are numbered.

        Verifies the file, unless another rank does that. Raises RunError, which names the file, if it is damaged or is
        no checkpoint.
        """
        self._path = path
        self.state = read_file(path, verifies=verifies)
        check_run(path, self.state)
        weights, optimizer = self.state["state_dict"], self.state["opt_state_dict"]
        moments = optimizer.get("state", {}) if isinstance(optimizer, Mapping) else None
        if not is_names(weights) or not isinstance(moments, Mapping) or not all(map(is_names, moments.values())):
            raise RunError(f"{path!r} is no checkpoint that can be loaded: its weights or moments have no names")
        self._tensors = dict(weights)
        for number, name in enumerate(names):
            self._tensors |= {f"{name}.{moment}": value for moment, value in moments.get(number, {}).items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by name. A moment has the name of its weight and `.sum` or `.momentum`."""
        return {name: tuple(value.shape) for name, value in self._tensors.items() if isinstance(value, Tensor)}

    def copy_to(self, shard: Shard) -> None:
        """Overwrites `shard.tensor` with its part of the saved tensor of that name, which has the whole shape.

        Raises RunError, which names the file, if what is saved is no tensor of real numbers.
        """
        saved = self._tensors[shard.name]
        if not is_dense(saved) or not saved.is_floating_point():
            raise RunError(f"{self._path!r} is no checkpoint that can be loaded: {shard.name!r} holds no numbers")
        shard.tensor.copy_(saved[shard.slices])
