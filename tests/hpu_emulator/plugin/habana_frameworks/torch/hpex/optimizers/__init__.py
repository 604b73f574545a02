from .FusedAdagrad import FusedAdagrad  # noqa: F401
