"""A run as it lies on disk: results, costs, configuration."""

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedlscl.federated.export import matrix_rows
from fedlscl.federated.metrics import MASKS, PHASES
from fedlscl.report.finding import RESULTS, VERSION, all_results, newest, run_folder

MATRIX, COSTS, CONFIG = "matrix.csv", "costs.json", "config.yaml"
SCHEMA = 1
"""Of results.json, the newest that is understood."""
NEEDED = ("seed", "method", "trainer", "data", "foundation", "versions", "tasks_done", "accuracy", "summary", "traffic")
PER_TASK = ("average", "worst_client", "current", "forgetting", "backward_transfer", "average_before_aggregation")
"""Figures of the summary under each mask; the last is None where nothing was measured."""
TYPES: dict[str, type] = {
    **dict.fromkeys(("seed", "tasks_done", "trainer.rounds_per_task"), int),
    **dict.fromkeys(("data.num_clients", "data.num_tasks", "traffic.up_bytes", "traffic.down_bytes"), int),
    **dict.fromkeys(
        ("method.name", "trainer.precision", "trainer.server_every", "data.dataset", "data.fingerprint"), str
    ),
    **dict.fromkeys(("method.fields", "versions"), dict),
    **dict.fromkeys(("data.classes", "summary", "traffic.up"), list),
}


@dataclass(frozen=True)
class Run:
    """One results.json and what lies beside it."""

    path: Path
    results: dict[str, Any]
    costs: dict[str, Any] | None
    config: str | None
    """Text of config.yaml."""

    @property
    def name(self) -> str:
        """Of the run's folder, without a seed at its end: FedAvg of FedAvg-seed42."""
        return re.sub(rf"[-_]seed[-_]?{self.seed}$", "", run_folder(self.path).name)

    @property
    def seed(self) -> int:
        """Of split and training."""
        return self.results["seed"]

    @property
    def tasks(self) -> int:
        """Tasks that the run has finished."""
        return self.results["tasks_done"]

    @property
    def goal(self) -> int:
        """Tasks that the run is to learn: those of its data, or trainer.max_tasks."""
        return self.results["data"]["num_tasks"]

    @property
    def planned(self) -> int:
        """Tasks that its data has; where there is no config.yaml, those that the run is to learn."""
        known = self.options.get("data.num_tasks")
        return max(self.goal, known if isinstance(known, int) else 0)

    @cached_property
    def options(self) -> dict[str, Any]:
        """config.yaml by dotted names; without the file, what results.json says of method and trainer."""
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
        """Of the package's checkout in each session that worked on the run, where it was recorded."""
        sessions = (self.costs or {}).get("sessions", [])
        return list(dict.fromkeys(session["commit"] for session in sessions if session.get("commit")))

    @property
    def devices(self) -> list[str]:
        """That worked on the run."""
        return list(dict.fromkeys(session["device"] for session in (self.costs or {}).get("sessions", [])))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs under the given paths; where a run folder holds several versions, the newest of each seed.

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


def read_run(path: Path) -> Run:
    """A run by its results.json; costs and configuration where they lie beside it.

    Raises:
        ValueError: if a file is damaged, of a newer version, or without a finished task.
    """
    results = read_json(path)
    missing = [name for name in NEEDED if name not in results]
    if missing:
        raise ValueError(f"{str(path)!r} holds no {missing[0]!r}: give a results.json of fedlscl fit.")
    schema = results.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ValueError(f"{str(path)!r} has schema {schema}, newer than {SCHEMA}: update fedlscl.")
    if not results["summary"]:
        raise ValueError(f"{str(path)!r} holds no finished task: continue the run, or leave it out.")
    _check(path, _faults(results))
    costs, config, matrix = (path.with_name(name) for name in (COSTS, CONFIG, MATRIX))
    if matrix.is_file():
        _check_matrix(matrix, results)
    text = config.read_text(errors="replace") if config.is_file() else None
    if text is not None:
        _check_yaml(config, text)
    spent = read_json(costs) if costs.is_file() else None
    _check(costs, _cost_faults(spent or {}))
    return Run(path, results, spent, text)


def _check(path: Path, faults: Iterator[str]) -> None:
    fault = next(faults, None)
    if fault is not None:
        raise ValueError(f"{str(path)!r}: {fault}: restore the file, or leave the run out.")


def _faults(results: dict[str, Any]) -> Iterator[str]:
    """What a results.json of this schema must have and this one does not; each check relies on those before it."""
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
    counts, refusals = results.get("parameters", {"foundation": 0}), results.get("quarantined", [])
    names = ("trainable", "total") if "parameters" in results else ()
    if not isinstance(counts, dict) or not all(_has_ints(counts.get(name)) for name in names):
        yield f"parameters must have trainable and total of each client, got {_short(counts)}"
    if not isinstance(counts.get("foundation"), int):
        yield f"parameters.foundation must be int, got {_short(counts.get('foundation'))}"
    for refusal in refusals if isinstance(refusals, list) else [refusals]:
        named = refusal if isinstance(refusal, dict) else {}
        if not {"client", "reason"} <= named.keys() or not _has_ints([named.get("task"), named.get("round")]):
            yield f"quarantined must have client, task, round and reason, got {_short(refusal)}"


def _has_lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and (not row or _has_ints(row)) for row in value)


def _has_ints(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, int) for entry in value)


def _cost_faults(costs: dict[str, Any]) -> Iterator[str]:
    sessions = costs.get("sessions", [])
    for session in sessions if isinstance(sessions, list) else [sessions]:
        if not isinstance(session, dict) or not {"device", "started", "ended"} <= session.keys():
            yield f"sessions must have device, started and ended, got {_short(session)}"
    for name in ("total_seconds", "images"):
        if not _is_number(costs.get(name, 0)):
            yield f"{name} must be a finite number, got {_short(costs[name])}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        ValueError: naming the file.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no valid JSON ({error}): restore it, or leave the run out.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds {type(value).__name__}: give a results.json of fedlscl fit.")
    return value


def _check_matrix(path: Path, results: dict[str, Any]) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows != [{name: str(value) for name, value in row.items()} for row in matrix_rows(results["accuracy"])]:
        raise ValueError(f"{str(path)!r} does not hold the accuracies of the {RESULTS} beside it: restore both.")


def _check_yaml(path: Path, text: str) -> None:
    try:
        is_mapping = isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        is_mapping = False
    if not is_mapping:
        raise ValueError(f"{str(path)!r} is no configuration in YAML: restore it, or leave the run out.")


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
