"""CUDA GPUs."""

from __future__ import annotations

import torch

from dlrm.devices.accelerator import AcceleratorBackend
from dlrm.errors import UsageError
from dlrm.options import Options


class CudaBackend(AcceleratorBackend):
    """A CUDA GPU."""

    wide_dtype = torch.float64
    times_phases = True
    process_group = "nccl"

    def __init__(self, options: Options, local_rank: int = 0):
        """Takes the GPU whose number is `local_rank`. Raises UsageError if torch finds no GPU."""
        if not torch.cuda.is_available():
            raise UsageError("--device=cuda: torch finds no CUDA GPU here; use --device=cpu")
        super().__init__(torch.device("cuda", local_rank), options)
        torch.cuda.set_device(self.device)  # events go to the current device's stream

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def timestamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait_for(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def memory_limit(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def memory_in_use(self) -> tuple[int, int]:
        return torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
