"""Which results.json files stand for the runs under a path."""

import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

RESULTS = "results.json"
VERSION = re.compile(r"version_(\d+)")
SEED = re.compile(r"seed[_-]?\d+")


def find_results(paths: Sequence[Path]) -> list[Path]:
    """The newest results.json of each run folder under the given paths, or the files themselves.

    Raises:
        ValueError: if a path holds no results.
    """
    return list({file.resolve(): file for path in paths for file in newest(all_results(path), _unversioned)}.values())


def all_results(path: Path) -> list[Path]:
    """Every results.json of a run, or of all runs somewhere below a folder.

    Raises:
        ValueError: if there is none.
    """
    own = [path] if path.is_file() else [path / RESULTS]
    files = own if own[0].is_file() else sorted(path.rglob(RESULTS))
    if not files:
        reason = "holds no results.json" if path.exists() else "does not exist"
        raise ValueError(f"{str(path)!r} {reason}: give a run directory of fedlscl fit.")
    return files


def newest(files: list[Path], key: Callable[[Path], Hashable]) -> list[Path]:
    """The file of the highest version among those of equal key."""
    kept = {key(file): file for file in sorted(files, key=_version)}
    return [file for file in files if file in kept.values()]


def run_folder(path: Path) -> Path:
    """The folder that names a run: that of its results, or the one above where that is only a version or a seed.

    Example:
        >>> run_folder(Path("/runs/FedAvg/version_1/results.json")).name
        'FedAvg'
        >>> run_folder(Path("/kept/EWC/results.json")).name
        'EWC'
    """
    folder = _unversioned(path)
    return folder.parent if SEED.fullmatch(folder.name) else folder


def _unversioned(path: Path) -> Path:
    folder = path.resolve().parent
    return folder.parent if VERSION.fullmatch(folder.name) else folder


def _version(path: Path) -> int:
    number = VERSION.fullmatch(path.resolve().parent.name)
    return -1 if number is None else int(number[1])
