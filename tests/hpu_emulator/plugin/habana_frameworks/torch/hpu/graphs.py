"""Graphs of a training step, in lazy mode: work that is recorded once, and done again on the same tensors.

As in the plugin, work is done while it is recorded. Work that cannot be part of a recording raises RuntimeError:
copies between host and device, waits, marks of steps, operators that run on the host, and operators that write to a
view.
"""

import gc
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HPUGraph:
    """A recording of work."""

    def __init__(self):
        self._recorder = None

    def capture_begin(self, dry_run=False, on_default_stream=True):
        if dry_run:
            raise NotImplementedError("the emulated device has no dry runs")
        torch.ops.hpu_emulator.set_capturing(True)
        self._recorder = _Recorder(None if on_default_stream else threading.get_ident())
        self._recorder.__enter__()

    def capture_end(self):
        self._recorder.__exit__(None, None, None)
        torch.ops.hpu_emulator.set_capturing(False)

    @torch.no_grad()
    def replay(self, asynchronous=False):
        """Does the recorded work again.

        Copies the results of each operator to where they were in the recording: later operators read them there.
        """
        calls = self._recorder.calls
        torch.ops.hpu_emulator.begin_replay(_tensors([result for *_, result in calls]))
        try:
            for function, args, kwargs, recorded in calls:
                results = _tensors(function(*args, **kwargs))
                for old, new in zip(_tensors(recorded), results, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        finally:
            torch.ops.hpu_emulator.end_replay()

    def reset(self):
        self._recorder = None


class graph:
    """Records the work that is done inside the block, by default on a stream of its own."""

    def __init__(self, hpu_graph, stream=None, dry_run=False):
        self._graph, self._dry_run = hpu_graph, dry_run
        self._on_default_stream = stream is not None and stream.is_default

    def __enter__(self):
        torch.hpu.synchronize()
        gc.collect()
        self._graph.capture_begin(self._dry_run, self._on_default_stream)

    def __exit__(self, *error):
        self._graph.capture_end()


class _Recorder(TorchDispatchMode):
    """Records the calls of operators, including those of backward passes.

    `only_thread` is the one thread that has the recording's stream, unless that is the default stream, which all
    threads have.
    """

    def __init__(self, only_thread):
        super().__init__()
        self.calls, self._only_thread = [], only_thread

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._only_thread not in (None, threading.get_ident()):
            raise RuntimeError(f"{function} is not on the stream of the recording")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.is_write and any(map(_is_part, _tensors(value))):
                raise RuntimeError(f"{function} writes to a view, which is not supported during hpu graph capturing")
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result


def _tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _is_part(tensor):
    return tensor.nbytes < tensor.untyped_storage().nbytes()


def _missing(*args, **kwargs):
    raise NotImplementedError("the emulated device records only by HPUGraph and graph")


ModuleCacher = make_graphed_callables = wrap_in_hpu_graph = _missing
