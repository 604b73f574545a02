"""The collectives of Gaudis, which gloo carries out on the memory of the emulated devices.

As in the plugin (process_group_eager_hccl.cpp and ProcessGroupHCCL.cpp of its 1.19 source), a rank whose input is empty
skips a collective, also what it would have received; an empty output is an error; and no wait ends by a timeout. In
lazy mode, a collective ends a graph.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from habana_frameworks.torch.utils.internal import is_lazy

NO_TIMEOUT = timedelta(days=30)
ALLGATHER_OPTIONS = dist.distributed_c10d.AllgatherOptions()  # torch 2.7 leaves the argument out
REDUCED_AS_THEY_ARE = (torch.float32, torch.bfloat16)  # other types are reduced as float32


def initialize_distributed_hpu(world_size=None, rank=None, local_rank=None):
    """Returns world size, rank and local rank of this process: (1, -1, -1) if no launcher started it.

    Sets the environment variables that the launcher has left out.
    """
    names = {"WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": local_rank}
    if None not in names.values():
        os.environ.update({name: str(value) for name, value in names.items()})
    if not all(name in os.environ for name in names):
        for name, open_mpi_name in (("LOCAL_RANK", "LOCAL_RANK"), ("WORLD_SIZE", "SIZE"), ("RANK", "RANK")):
            if f"OMPI_COMM_WORLD_{open_mpi_name}" in os.environ:
                os.environ[name] = os.environ[f"OMPI_COMM_WORLD_{open_mpi_name}"]
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "12345")
    world_size, rank, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", -1), ("LOCAL_RANK", -1))
    )
    if rank != -1:
        os.environ["ID"] = str(rank)
    if local_rank != -1 and world_size > 1 and "HLS_MODULE_ID" not in os.environ:
        modules = os.environ.get("HABANA_VISIBLE_MODULES")
        os.environ["HLS_MODULE_ID"] = modules.split(",")[local_rank] if modules else str(local_rank)
    return world_size, rank, local_rank


class ProcessGroupHCCL(dist.ProcessGroup):
    """A group of processes whose collectives are gloo's."""

    def __init__(self, store, rank, size, timeout):
        """`timeout` is ignored, as `wait` of the plugin does."""
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, NO_TIMEOUT)

    def getBackendName(self):
        return "hccl"

    @property
    def group_name(self):
        return dist.distributed_c10d._world.pg_names[self]

    def broadcast(self, tensors, opts):
        return self._gloo.broadcast(_recorded("broadcast", tensors), opts)

    def allreduce(self, tensors, opts):
        return self._reduce("allreduce", tensors, opts)

    def allreduce_coalesced(self, tensors, opts):
        for tensor in tensors:
            work = self._reduce("allreduce", [tensor], opts)
            work.wait()
        return work

    def reduce(self, tensors, opts):
        return self._reduce("reduce", tensors, opts)

    def _reduce(self, collective, tensors, opts):
        if not any(opts.reduceOp == op for op in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX)):
            raise RuntimeError(f"Unsupported ReduceOp {opts.reduceOp}")
        (host,) = _recorded(collective, tensors)
        if skips(host, host):
            return done([host])
        if host.dtype in REDUCED_AS_THEY_ARE:
            return getattr(self._gloo, collective)([host], opts)
        converted = host.float()
        work = getattr(self._gloo, collective)([converted], opts)
        work.wait()
        host.copy_(converted)
        return work

    def alltoall_base(self, output, input, output_splits, input_splits, opts):
        output, input = _recorded("alltoall_base", [output, input])
        if skips(input, output):
            return done([output])
        return self._gloo.alltoall_base(output, input, output_splits, input_splits, opts)

    def alltoall(self, outputs, inputs, opts):
        flat_in = torch.cat([host.flatten() for host in _recorded("alltoall", inputs)])
        hosts = _recorded("alltoall", outputs)
        flat_out = torch.cat([host.flatten() for host in hosts])
        splits = [[tensor.numel() for tensor in tensors] for tensors in (hosts, inputs)]
        work = self._gloo.alltoall_base(flat_out, flat_in, *splits, opts)
        work.wait()
        for host, part in zip(hosts, flat_out.split(splits[0]), strict=True):
            host.copy_(part.view_as(host))
        return work

    def allgather(self, outputs, inputs, opts=ALLGATHER_OPTIONS):
        hosts, (own,) = [_recorded("allgather", tensors) for tensors in outputs], _recorded("allgather", inputs)
        if skips(own, *hosts[0]):
            return done(hosts[0])
        return self._gloo.allgather(hosts, [own], opts)

    def _allgather_base(self, output, input, opts):
        output, input = _recorded("allgather_base", [output, input])
        if skips(input, output):
            return done([output])
        return self._gloo._allgather_base(output, input, opts)

    def gather(self, outputs, inputs, opts):
        return self._gloo.gather(
            [_recorded("gather", tensors) for tensors in outputs], _recorded("gather", inputs), opts
        )

    def scatter(self, outputs, inputs, opts):
        return self._gloo.scatter(
            _recorded("scatter", outputs), [_recorded("scatter", tensors) for tensors in inputs], opts
        )

    def send(self, tensors, destination, tag):
        return self._gloo.send(_recorded("send", tensors), destination, tag)

    def recv(self, tensors, source, tag):
        return self._gloo.recv(_recorded("recv", tensors), source, tag)

    def recv_anysource(self, tensors, tag):
        raise RuntimeError("recvAnysource is not supported by hccl")

    def allgather_coalesced(self, outputs, inputs, opts):
        raise RuntimeError("allgather_coalesced is not supported by hccl")

    def barrier(self, opts):
        return self._gloo.barrier(opts)


def skips(input, *outputs):
    """Says whether this rank skips a collective, without a word to the others. Raises RuntimeError for the outputs that
    the plugin asserts not to be empty."""
    if not input.numel():
        return True
    if not all(output.numel() for output in outputs):
        raise RuntimeError("output_address is null")
    return False


def done(results):
    """Returns a work that has ended."""
    future = torch.futures.Future()
    future.set_result(results)
    return torch._C._distributed_c10d._create_work_from_future(future)


def _recorded(collective, tensors):
    """Records the collective, and returns CPU tensors that share the memory of the given ones."""
    if tensors:
        torch.ops.hpu_emulator.record(f"hccl::{collective}", tensors, "")
        if is_lazy():
            torch.ops.hpu_emulator.implied_mark(f"hccl::{collective}")
    return [torch.ops.hpu_emulator.host(tensor.detach()) for tensor in tensors]


if dist.is_available() and not hasattr(dist.Backend, "HCCL"):
    dist.Backend.register_backend("hccl", ProcessGroupHCCL, devices=["hpu"])
