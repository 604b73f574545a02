"""Checkpoints on a disk: whole or not there, and verified when they are read.

Of one rank it is a file: a zip archive as `torch.save` writes it; the archive's comment is the SHA-256 of the file
without that comment. Of several ranks it is a folder (`folder.py`). Tensors go straight to files, and
from their mapped pages into place: there is never a second copy of the tables in memory.
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
    """What a rank has of a tensor: all of it, or rows and columns from `offsets` on."""

    name: str
    tensor: Tensor
    offsets: tuple[int, ...]
    whole_shape: tuple[int, ...]

    @property
    def place(self) -> tuple[slice, ...]:
        """In the whole tensor."""
        return places(self.offsets, self.tensor.shape)


def places(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_file(path: str, state: dict[str, Any]) -> None:
    """The checkpoint before it becomes `path`.previous; at any moment one of the two is whole. RunError if it can't be
    written: then nothing has changed."""
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
    """A checkpoint of one rank, or of the public script."""

    def __init__(self, path: str, names: Iterable[str], verifies: bool = True):
        """`names` of the model's parameters, in their order. RunError as in `read_file`."""
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
        """Of all tensors, by name; those of moments are the parameters' with `.sum` or `.momentum`."""
        return {name: tuple(value.shape) for name, value in self._tensors.items() if isinstance(value, Tensor)}

    def copy_to(self, shard: Shard) -> None:
        saved = self._tensors[shard.name]
        if not is_dense(saved) or not saved.is_floating_point():
            raise RunError(f"{self._path!r} is no checkpoint that can be loaded: {shard.name!r} holds no numbers")
        shard.tensor.copy_(saved[shard.place])
