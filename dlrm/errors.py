"""The errors that end a run with one line on stderr instead of a traceback."""


class UsageError(Exception):
    """A flag, or a combination of flags, that cannot work. The exit status is 2."""


class RunError(Exception):
    """A run that cannot go on. The exit status is 1."""


class LocalError(RunError):
    """A `RunError` on one rank, which prints it even if it is not rank 0, because no other rank knows of it."""
