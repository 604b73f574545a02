"""Checkpoints of several ranks: folders, which torch.distributed.checkpoint (DCP) writes.

Each rank writes the shards of tensors that it has, each to a file of its own. If several ranks have the same shard, one
of them writes it. `manifest.pt` is written last. It holds all that is no tensor, the place of each file's shard in its
tensor, and the SHA-256 of each file. Any number of ranks, with any placement, reads the rows and columns that it needs.

DCP's own tools read the folder, too. Their index, `.metadata`, is a pickle, which can hold code. So this trainer reads
the manifest, which holds plain data, and of `.metadata` only the SHA-256.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dlrm.checkpoint.archive import (
    RUN_KEYS,
    HashingFile,
    hash_of,
    hashing,
    hint,
    load_plain,
    read_file,
    save_plain,
    write_sealed,
)
from dlrm.checkpoint.file import Shard, slices
from dlrm.checkpoint.location import MANIFEST, UNFINISHED, discard, is_checkpoint_folder, not_written, put_in_place
from dlrm.checkpoint.values import check_manifest, check_run, is_dense
from dlrm.errors import RunError
from dlrm.system.files import reason_of, sync_folder, synced, temporary_path

# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_folder(path: str, run: dict[str, Any], shards: Iterable[Shard], host: dist.ProcessGroup) -> None:
    """Writes a checkpoint folder. The checkpoint at `path` becomes `path`.previous.

    Every rank of the group `host` must call this, with its own `shards`. `run` is all that is no tensor; rank 0's is
    written. Raises RunError, on every rank, if the folder cannot be written. The checkpoints on the disk then stay as
    they were.
    """
    state = {MetadataIndex(shard.name, shard.offsets): shard for shard in shards}
    planner = ShardPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    temporary = temporary_path_of_all_ranks(path, host)
    try:
        dcp.save(state, storage_writer=FolderWriter(temporary, path, run), planner=planner, process_group=host)
    except CheckpointException as error:  # the same on all ranks
        reason, _ = next(iter(error.failures.values()))
        if not isinstance(reason, OSError | RunError):
            raise
        if dist.get_rank() == 0:
            discard(temporary)
        raise not_written(path, reason) if isinstance(reason, OSError) else reason from None


def temporary_path_of_all_ranks(path: str, host: dist.ProcessGroup) -> str:
    """Returns a name beside `path` that no other file has, the same one on all ranks of the group `host`."""
    chosen = [str(temporary_path(path)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen, src=0, group=host)
    return chosen[0]


class ShardPlanner(DefaultSavePlanner):
    """Plans the writing of a state {index: Shard}.

    DCP checks that shards cover their tensors, and has one rank write a shard that several ranks have.
    """

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([to_write(index, shard) for index, shard in self.state_dict.items()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Adds the place of each tensor in a state dict, without which the tools of torch 2.7's DCP read nothing."""
        plans, metadata = super().create_global_plan(all_plans)
        metadata.planner_data = {name: (name,) for name in metadata.state_dict_metadata}
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index].tensor


def to_write(index: MetadataIndex, shard: Shard) -> WriteItem:
    properties = TensorProperties(dtype=shard.tensor.dtype)
    data = TensorWriteData(chunk_of(shard.offsets, shard.tensor.shape), properties, torch.Size(shard.whole_shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def chunk_of(offsets: Iterable[int], shape: Iterable[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))


class HashingFileSystem(FileSystem):
    """Files that DCP writes. `hashes` is the SHA-256 of each, by name."""

    def __init__(self):
        self.hashes = {}

    @contextlib.contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[HashingFile]:
        with super().create_stream(path, mode) as file, hashing(file) as hashing_file:
            yield hashing_file
        self.hashes[path.name] = hashing_file.sha256()


class FolderWriter(dcp.FileSystemWriter):
    """Writes to the folder `temporary`, which becomes `path` when all ranks are done."""

    def __init__(self, temporary: str, path: str, run: dict[str, Any]):
        super().__init__(temporary)
        self._final_path, self._run = path, run
        self.fs = HashingFileSystem()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Makes the folder. DCP calls this on all ranks before any of them writes."""
        if dist.get_rank() == 0:
            os.mkdir(self.path)
            with synced(self.path / UNFINISHED):
                pass
        return plan

    def write_data(self, plan: SavePlan, planner: ShardPlanner) -> Future:
        """Writes the shards of this rank's plan, each to a file of its own, one after the other.

        Returns the results, each with the SHA-256 of its file.
        """
        future, written = Future(), []
        for number, item in enumerate(plan.items):
            name = f"{plan.storage_data.prefix}{number}.distcp"
            with self.fs.create_stream(self.path / name, "wb") as file:
                save_plain(on_host(planner.lookup_object(item.index)), file)
                size = file.tell()
                file.flush()
                os.fsync(file.fileno())
            written.append((WriteResult(item.index, size, _StorageInfo(name, 0, size)), self.fs.hashes[name]))
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list]) -> None:
        """Writes the manifest and gives the folder its name. DCP calls this on rank 0 when all ranks have written."""
        super().finish(metadata, [[result for result, _ in results_of_rank] for results_of_rank in results])
        written = [entry for results_of_rank in results for entry in results_of_rank]
        files = {result.index: result.storage_data.relative_path for result, _ in written}
        hashes = {files[result.index]: sha256 for result, sha256 in written}
        manifest = {
            "tensors": {name: described(name, saved, files) for name, saved in metadata.state_dict_metadata.items()},
            "files": hashes | {".metadata": self.fs.hashes[".metadata.tmp"]},
        }
        write_sealed(self.path / MANIFEST, self._run | manifest)
        os.unlink(self.path / UNFINISHED)
        sync_folder(self.path)
        put_in_place(str(self.path), self._final_path)


def on_host(tensor: Tensor) -> Tensor:
    """Returns a tensor on the host with no more storage than its elements take, as all of that would be saved."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() else tensor.clone()


def described(name: str, saved: TensorStorageMetadata, files: dict[MetadataIndex, str]) -> dict[str, Any]:
    """Returns what the manifest says of a tensor: its shape, and the offsets, shape and file of each shard."""
    shards = [
        (tuple(chunk.offsets), tuple(chunk.sizes), files[MetadataIndex(name, chunk.offsets)]) for chunk in saved.chunks
    ]
    return {"shape": tuple(saved.size), "shards": shards}


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class CheckpointFolder:
    """A checkpoint folder.

    `state` is all that its manifest holds.
    """

    def __init__(self, path: str, rank: int, ranks: int):
        """Opens a checkpoint. Each of the `ranks` verifies its share of the files.

        Raises RunError, which names the file that is damaged.
        """
        self._path = Path(path)
        self.state = read_manifest(self._path)
        self._tensors = self.state["tensors"]
        for number, (name, sha256) in enumerate(sorted(self.state["files"].items())):
            if number % ranks == rank:
                self._verify(name, sha256)

    def _verify(self, name: str, sha256: str) -> None:
        try:
            with open(self._path / name, "rb") as file:
                found = hash_of(file, (self._path / name).stat().st_size).hexdigest()
        except OSError as error:
            raise RunError(f"cannot read {str(self._path / name)!r}: {reason_of(error)}") from None
        if found != sha256:
            raise RunError(f"{str(self._path / name)!r} is damaged{hint(self._path)}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by name. A moment has the name of its weight and `.sum` or `.momentum`."""
        return {name: saved["shape"] for name, saved in self._tensors.items()}

    def copy_to(self, shard: Shard) -> None:
        """Overwrites `shard.tensor` with what saved shards of that tensor have in common with it.

        Raises RunError, which names the file, if a file does not hold the shard that the manifest says.
        """
        saved = self._tensors[shard.name]["shards"]
        chunks = [chunk_of(offsets, shape) for offsets, shape, _ in saved]
        metadata = TensorStorageMetadata(TensorProperties(), torch.Size(shard.whole_shape), chunks)
        here = chunk_of(shard.offsets, shard.tensor.shape)
        for item in create_read_items_for_chunk_list(shard.name, metadata, [here]):
            _, size, name = saved[item.storage_index.index]
            file = str(self._path / name)
            source = load_plain(file)
            if not is_dense(source) or tuple(source.shape) != size or not source.is_floating_point():
                raise RunError(f"{file!r} is no shard of {shard.name!r} with the shape {size}")
            into = shard.tensor[slices(item.dest_offsets, item.lengths)]
            into.copy_(source[slices(item.storage_offsets, item.lengths)])


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns what the manifest of a checkpoint folder holds. Raises RunError, which names the manifest or folder."""
    if not is_checkpoint_folder(path):
        raise RunError(f"{str(path)!r} is a folder without {MANIFEST}: no checkpoint, or one that was not finished")
    try:
        state = read_file(str(path / MANIFEST), RUN_KEYS | {"tensors", "files"})
        check_run(str(path / MANIFEST), state)
        check_manifest(str(path / MANIFEST), state["files"], state["tensors"])
    except RunError as error:
        raise RunError(f"{error}{hint(path)}") from None
    return state
