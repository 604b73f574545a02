"""Marks of steps. As in the plugin, the switches of passes that releases up to 1.1.1 had here are gone."""

from habana_frameworks.torch.utils.internal import is_lazy  # noqa: F401

from .step_closure import add_step_closure, iter_mark_step, mark_step  # noqa: F401
