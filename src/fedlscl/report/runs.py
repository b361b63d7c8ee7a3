"""Finished runs on disk: which results.json files stand for the runs under a path, and what is in them."""

import csv
import json
import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedlscl.callbacks.results import SCHEMA
from fedlscl.federated.metrics import MASKS, PHASES, matrix_rows

RESULTS, MATRIX, COSTS, CONFIG = "results.json", "matrix.csv", "costs.json", "config.yaml"
VERSION = re.compile(r"version_(\d+)")
SEED = re.compile(r"seed[_-]?\d+")
SCHEMA_1_MASKS = {"task": "task_il", "seen": "class_il"}
"""Names of the masks in results.json of schema 1."""


@dataclass(frozen=True)
class Run:
    """One results.json, and the files beside it."""

    path: Path
    results: dict[str, Any]
    costs: dict[str, Any] | None
    config: str | None
    """Text of config.yaml."""

    @property
    def name(self) -> str:
        """Name of the run's folder without a seed at its end: FedAvg of FedAvg-seed42."""
        return re.sub(rf"[-_]seed[-_]?{self.seed}$", "", run_folder(self.path).name)

    @property
    def seed(self) -> int:
        """Seed of split and training."""
        return self.results["seed"]

    @property
    def tasks(self) -> int:
        """Finished tasks."""
        return self.results["tasks_done"]

    @property
    def goal(self) -> int:
        """Tasks after which the run is finished: those of its data, or trainer.max_tasks."""
        return self.results["data"]["num_tasks"]

    @property
    def planned(self) -> int:
        """Tasks of its data; the same as `goal` if there is no config.yaml."""
        known = self.options.get("data.num_tasks")
        return max(self.goal, known if isinstance(known, int) else 0)

    @cached_property
    def options(self) -> dict[str, Any]:
        """config.yaml by dotted names; without the file, method and trainer of results.json."""
        given = yaml.safe_load(self.config) if self.config else {n: self.results[n] for n in ("method", "trainer")}
        return dict(_flat(given))

    def matrix(self, mask: str) -> np.ndarray:
        """Accuracies (clients, after task, on task) of finished tasks, NaN above the diagonal."""
        return np.array(self.results["accuracy"]["after"][mask], dtype=float)[:, : self.tasks, : self.tasks]

    def client_averages(self, mask: str) -> np.ndarray:
        """Mean accuracy of each client over all tasks after the last one, (clients,)."""
        return self.matrix(mask)[:, -1].mean(1)

    @property
    def commits(self) -> list[str]:
        """Commits of the package in the sessions that worked on the run, where recorded."""
        return list(dict.fromkeys(session["commit"] for session in self.sessions if session.get("commit")))

    @property
    def devices(self) -> list[str]:
        """Devices of the sessions that worked on the run."""
        return list(dict.fromkeys(session["device"] for session in self.sessions))

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """Entries of costs.json, one per process."""
        return (self.costs or {}).get("sessions", [])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs under the given paths; if a run folder holds several versions, the newest of each seed.

    Raises:
        ValueError: if a path holds no results, or a file cannot be read.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        read = {file: read_run(file) for file in all_results(path)}
        kept = newest(list(read), lambda file, read=read: (run_folder(file), read[file].seed))
        runs |= {file.resolve(): read[file] for file in kept}
    return list(runs.values())


def left_out(paths: Sequence[Path], runs: Sequence[Run]) -> list[str]:
    """One sentence each for older versions that ``runs`` does not have, and for run folders without results so far."""
    files = {file.resolve() for path in paths for file in all_results(path)} - {run.path.resolve() for run in runs}
    configs = {file.resolve() for path in paths if path.is_dir() for file in path.rglob(CONFIG)}
    empty = [file for file in configs if VERSION.fullmatch(file.parent.name) and not file.with_name(RESULTS).exists()]
    named = {"Older versions of the same seed": files, "Runs without a finished task so far": empty}
    return [
        f"{what}, left out: {', '.join(f'{run_folder(file).name}/{file.parent.name}' for file in sorted(found))}."
        for what, found in named.items()
        if found
    ]


def find_results(paths: Sequence[Path]) -> list[Path]:
    """The newest results.json of each run folder under the given paths, or the files themselves.

    Raises:
        ValueError: if a path holds no results.
    """
    return list({file.resolve(): file for path in paths for file in newest(all_results(path), _unversioned)}.values())


def all_results(path: Path) -> list[Path]:
    """Every results.json of a run, or of all runs below a folder.

    Raises:
        ValueError: if there is none.
    """
    own = path if path.is_file() else path / RESULTS
    files = [own] if own.is_file() else sorted(path.rglob(RESULTS))
    if not files:
        reason = "holds no results.json" if path.exists() else "does not exist"
        raise ValueError(f"{str(path)!r} {reason}: give a run directory of fedlscl fit.")
    return files


def newest(files: list[Path], key: Callable[[Path], Hashable]) -> list[Path]:
    """The file of the highest version among those of equal key."""

    def version(path: Path) -> int:
        number = VERSION.fullmatch(path.resolve().parent.name)
        return -1 if number is None else int(number[1])

    kept = {key(file): file for file in sorted(files, key=version)}
    return [file for file in files if file in kept.values()]


def run_folder(path: Path) -> Path:
    """The folder that names a run: that of its results, or its parent if that is only a version or a seed.

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


NEEDED = ("seed", "method", "trainer", "data", "foundation", "versions", "tasks_done", "accuracy", "summary", "traffic")
PER_TASK = ("average", "worst_client", "current", "forgetting", "backward_transfer", "average_before_aggregation")
"""Figures of the summary under each mask; the last is None if nothing was measured."""
TYPES: dict[str, type] = {
    **dict.fromkeys(("seed", "tasks_done", "trainer.rounds_per_task"), int),
    **dict.fromkeys(("data.num_clients", "data.num_tasks", "traffic.up_bytes", "traffic.down_bytes"), int),
    **dict.fromkeys(
        ("method.name", "trainer.precision", "trainer.server_every", "data.dataset", "data.fingerprint"), str
    ),
    **dict.fromkeys(("method.fields", "versions"), dict),
    **dict.fromkeys(("data.classes", "summary", "traffic.up"), list),
}


def read_run(path: Path) -> Run:
    """A run by its results.json, with costs and configuration if they lie beside it.

    Raises:
        ValueError: if a file is damaged, of a newer version, or without a finished task.
    """
    results = read_json(path)
    missing = [name for name in NEEDED if name not in results]
    if missing:
        raise ValueError(f"{str(path)!r} holds no {missing[0]!r}: give a results.json of fedlscl fit.")
    schema = results.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ValueError(f"{str(path)!r} has schema {schema}, newer than {SCHEMA}: update fedlscl.")
    if not results["summary"]:
        raise ValueError(f"{str(path)!r} holds no finished task: continue the run, or leave it out.")
    old_names = SCHEMA_1_MASKS if schema < 2 else {}
    results = _with_new_masks(results, old_names)
    _check(path, _faults(results))
    costs, config, matrix = (path.with_name(name) for name in (COSTS, CONFIG, MATRIX))
    if matrix.is_file():
        _check_matrix(matrix, results, old_names)
    text = config.read_text(errors="replace") if config.is_file() else None
    if text is not None:
        _check_yaml(config, text)
    spent = read_json(costs) if costs.is_file() else None
    _check(costs, _cost_faults(spent or {}))
    return Run(path, results, spent, text)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        ValueError: naming the file.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}): restore it, or leave the run out.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds {type(value).__name__}: give a results.json of fedlscl fit.")
    return value


def _with_new_masks(value: Any, names: dict[str, str]) -> Any:
    """Rename the masks in ``accuracy``, ``summary`` and ``clients``: "seen" and "seen/average" of schema 1."""

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        parts = {name: name.partition("/") for name in value}
        return {
            names.get(mask, mask) + slash + rest: renamed(value[name]) for name, (mask, slash, rest) in parts.items()
        }

    keys = ("accuracy", "summary", "clients") if names else ()
    return value | {name: renamed(value[name]) for name in keys if name in value}


def _check(path: Path, faults: Iterator[str]) -> None:
    fault = next(faults, None)
    if fault is not None:
        raise ValueError(f"{str(path)!r}: {fault}: restore the file, or leave the run out.")


def _faults(results: dict[str, Any]) -> Iterator[str]:
    """Deviations from the schema; each check relies on those before it."""
    for name, kind in TYPES.items():
        value: Any = results
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            yield f"{name} must be {kind.__name__}, got {_short(value)}"
    clients, done = results["data"]["num_clients"], results["tasks_done"]
    foundation, summary, sent = results["foundation"], results["summary"], results["traffic"]["up"]
    if foundation is not None and not (isinstance(foundation, dict) and {"name", "fingerprint"} <= foundation.keys()):
        yield f"foundation must be null or have name and fingerprint, got {_short(foundation)}"
    if len(summary) != done:
        yield f"summary must have one entry per finished task ({done}), got {len(summary)}"
    for name in (f"{mask}/{figure}" for mask in MASKS for figure in PER_TASK):
        for after in summary:
            value = after.get(name, math.nan) if isinstance(after, dict) else after
            if not _is_number(value) and not (value is None and name.endswith(PER_TASK[-1])):
                yield f"summary must have a finite number under {name}, got {_short(value)}"
    for phase, mask in ((phase, mask) for phase in PHASES for mask in MASKS):
        try:
            shape = np.array(results["accuracy"][phase][mask], dtype=float).shape
        except (ValueError, TypeError, KeyError):
            shape = ()
        if len(shape) != 3 or shape[0] != clients or min(shape[1:]) < done:
            yield f"accuracy.{phase}.{mask} must be (clients, tasks, tasks) for {clients} clients, got shape {shape}"
    if len(sent) != clients or not all(_has_lists(client) and len(client) >= done for client in sent):
        yield f"traffic.up must have lists for {done} tasks of each of {clients} clients, got {_short(sent)}"
    # Files of the first versions have neither.
    counts, rejected = results.get("parameters", {"foundation": 0}), results.get("quarantined", [])
    names = ("trainable", "total") if "parameters" in results else ()
    if not isinstance(counts, dict) or not all(_has_ints(counts.get(name)) for name in names):
        yield f"parameters must have trainable and total of each client, got {_short(counts)}"
    if not isinstance(counts.get("foundation"), int):
        yield f"parameters.foundation must be int, got {_short(counts.get('foundation'))}"
    for upload in rejected if isinstance(rejected, list) else [rejected]:
        named = upload if isinstance(upload, dict) else {}
        if not {"client", "reason"} <= named.keys() or not _has_ints([named.get("task"), named.get("round")]):
            yield f"quarantined must have client, task, round and reason, got {_short(upload)}"


def _cost_faults(costs: dict[str, Any]) -> Iterator[str]:
    sessions = costs.get("sessions", [])
    for session in sessions if isinstance(sessions, list) else [sessions]:
        if not isinstance(session, dict) or not {"device", "started", "ended"} <= session.keys():
            yield f"sessions must have device, started and ended, got {_short(session)}"
    for name in ("total_seconds", "images"):
        if not _is_number(costs.get(name, 0)):
            yield f"{name} must be a finite number, got {_short(costs[name])}"


def _has_lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and (not row or _has_ints(row)) for row in value)


def _has_ints(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, int) for entry in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_matrix(path: Path, results: dict[str, Any], old_names: dict[str, str]) -> None:
    with path.open(newline="") as file:
        rows = [row | {"mask": old_names.get(row.get("mask", ""), row.get("mask"))} for row in csv.DictReader(file)]
    if rows != [{name: str(value) for name, value in row.items()} for row in matrix_rows(results["accuracy"])]:
        raise ValueError(f"{str(path)!r} does not hold the accuracies of the {RESULTS} beside it: restore both.")


def _check_yaml(path: Path, text: str) -> None:
    try:
        is_mapping = isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        is_mapping = False
    if not is_mapping:
        raise ValueError(f"{str(path)!r} is not a configuration in YAML: restore it, or leave the run out.")
