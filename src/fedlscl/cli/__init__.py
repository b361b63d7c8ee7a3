"""What the command line needs before torch is imported: errors in one line, paths among options, ``report``."""

import argparse
import difflib
import errno
import os
import re
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

COMMANDS = ("fit", "validate", "test", "predict", "report", "methods", "doctor", "completion")
PACKAGE = str(Path(__file__).parents[1])
PATHS = frozenset(
    "cache_dir ckpt_path config data data_root dataset default_root_dir images manifest method out root runs "
    "small_weights trainer weights".split()
)
"""Last parts of the names of options whose text is a path, as in ``--data FILE`` for a group; an option of type
`pathlib.Path` need not be named here."""


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
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{named}: free some space, then continue with --ckpt_path last." if is_full else f"{named}."
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

    def brief(message: Any, category: Any, filename: str, *line: Any) -> str:
        if filename.startswith(PACKAGE):
            return f"fedlscl: warning: {' '.join(str(message).split())}\n"
        return usual(message, category, filename, *line)

    warnings.formatwarning = brief
    try:
        yield
    finally:
        warnings.formatwarning = usual


def did_you_mean(given: str, known: Iterable[str], otherwise: str) -> str:
    """A hint for a misspelt name, in any case.

    Example:
        >>> did_you_mean("fitt", ["fit", "test"], "choose one."), did_you_mean("x", ["fit", "test"], "choose one.")
        ('did you mean fit?', 'choose one.')
    """
    names = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(given.casefold(), names, n=1)
    return f"did you mean {names[near[0]]}?" if near else otherwise


class Parser(argparse.ArgumentParser):
    """Errors take one line, with the usage; paths are expanded."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}: {self.usage}.")

    @override
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given, rest = super().parse_known_args(args, namespace)
        return expand_paths(given), rest


def expanded(path: str, name: str = "path") -> str:
    """Expand ``$NAME``, ``${NAME}``, ``~`` and ``~user``; an existing path with an unset variable stays as it is.

    Example:
        >>> os.environ["SCRATCH"] = "/scratch"
        >>> expanded("${SCRATCH}/runs"), expanded("runs/~")
        ('/scratch/runs', 'runs/~')
    """
    unset = [variable for variable in re.findall(r"\$\{?(\w+)", path) if not os.environ.get(variable)]
    if unset and not os.path.exists(path):
        raise ValueError(
            f"{name} must be a path whose variables are set, got {path!r}: set {unset[0]}, or write the path in full."
        )
    full = path if unset else os.path.expandvars(path)
    home = os.path.expanduser(full)
    if home.startswith("~") and not os.path.exists(full):
        raise ValueError(
            f"{name} must begin with the home of a known user, got {path!r}: write the path in full, or ./{full} "
            "below the current directory."
        )
    return home


def expand_paths(options: Any, name: str = "") -> Any:
    """Nested options with every path `expanded`: those named in `PATHS`, and every `pathlib.Path`."""
    if isinstance(options, argparse.Namespace):  # jsonargparse's, too
        return type(options)(**expand_paths(vars(options), name))
    if isinstance(options, dict):
        names = {key: name if key == "init_args" else f"{name}.{key}".lstrip(".") for key in options}
        return {key: expand_paths(value, names[key]) for key, value in options.items()}
    if isinstance(options, list):
        return [expand_paths(value, name) for value in options]
    if isinstance(options, Path):
        return Path(expanded(str(options), name))
    is_path = isinstance(options, str) and name.rpartition(".")[2] in PATHS
    return expanded(options, name) if is_path else options


def report(arguments: list[str]) -> None:
    """Print one table over runs, or write the whole report into a folder."""
    parser = Parser(usage="fedlscl report RUN [RUN ...] [--out DIR]", description="Compare runs.", allow_abbrev=False)
    about = "run folder, folder of several runs, or results.json."
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help=about)
    about = "write tables, figures and index.html there; otherwise print one table."
    parser.add_argument("--out", metavar="DIR", type=Path, help=about)
    given = parser.parse_args(arguments)
    if given.out is None:
        from fedlscl.report.table import print_comparison

        print_comparison(given.runs)
        return
    from fedlscl.report.page import write_report  # here, since matplotlib takes a second to load

    print(*write_report(given.runs, given.out), sep="\n")
