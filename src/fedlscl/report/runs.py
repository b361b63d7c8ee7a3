"""Finished runs on disk: which results.json files stand for the runs under a path, and what is in them."""

import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from fedlscl.federated.metrics import MASKS, PHASES, SCHEMA, flat, matrix_rows, to_csv

RESULTS, MATRIX, COSTS, CONFIG, ROUNDS = "results.json", "matrix.csv", "costs.json", "config.yaml", "rounds.csv"
VERSION = re.compile(r"version_(\d+)")
SEED = re.compile(r"seed[_-]?\d+")


@dataclass(frozen=True)
class Run:
    """One results.json, and the files beside it."""

    path: Path
    results: dict[str, Any]
    costs: dict[str, Any]
    """Contents of costs.json; empty without the file."""
    config: str | None
    """Text of config.yaml."""
    is_converged: bool | None = None
    """See `has_converged`."""

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
        return flat(given)

    def matrix(self, mask: str) -> np.ndarray:
        """Accuracies (clients, after task, on task) of finished tasks, NaN above the diagonal."""
        return np.array(self.results["accuracy"]["after"][mask], dtype=float)[:, : self.tasks, : self.tasks]

    def client_averages(self, mask: str) -> np.ndarray:
        """Mean accuracy of each client over all tasks after the last one, (clients,)."""
        return self.matrix(mask)[:, -1].mean(1)

    def recorded(self, entry: str) -> list[str]:
        """The different values of an entry in the sessions of costs.json, one session per process."""
        return list(dict.fromkeys(found for session in self.costs.get("sessions", []) if (found := session.get(entry))))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs under the given paths; if a run folder holds several versions, the newest of each seed."""
    runs: dict[Path, Run] = {}
    for path in paths:
        newest = {(run_folder(run.path), run.seed): run for run in map(read_run, all_results(path))}
        runs |= {run.path.resolve(): run for run in newest.values()}
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


def all_results(path: Path) -> list[Path]:
    """Every results.json of a run, or of all runs below a folder; versions of a run in their order."""

    def place(file: Path) -> tuple[Path, int]:
        number = VERSION.fullmatch(file.resolve().parent.name)
        return run_folder(file), int(number[1]) if number else -1

    own = path if path.is_file() else path / RESULTS
    files = [own] if own.is_file() else sorted(sorted(path.rglob(RESULTS)), key=place)
    if not files:
        reason = "holds no results.json" if path.exists() else "does not exist"
        raise ValueError(f"{str(path)!r} {reason}: give a run directory of fedlscl fit.")
    return files


def run_folder(path: Path) -> Path:
    """The folder that names a run: that of its results, or its parent if that is only a version or a seed.

    Example:
        >>> run_folder(Path("/runs/FedAvg/version_1/results.json")).name, run_folder(Path("/EWC/results.json")).name
        ('FedAvg', 'EWC')
    """
    folder = path.resolve().parent
    folder = folder.parent if VERSION.fullmatch(folder.name) else folder
    return folder.parent if SEED.fullmatch(folder.name) else folder


PER_TASK: dict[str, Any] = {
    **dict.fromkeys(("average", "worst_client", "current", "forgetting", "backward_transfer"), float),
    "average_before_aggregation": (float,),
}
"""Figures of the summary under each mask; the last is None if nothing was measured."""
ACCURACIES = {mask: ["data.num_clients", ["data.num_tasks", ["data.num_tasks", (float,)]]] for mask in MASKS}
SHAPE: dict[str, Any] = {
    "seed": int,
    "method": {"name": str, "fields": dict},
    "trainer": {"rounds_per_task": int, "precision": str, "server_every": str},
    "data": {"num_clients": int, "num_tasks": int, "dataset": str, "fingerprint": str, "classes": list},
    "foundation": ({"name": object, "fingerprint": object},),
    "versions": dict,
    "tasks_done": int,
    "accuracy": dict.fromkeys(PHASES, ACCURACIES),
    "summary": ["tasks_done", {f"{mask}/{name}": kind for mask in MASKS for name, kind in PER_TASK.items()}],
    "traffic": {
        **dict.fromkeys(("up_bytes", "down_bytes", "readout_up_bytes?", "readout_down_bytes?"), int),
        "up": ["data.num_clients", ["tasks_done", [int]]],
    },
    # Files of the first versions have neither.
    "parameters?": {"foundation": int, "trainable": ["data.num_clients", int], "total": ["data.num_clients", int]},
    "readouts?": {"*": ACCURACIES},
    "quarantined?": [{"client": object, "task": int, "round": int, "reason": object}],
}
"""What a report reads of results.json.

float is any finite number, a tuple may be null, a name with '?' may be absent, '*' is every name, and a list may begin
with the place of the number of its entries.
"""
COSTS_SHAPE = {
    "sessions?": [{"device": str, "started": str, "ended": str}],
    **dict.fromkeys(("total_seconds?", "images?"), float),
}
SCHEMA_1_MASKS = {"class_il": "seen", "task_il": "task"}
"""Names of the masks in results.json of schema 1."""


def read_run(path: Path) -> Run:
    """A run by its results.json, with costs and configuration if they lie beside it.

    Raises:
        ValueError: if a file is damaged, of a newer version, or without a finished task.
    """
    costs, config, matrix, rounds = (path.with_name(name) for name in (COSTS, CONFIG, MATRIX, ROUNDS))
    with _refused(path, "cannot be read"):
        results = json.loads(path.read_bytes())
        _check(results, {}, results)
        if (schema := results.get("schema", 1)) not in range(1, SCHEMA + 1):
            raise ValueError(f"schema must be at most {SCHEMA}, got {schema}: update fedlscl")
        old_names = SCHEMA_1_MASKS if schema == 1 else {}
        for mask, old in old_names.items():
            # "seen" and "seen/average" as keys, but not the "task" of a rejected upload, which is a number.
            results = json.loads(re.sub(rf'"{old}(?=/\w+":|": [\[{{])', f'"{mask}', json.dumps(results)))
        _check(results, SHAPE, results)
        if not results["summary"]:
            raise ValueError("it holds no finished task: continue the run")
    with _refused(matrix, f"does not fit the {RESULTS} beside it"):
        rows = (row | {"mask": old_names.get(row["mask"], row["mask"])} for row in matrix_rows(results["accuracy"]))
        if matrix.is_file() and matrix.read_text() != to_csv(rows):
            raise ValueError("it has other accuracies")
    with _refused(costs, "cannot be read"):
        spent = json.loads(costs.read_bytes()) if costs.is_file() else {}
        _check(spent, COSTS_SHAPE, spent)
    with _refused(config, "is not a configuration in YAML"):
        text = config.read_text() if config.is_file() else None
        _check({} if text is None else yaml.safe_load(text), {}, {})
    with _refused(rounds, f"does not fit the {RESULTS} beside it"):
        lines = rounds.read_text().splitlines() if rounds.is_file() else []
        is_converged = has_converged(csv.DictReader(lines), results["data"]["classes"])
    return Run(path, results, spent, text, is_converged)


@contextmanager
def _refused(file: Path, problem: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{str(file)!r} {problem} ({detail}): restore the file, or leave the run out.") from error


def _check(value: Any, shape: Any, results: dict[str, Any], name: str = "") -> None:
    """Raise a ValueError for the first deviation of a JSON value from a shape like `SHAPE`."""
    if isinstance(shape, tuple):
        if value is not None:
            _check(value, shape[0], results, name)
        return
    kind = shape if isinstance(shape, type) else type(shape)
    if not isinstance(value, int | float if kind is float else kind) or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name or 'it'} must be {kind.__name__}, got {short(value)}")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            for entry in value if key == "*" else [key.removesuffix("?")]:
                if entry in value:
                    _check(value[entry], inner, results, f"{name}.{entry}".lstrip("."))
                elif entry == key:
                    raise ValueError(f"{f'{name}.{entry}'.lstrip('.')} must be given, got nothing")
    elif isinstance(shape, list):
        *places, inner = shape
        for place in places:
            size = reduce(dict.__getitem__, place.split("."), results)
            if len(value) != size:
                raise ValueError(f"{name} must have {size} entries ({place}), got {len(value)}")
        for entry in value:
            _check(entry, inner, results, name)


MIN_FALL, MAX_LEFT = 0.02, 0.25
"""Of a stage that has not converged: least fall in the last round, and least part of the loss of guessing (ours)."""


def has_converged(rows: Iterable[Mapping[str, str]], classes: Sequence[Sequence[Sequence[int]]]) -> bool | None:
    """Whether the training loss has converged at the run's budget (ours); None if that cannot be told.

    Not converged: in some stage the cross-entropy, mean over clients, still falls by more than 2 % from the last round
    but one to the last one, and is then more than 25 % of ln K, that of guessing among the K classes that the client
    has met so far; both are means over tasks. docs/report.md has the reasons.

    Args:
        rows: of rounds.csv.
        classes: of each client and task.
    """
    losses: dict[tuple[str, int], dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        client, task, round_ = (int(row[name]) for name in ("client", "task", "round"))
        for name, value in row.items():
            if value and client >= 0 and name.endswith("/cross_entropy") and len(classes[client][task]) > 1:
                losses[name, task][round_][client] = float(value)
    falls, left = defaultdict(list), defaultdict(list)
    for (stage, task), rounds in losses.items():
        if len(rounds) > 1:
            *_, before, last = (rounds[round_] for round_ in sorted(rounds))
            falls[stage].append(1 - fmean(last.values()) / max(fmean(before.values()), 1e-12))
            met = {client: len(set(chain(*classes[client][: task + 1]))) for client in last}
            left[stage].append(fmean(loss / math.log(met[client]) for client, loss in last.items()))
    verdicts = [fmean(falls[stage]) <= MIN_FALL or fmean(left[stage]) <= MAX_LEFT for stage in falls]
    return all(verdicts) if verdicts else None
