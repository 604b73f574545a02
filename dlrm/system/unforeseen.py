"""The last resort of a program: one line on an error that nobody foresaw."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback


def report_unforeseen(program: str, error: Exception) -> int:
    """Prints one line on stderr, and writes the traceback to a file. Returns the exit status, 1.

    With DLRM_TRACEBACK=1 in the environment, raises the error again instead. If standard output is closed, as by
    `| head -1`, there is no traceback worth a file.
    """
    if os.environ.get("DLRM_TRACEBACK") == "1":
        raise error
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or else Python complains as it flushes the rest of the output
        sys.stderr.write(f"{program}: error: standard output was closed\n")
        return 1
    message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    sys.stderr.write(f"{program}: error: {message} ({where_traceback_is(error)})\n")
    return 1


def where_traceback_is(error: Exception) -> str:
    """Writes the traceback to a new file, and says where it is."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="dlrm-traceback-", suffix=".txt", delete=False) as file:
            file.write("".join(traceback.format_exception(error)))
        return f"the traceback is in {file.name}; DLRM_TRACEBACK=1 prints it"
    except OSError:
        return "DLRM_TRACEBACK=1 prints the traceback"
