"""The command line over LightningCLI, which starts in ``app``: names of the commands, and one line for each error."""

import errno
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMANDS = ("fit", "validate", "test", "predict", "report", "methods", "doctor", "completion")
PACKAGE = str(Path(__file__).parents[1])
FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(error: Exception) -> str | None:
    """One line for a user error; None for a programming error, which keeps its traceback.

    User errors are those of the command line, a ValueError raised by this package's own checks, and any OSError.

    Example:
        >>> explain(PermissionError(errno.EACCES, "Permission denied", "runs/a"))
        "'runs/a': Permission denied."
    """
    if isinstance(error, ArgumentError):
        return str(error)
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        named = f"{error.filename!r}: {reason}" if error.filename is not None else reason
        return f"{named}: free some space, then continue with --ckpt_path last." if error.errno in FULL else f"{named}."
    # jsonargparse wraps what a constructor raises.
    cause: BaseException | None = error
    while isinstance(cause, ValueError):
        if raised_here(cause):
            return str(cause)
        cause = cause.__cause__
    return None


def raised_here(error: Exception) -> bool:
    """Whether the raise statement itself is in this package."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).split(".")[0] == "fedlscl"


@contextmanager
def brief_warnings() -> Iterator[None]:
    """Show this package's own warnings in one line, without the source line that Python adds."""
    usual = warnings.formatwarning

    def brief(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if filename.startswith(PACKAGE):
            return f"fedlscl: warning: {' '.join(str(message).split())}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = brief
    try:
        yield
    finally:
        warnings.formatwarning = usual
