"""The command line over LightningCLI, which starts in ``app``: commands, errors in one line, and ``report``."""

import argparse
import errno
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from fedlscl.cli.paths import expand_paths

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


class Parser(argparse.ArgumentParser):
    """Errors take one line, with the usage."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}: {self.usage}.")

    @override
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given, rest = super().parse_known_args(args, namespace)
        return expand_paths(given), rest


def report(arguments: list[str]) -> None:
    """Print one table over runs, or write the whole report into a folder."""
    parser = Parser(usage="fedlscl report RUN [RUN ...] [--out DIR]", description="Compare runs.", allow_abbrev=False)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="run folder, folder of several runs, or results.json."
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="write tables, figures and index.html there; otherwise print one table."
    )
    given = parser.parse_args(arguments)
    if given.out is None:
        from fedlscl.report.table import print_comparison

        print_comparison(given.runs)
        return
    # Here, since matplotlib takes a second to load.
    from fedlscl.report.page import write_report

    for path in write_report(given.runs, given.out):
        print(path)
