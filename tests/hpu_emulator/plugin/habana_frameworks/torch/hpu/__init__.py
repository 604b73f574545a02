"""The module torch.hpu, for one device with index 0."""

import contextlib
import os
import time

import torch

from habana_frameworks.torch.utils.experimental import _get_device_type, _is_fp16_supported
from habana_frameworks.torch.utils.internal import is_lazy

from . import metrics  # noqa: F401

# ---------------------------------------------------------------------------------------------------------------------
# The device
# ---------------------------------------------------------------------------------------------------------------------


def device_count():
    return int(os.environ.get("HPU_EMULATOR_DEVICES", "1"))


def is_available():
    return device_count() > 0


def current_device():
    return 0


def set_device(device):
    index = device if isinstance(device, int) else torch.device(device).index
    assert index in (None, 0), "a process has one HPU, hpu:0"


def get_device_name(device=None):
    return _get_device_type().name.removeprefix("synDevice").upper()


def get_device_capability(device=None):
    return "emulated"


def get_device_properties(device=None):
    return f"(sramBaseAddress=0, dramSize={memory_stats()['Limit']}, name={get_device_name()})"


def init():
    if not is_available():
        raise RuntimeError("synapse: no device found")


_lazy_init = init


def is_initialized():
    return True


def _is_in_bad_fork():
    return False


def is_bf16_supported():
    return True


def get_amp_supported_dtype():
    return [torch.bfloat16, torch.float16] if _is_fp16_supported() else [torch.bfloat16]


def is_autocast_hpu_enabled():
    return torch.is_autocast_enabled("hpu")


def enable_dynamic_shape():
    pass


def disable_dynamic_shape():
    pass


def get_dynamic_shape_status():
    return False


@contextlib.contextmanager
def device(device):
    set_device(device)
    yield


# ---------------------------------------------------------------------------------------------------------------------
# Order of work
# ---------------------------------------------------------------------------------------------------------------------


def synchronize():
    torch.ops.hpu_emulator.synchronize()


class Stream:
    """A stream. All streams stand for the same one, so all work is in one order. `is_default`: the device's own."""

    def __init__(self, device=None, priority=0, is_default=False):
        self.is_default = is_default

    def synchronize(self):
        synchronize()

    def query(self):
        return True

    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event


def current_stream(device=None):
    return Stream(is_default=True)


default_stream = current_stream


@contextlib.contextmanager
def stream(stream):
    yield


LONGEST_QUEUE_MS = 0.01  # by which the longest of an interval's queues exceeds the mean


class Event:
    """An event that is stricter than the plugin's: its time is known only after the host has waited for it.

    Its clock is that of the longest of several queues, as the plugin's is: the time between two events that are not
    neighbours is less than the sum of the times between neighbours.
    """

    def __init__(self, enable_timing=False):
        self._timing, self._work, self._asked = enable_timing, None, False

    def record(self, stream=None):
        self._asked = False
        self._work = torch.ops.hpu_emulator.record_event(self._work is None)
        self._time = time.perf_counter()

    def wait(self, stream=None):
        pass

    def query(self):
        """Says whether the event has taken place: not when it is first asked about work that may be unfinished."""
        if self._work is None or self._work <= torch.ops.hpu_emulator.completed():
            return True
        if not self._asked:
            self._asked = True
            return False
        torch.ops.hpu_emulator.wait_for(self._work, False)
        return True

    def synchronize(self):
        """Waits for the event. Meanwhile, no thread can record one."""
        if self._work is not None:
            torch.ops.hpu_emulator.wait_for(self._work, True)

    def elapsed_time(self, end):
        """Returns the milliseconds to a later event. Raises RuntimeError before the host has waited for both."""
        if not (self._timing and end._timing):
            raise RuntimeError("both events need enable_timing=True")
        if self._work is None or end._work is None or end._work > torch.ops.hpu_emulator.completed():
            raise RuntimeError("the events have not taken place yet: synchronize first")
        return 1000 * (end._time - self._time) + LONGEST_QUEUE_MS

    def __del__(self):
        if self._work is not None:
            torch.ops.hpu_emulator.free_event()


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def memory_stats(device=None):
    counters = torch.ops.hpu_emulator.counters()
    active = counters["allocations"] - counters["frees"]
    return {
        "Limit": counters["memory_limit"],
        "InUse": counters["memory"],
        "MaxInUse": counters["peak_memory"],
        "NumAllocs": counters["allocations"],
        "NumFrees": counters["frees"],
        "ActiveAllocs": active,
        "MaxAllocSize": counters["largest_allocation"],
        "TotalSystemAllocs": counters["allocations"],
        "TotalSystemFrees": counters["frees"],
        "TotalActiveAllocs": active,
    }


def memory_allocated(device=None):
    return memory_stats()["InUse"]


def max_memory_allocated(device=None):
    return memory_stats()["MaxInUse"]


def memory_reserved(device=None):
    return memory_stats()["Limit"]


max_memory_reserved = memory_reserved


def mem_get_info(device=None):
    stats = memory_stats()
    return stats["Limit"] - stats["InUse"], stats["Limit"]


def reset_peak_memory_stats(device=None):
    torch.ops.hpu_emulator.reset_peak_memory()


def reset_accumulated_memory_stats(device=None):
    pass


def memory_summary(device=None):
    return "\n".join(f"{name}: {value}" for name, value in memory_stats().items())


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------------------------------


def manual_seed(seed):
    torch.ops.hpu_emulator.seed(seed)


manual_seed_all = manual_seed


def get_rng_state(device="hpu"):
    return torch.ops.hpu_emulator.rng_state()


def set_rng_state(new_state, device="hpu"):
    torch.ops.hpu_emulator.set_rng_state(new_state)


if is_lazy():
    from .graphs import HPUGraph, ModuleCacher, graph, make_graphed_callables, wrap_in_hpu_graph  # noqa: F401
