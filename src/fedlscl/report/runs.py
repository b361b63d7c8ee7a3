"""A run as it lies on disk: results, costs, configuration."""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedlscl.federated.export import matrix_rows
from fedlscl.report.finding import RESULTS, all_results, newest, run_folder

MATRIX, COSTS, CONFIG = "matrix.csv", "costs.json", "config.yaml"
SCHEMA = 1
"""Of results.json, the newest that is understood."""
NEEDED = ("seed", "method", "trainer", "data", "foundation", "versions", "tasks_done", "accuracy", "summary", "traffic")


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


def read_run(path: Path) -> Run:
    """A run by its results.json; costs and configuration where they lie beside it.

    Raises:
        ValueError: if a file is damaged, of a newer version, or without a finished task.
    """
    results = read_json(path)
    missing = [name for name in NEEDED if name not in results]
    if missing:
        raise ValueError(f"{str(path)!r} holds no {missing[0]!r}: give a results.json of fedlscl fit.")
    if results.get("schema", SCHEMA) > SCHEMA:
        raise ValueError(f"{str(path)!r} has schema {results['schema']}, newer than {SCHEMA}: update fedlscl.")
    if not results["summary"]:
        raise ValueError(f"{str(path)!r} holds no finished task: continue the run, or leave it out.")
    costs, config, matrix = (path.with_name(name) for name in (COSTS, CONFIG, MATRIX))
    if matrix.is_file():
        _check_matrix(matrix, results)
    text = config.read_text(errors="replace") if config.is_file() else None
    if text is not None:
        _check_yaml(config, text)
    return Run(path, results, read_json(costs) if costs.is_file() else None, text)


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
