"""Marks of steps. In lazy mode, a step gathers work and `mark_step` starts that work."""

import logging

import torch

from habana_frameworks.torch.utils.internal import is_lazy

_closures = []

if not is_lazy():
    logging.getLogger(__name__).warning("mark_step does nothing: PT_HPU_LAZY_MODE is 0")


def mark_step(device_str="", sync=False):
    if not is_lazy():
        return
    torch.ops.hpu_emulator.mark_step(sync)
    closures = _closures[:]
    _closures.clear()
    for closure, args in closures:
        closure(*args)


def iter_mark_step(device_str=""):
    mark_step(device_str)


def add_step_closure(closure, args=()):
    """Runs `closure(*args)` once, after the next `mark_step`; never where `mark_step` does nothing."""
    if is_lazy():
        _closures.append((closure, args))


def _mark_step_if_lazy():
    mark_step()
