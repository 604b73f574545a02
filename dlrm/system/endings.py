"""How programs end: by one line on stderr, whatever went wrong, and an exit status that tells of what kind it is."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator

from dlrm.errors import RunError, UsageError
from dlrm.system.files import reason_of


def mend_streams() -> None:
    """Opens the standard streams that are closed, and lets them take any text. To be called first in a program.

    The next file that is opened would otherwise become standard output or standard error. Texts may have characters
    that the encoding of a terminal lacks, and file names that are no text at all.
    """
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            give_to_nobody(descriptor)
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))
    if sys.stdout is sys.__stdout__:
        encoding = sys.stdout.encoding
        sys.stdout = sys.__stdout__ = StandardOutput(sys.stdout.detach(), encoding)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


class StandardOutput(io.TextIOWrapper):
    """Raises RunError if standard output cannot be written, as a reader has gone or the disk is full.

    What is left to write then goes to nobody: Python would complain about it when it ends.
    """

    def write(self, text: str) -> int:
        with self._failures_named():
            return super().write(text)

    def flush(self) -> None:
        with self._failures_named():
            super().flush()

    @contextlib.contextmanager
    def _failures_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            give_to_nobody(self.fileno())
            raise RunError(f"cannot write to standard output: {reason_of(error)}") from None


def give_to_nobody(descriptor: int) -> None:
    """Lets a file descriptor lead to the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def end_by(program: str, error: Exception) -> int:
    """Prints one line about an error that ends a program. Returns the exit status: 2 for a UsageError, otherwise 1.

    For an error that nobody foresaw, writes the traceback to a file. With DLRM_TRACEBACK=1 in the environment, raises
    such an error again instead.
    """
    if isinstance(error, UsageError | RunError):
        print_error(program, str(error))
    elif message := out_of_memory(error):
        print_error(program, message)
    elif os.environ.get("DLRM_TRACEBACK") == "1":
        raise error
    else:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print_error(program, f"{message} ({where_traceback_is(error)})")
    return 2 if isinstance(error, UsageError) else 1


def print_error(program: str, message: str) -> None:
    """Prints a line on stderr, at once, since other ranks may write, too. Names in a message may have line breaks."""
    line = message.replace("\n", r"\n")
    sys.stderr.write(f"{program}: error: {line}\n")


def out_of_memory(error: Exception) -> str:
    """Returns a message if memory was refused by the system or by the device, or an empty text for other errors."""
    text = str(error)
    if wanted := re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", text):
        return f"out of memory: the system refused {int(wanted[1]) / 2**30:,.3f} GiB"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {text.splitlines()[0] if text else 'the system refused more'}"
    return ""


def where_traceback_is(error: Exception) -> str:
    """Writes the traceback to a new file, and says where it is."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="dlrm-traceback-", suffix=".txt", delete=False) as file:
            file.write("".join(traceback.format_exception(error)))
        return f"the traceback is in {file.name}; DLRM_TRACEBACK=1 prints it"
    except OSError:
        return "DLRM_TRACEBACK=1 prints the traceback"
