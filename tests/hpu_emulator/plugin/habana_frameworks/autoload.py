"""Called by `import torch`, through the entry point of the package."""

import os


def __autoload():  # noqa: N807
    from habana_frameworks.torch.utils.internal import is_lazy

    if os.environ.get("PT_HPU_AUTOLOAD", "0" if is_lazy() else "1") == "1":
        import habana_frameworks.torch  # noqa: F401
