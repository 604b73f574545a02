"""Processes that have an emulated Gaudi.

A device stays registered for the life of a process, so the process of the tests never loads it. This module must not
import torch, because the environment variables that torch and the plugin read must be set before that.
"""

from __future__ import annotations

import functools
import importlib.util
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
    """Returns the environment variables of an emulated Gaudi. Those whose value is None must not be set.

    mode      eager, compile or lazy; None leaves PT_HPU_LAZY_MODE unset, so that the release chooses the mode
    release   the plugin's release: 1.23 (eager by default), 1.19 (lazy by default) or 1.15 (too old)
    copies    when a non_blocking copy from pinned memory reads that memory:
              now       at once
              late      just before the next work on the device, or when the host waits for the device
              checked   at once; raises RuntimeError when the host waits, if the memory has changed by then
    others    variables of any other name; README.md lists those of the emulator
    """
    _skip_if_torch_knows_no_hpu()
    return {
        "PT_HPU_LAZY_MODE": MODES[mode],
        "HPU_EMULATOR_COPIES": copies,
        "PYTHONPATH": os.pathsep.join([str(EMULATOR / "releases" / release), *PATHS]),
        **others,
    }


def _skip_if_torch_knows_no_hpu() -> None:
    torch = Path(importlib.util.find_spec("torch").origin).parent
    if not (torch / "include/ATen/detail/HPUHooksInterface.h").exists():
        pytest.skip("this torch has no hooks for an hpu device: 2.5 has them in Intel's own build alone")


def environment(*args, **kwargs) -> dict[str, str]:
    """Returns an environment for `subprocess.run(env=...)`. The arguments are those of `variables`."""
    return {name: value for name, value in (os.environ | variables(*args, **kwargs)).items() if value is not None}


class EmulatedGaudi(ProcessPoolExecutor):
    """A process with an emulated Gaudi. It calls functions that can be imported by name, one after the other."""

    def __init__(self, *args, **kwargs):
        """The arguments are those of `variables`."""
        spawn = multiprocessing.get_context("spawn")
        super().__init__(1, mp_context=spawn, initializer=_enter, initargs=(variables(*args, **kwargs),))

    def run(self, function: Callable, *args, timeout: float = 300, **kwargs):
        """Calls `function(*args, **kwargs)` in the process, and returns or raises what it returns or raises."""
        return self.submit(function, *args, **kwargs).result(timeout)


def _enter(environment: dict) -> None:
    assert "torch" not in sys.modules, "torch was imported before its environment variables were set"
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    import habana_frameworks.torch  # noqa: F401


def on_gaudi(*modes: str | None, **settings) -> Callable:
    """Returns a decorator that makes the body of a test run on an emulated Gaudi, once in each mode.

    The test may have an argument `mode`. The settings are those of `variables`.
    """

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
    """Returns a process with an emulated Gaudi, the same one for all callers with the same settings.

    The settings are those of `variables`. A device works alike in eager and compile mode, so both share a process.
    """
    gaudi = _started("eager" if mode == "compile" else mode, **settings)
    gaudi.run(_start_afresh, copies)
    return gaudi


_started = functools.cache(EmulatedGaudi)


def _start_afresh(copies: str) -> None:
    import torch

    torch.ops.hpu_emulator.set_copies(copies)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # torch stops recompiling a function after a few times


def _run_body(module: str, name: str, arguments: dict) -> None:
    getattr(importlib.import_module(module), name).body(**arguments)
