"""Loads the device, and registers torch.hpu, hccl and hpu_backend."""

import importlib.metadata
import os

import torch

from hpu_emulator.build import library

from .utils.internal import is_lazy

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HABANA_PROFILE", "profile_api_light")
__version__ = importlib.metadata.version("habana-torch-plugin")

torch.ops.load_library(library())
torch.ops.hpu_emulator.set_lazy(is_lazy())

from . import hpu  # noqa: E402

torch._register_device_module("hpu", hpu)

_seed_host = torch.manual_seed


def _seed_host_and_device(seed):
    hpu.manual_seed_all(int(seed))
    return _seed_host(seed)


torch.manual_seed = torch.random.manual_seed = _seed_host_and_device

from . import core  # noqa: E402, F401
from .core import serialization  # noqa: E402

if is_lazy():
    serialization.replace_torchs()

from .distributed import hccl  # noqa: E402

hccl.initialize_distributed_hpu()
