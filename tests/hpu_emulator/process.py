"""Processes that have an emulated Gaudi. A device is there for a whole process, so that of the tests never loads it.

This module must not import torch: the variables that torch and the plugin read come first.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent
PATHS = [str(EMULATOR / "plugin"), str(EMULATOR.parent), str(EMULATOR.parent.parent)]
MODES = {"eager": "0", "compile": "0", "lazy": "1", None: None}


def variables(mode: str | None = "eager", release: str = "1.23", copies: str = "now", **others: str | None) -> dict:
    """The environment variables of an emulated Gaudi; those that are None must not be set.

    mode      eager, compile or lazy; None leaves PT_HPU_LAZY_MODE unset, and the choice to the release
    release   of the plugin: 1.23 (eager unless told otherwise), 1.19 (lazy unless told otherwise), or 1.15 (too old)
    copies    when a non_blocking copy from pinned memory reads that memory:
              now       at once
              late      just before the next work on the device, or when the host waits for the device
              checked   at once, and RuntimeError when the host waits, if the memory has changed by then
    others    of any name; those of the emulator are in README.md
    """
    return {
        "PT_HPU_LAZY_MODE": MODES[mode],
        "HPU_EMULATOR_COPIES": copies,
        "PYTHONPATH": os.pathsep.join([str(EMULATOR / "releases" / release), *PATHS]),
        **others,
    }


def environment(*args, **kwargs) -> dict[str, str]:
    """For `subprocess.run(env=...)`; arguments as of `variables`."""
    return {name: value for name, value in (os.environ | variables(*args, **kwargs)).items() if value is not None}


class EmulatedGaudi(ProcessPoolExecutor):
    """A process with an emulated Gaudi, in which to call functions that are importable by name, one after the other."""

    def __init__(self, *args, **kwargs):
        """Arguments as of `variables`."""
        spawn = multiprocessing.get_context("spawn")
        super().__init__(1, mp_context=spawn, initializer=_enter, initargs=(variables(*args, **kwargs),))

    def run(self, function: Callable, *args, timeout: float = 300, **kwargs):
        """What `function(*args, **kwargs)` returns or raises there."""
        return self.submit(function, *args, **kwargs).result(timeout)


def _enter(environment: dict) -> None:
    assert "torch" not in sys.modules, "torch is there before its variables are"
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    import habana_frameworks.torch  # noqa: F401


def on_gaudi(*modes: str | None, **settings) -> Callable:
    """Decorates a test so that its body runs on an emulated Gaudi, once in each mode; the mode is an argument of the
    test if it wants it. Settings are as of `variables`."""

    def decorate(test: Callable) -> Callable:
        parameters = inspect.signature(test).parameters

        def call(mode, **arguments):
            if "mode" in parameters:
                arguments["mode"] = mode
            shared_gaudi(mode, **settings).run(_run_body, test.__module__, test.__name__, arguments)

        mode = inspect.Parameter("mode", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        call.__signature__ = inspect.Signature([mode, *(p for name, p in parameters.items() if name != "mode")])
        call.__name__, call.__doc__, call.__module__, call.body = test.__name__, test.__doc__, test.__module__, test
        return pytest.mark.parametrize("mode", modes)(call)

    return decorate


def shared_gaudi(mode: str | None, copies: str = "now", **settings) -> EmulatedGaudi:
    """The one process for all who ask for these settings, which are as of `variables`; to a device, eager and compile
    mode are the same."""
    gaudi = _started("eager" if mode == "compile" else mode, **settings)
    gaudi.run(_start_afresh, copies)
    return gaudi


_started = functools.cache(EmulatedGaudi)


def _start_afresh(copies: str) -> None:
    import torch

    torch.ops.hpu_emulator.set_copies(copies)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # it compiles a function anew a few times, then no more


def _run_body(module: str, name: str, arguments: dict) -> None:
    getattr(importlib.import_module(module), name).body(**arguments)
