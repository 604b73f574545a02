"""What lazy mode puts in the place of torch's functions that save and load.

`torch.save` copies all tensors to the host, and its default protocol is 4, which torch elsewhere does not read with
`weights_only`. The reader of `weights_only` has a list of its own of what a file may hold, which
`torch.serialization.safe_globals` does not extend. `torch.load` loads to the host first.
"""

import functools
import types

import torch

_save, _load = torch.save, torch.load


def replace_torchs():
    """Replaces torch's functions; `functools.wraps` leaves the old ones in `__wrapped__`, as in the plugin."""
    torch.save, torch.load = _saves_on_host, _loads_to_host
    for name in ("_load", "_legacy_load"):
        setattr(torch.serialization, name, _with_own_list(getattr(torch.serialization, name)))


@functools.wraps(_save)
def _saves_on_host(obj, f, *args, pickle_protocol=4, **settings):
    on_host = _map(lambda tensor: tensor.detach().clone().cpu(), obj)
    _save(on_host, f, *args, pickle_protocol=pickle_protocol, **settings)


@functools.wraps(_load)
def _loads_to_host(f, map_location=None, pickle_module=None, **settings):
    loaded = _load(f, map_location="cpu", pickle_module=pickle_module, **settings)
    return loaded if map_location is None else _map(lambda tensor: tensor.to(map_location), loaded)


def _map(function, value):
    """Applies `function` to all tensors in dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_map(function, item) for item in value)
    return value


class _Unpickler(torch._weights_only_unpickler.Unpickler):
    def load(self):
        allowed = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            return super().load()
        finally:
            torch.serialization.add_safe_globals(allowed)


_own = types.SimpleNamespace(
    __name__="habana_frameworks.torch.utils._weights_only_unpickler",
    Unpickler=_Unpickler,
    load=lambda file, encoding="ASCII": _Unpickler(file, encoding=encoding).load(),
)


def _with_own_list(function):
    @functools.wraps(function)
    def load(first, map_location, pickle_module, *args, **settings):
        if pickle_module.__name__ == "torch._weights_only_unpickler":
            pickle_module = _own
        return function(first, map_location, pickle_module, *args, **settings)

    return load
