"""The function that `import torch` calls, through the entry point of the package."""

import functools
import importlib.metadata
import os


@functools.cache
def is_lazy() -> bool:
    """Returns whether the plugin is in lazy mode, which is the default in release 1.19 and not in release 1.23."""
    release = tuple(map(int, importlib.metadata.version("habana-torch-plugin").split(".")))
    return os.environ.get("PT_HPU_LAZY_MODE", "1" if release < (1, 20) else "0") != "0"


def __autoload():
    if os.environ.get("PT_HPU_AUTOLOAD", "0" if is_lazy() else "1") == "1":
        import habana_frameworks.torch  # noqa: F401
