"""Finished runs on disk: which results.json files stand for the runs under a path, and what is in them."""

import csv
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from fedlscl.federated.metrics import MASKS, PHASES, SCHEMA, matrix_rows

RESULTS, MATRIX, COSTS, CONFIG = "results.json", "matrix.csv", "costs.json", "config.yaml"
ROUNDS = "rounds.csv"
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
    folder = path.resolve().parent
    folder = folder.parent if VERSION.fullmatch(folder.name) else folder
    return folder.parent if SEED.fullmatch(folder.name) else folder


PER_TASK = ("average", "worst_client", "current", "forgetting", "backward_transfer", "average_before_aggregation")
"""Figures of the summary under each mask; the last is None if nothing was measured."""
SHAPE: dict[str, Any] = {
    "seed": int,
    "method": {"name": str, "fields": dict},
    "trainer": {"rounds_per_task": int, "precision": str, "server_every": str},
    "data": {"num_clients": int, "num_tasks": int, "dataset": str, "fingerprint": str, "classes": list},
    "foundation": ({"name": object, "fingerprint": object},),
    "versions": dict,
    "tasks_done": int,
    "accuracy": {phase: dict.fromkeys(MASKS, list) for phase in PHASES},
    "summary": [{f"{mask}/{name}": (float,) if name == PER_TASK[-1] else float for mask in MASKS for name in PER_TASK}],
    "traffic": {
        **{"up_bytes": int, "down_bytes": int, "up": [[[int]]]},
        **{"readout_up_bytes?": int, "readout_down_bytes?": int},
    },
    # Files of the first versions have neither.
    "parameters?": {"foundation": int, "trainable": [int], "total": [int]},
    "readouts?": dict,
    "quarantined?": [{"client": object, "task": int, "round": int, "reason": object}],
}
"""What a report reads of results.json: float is any finite number, a tuple may be null, a name with '?' be absent."""
COSTS_SHAPE = {
    "sessions?": [{"device": object, "started": object, "ended": object}],
    **dict.fromkeys(("total_seconds?", "images?"), float),
}


def read_run(path: Path) -> Run:
    """A run by its results.json, with costs and configuration if they lie beside it.

    Raises:
        ValueError: if a file is damaged, of a newer version, or without a finished task.
    """
    results = read_json(path)
    missing = [name for name in SHAPE if not name.endswith("?") and name not in results]
    if missing:
        raise ValueError(f"{str(path)!r} holds no {missing[0]!r}: give a results.json of fedlscl fit.")
    schema = results.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ValueError(f"{str(path)!r} has schema {schema}, newer than {SCHEMA}: update fedlscl.")
    if not results["summary"]:
        raise ValueError(f"{str(path)!r} holds no finished task: continue the run, or leave it out.")
    old_names = SCHEMA_1_MASKS if schema < 2 else {}
    named_by_mask = [name for name in ("accuracy", "summary", "clients") if name in results]
    results |= {name: _renamed(results[name], old_names) for name in named_by_mask}
    _refuse(path, chain(_faults(results, SHAPE), _wrong_sizes(results)))
    costs, config, matrix = (path.with_name(name) for name in (COSTS, CONFIG, MATRIX))
    if matrix.is_file():
        with matrix.open(newline="") as file:
            rows = [row | {"mask": old_names.get(row.get("mask", ""), row.get("mask"))} for row in csv.DictReader(file)]
        if rows != [{name: str(value) for name, value in row.items()} for row in matrix_rows(results["accuracy"])]:
            raise ValueError(f"{str(matrix)!r} does not hold the accuracies of the {RESULTS} beside it: restore both.")
    text = config.read_text(errors="replace") if config.is_file() else None
    if text is not None and not _is_mapping(text):
        raise ValueError(f"{str(config)!r} is not a configuration in YAML: restore it, or leave the run out.")
    spent = read_json(costs) if costs.is_file() else None
    _refuse(costs, _faults(spent or {}, COSTS_SHAPE))
    return Run(path, results, spent, text, _convergence(path.with_name(ROUNDS), results["data"]["classes"]))


MIN_FALL, MAX_LEFT = 0.02, 0.25
"""Of a stage that has not converged: least fall in the last round, and least part of the loss of guessing (ours)."""


def has_converged(rows: Iterable[Mapping[str, str]], classes: Sequence[Sequence[Sequence[int]]]) -> bool | None:
    """Whether the training loss has converged at the run's budget (ours); None if that cannot be told.

    Not converged: in some stage the cross-entropy, mean over clients, still falls by more than 2 % from the last round
    but one to the last one, and is then more than 25 % of ln K, that of guessing among the K classes that the client
    has met so far (some methods train on those of the task alone, which makes the rule lenient to them); both are means
    over tasks. A loss near zero may fall by any percentage: there is little left to train.

    Args:
        rows: of rounds.csv.
        classes: of each client and task.
    """
    losses: dict[str, dict[int, dict[int, dict[int, float]]]] = {}
    for row in rows:
        client, task, round_ = (int(row[name]) for name in ("client", "task", "round"))
        for name, value in row.items():
            if value and client >= 0 and name.endswith("/cross_entropy") and len(classes[client][task]) > 1:
                of_task = losses.setdefault(name, {}).setdefault(task, {})
                of_task.setdefault(round_, {})[client] = float(value)
    verdicts = []
    for tasks in losses.values():
        falls, left = [], []
        for task, rounds in tasks.items():
            if len(rounds) > 1:
                *_, before, last = (rounds[round_] for round_ in sorted(rounds))
                falls.append(1 - fmean(last.values()) / max(fmean(before.values()), 1e-12))
                met = {client: len(set(chain(*classes[client][: task + 1]))) for client in last}
                left.append(fmean(loss / math.log(met[client]) for client, loss in last.items()))
        verdicts += [fmean(falls) <= MIN_FALL or fmean(left) <= MAX_LEFT] if falls else []
    return all(verdicts) if verdicts else None


def _convergence(file: Path, classes: Any) -> bool | None:
    if not file.is_file():
        return None
    try:
        with file.open(newline="") as lines:
            return has_converged(csv.DictReader(lines), classes)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{str(file)!r} does not fit the {RESULTS} beside it: restore both.") from error


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


def _is_mapping(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """The value with other names of masks, in ``seen`` as well as in ``seen/average``."""
    if isinstance(value, list):
        return [_renamed(entry, names) for entry in value]
    if not isinstance(value, dict):
        return value
    parts = {name: name.partition("/") for name in value}
    return {names.get(mask, mask) + slash + rest: _renamed(value[n], names) for n, (mask, slash, rest) in parts.items()}


def _refuse(path: Path, faults: Iterator[str]) -> None:
    for fault in faults:
        raise ValueError(f"{str(path)!r}: {fault}: restore the file, or leave the run out.")


def _faults(value: Any, shape: Any, name: str = "") -> Iterator[str]:
    """Deviations of a JSON value from a shape like `SHAPE`."""
    if isinstance(shape, tuple):
        yield from _faults(value, shape[0], name) if value is not None else ()
    elif isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            entry, place = key.removesuffix("?"), f"{name}.{key.removesuffix('?')}".lstrip(".")
            if entry in value:
                yield from _faults(value[entry], inner, place)
            elif entry == key:
                yield f"{place} must be given, got nothing"
    elif isinstance(shape, list) and isinstance(value, list):
        for entry in value:
            yield from _faults(entry, shape[0], name)
    elif shape is float:
        if not isinstance(value, int | float) or not math.isfinite(value):
            yield f"{name} must be a finite number, got {_short(value)}"
    else:
        kind = shape if isinstance(shape, type) else type(shape)
        if not isinstance(value, kind):
            yield f"{name} must be {kind.__name__}, got {_short(value)}"


def _wrong_sizes(results: dict[str, Any]) -> Iterator[str]:
    """Lists of results.json, whose shape is right, that do not fit its numbers of clients and of finished tasks."""
    clients, done, sent = results["data"]["num_clients"], results["tasks_done"], results["traffic"]["up"]
    if len(results["summary"]) != done:
        yield f"summary must have one entry per finished task ({done}), got {len(results['summary'])}"
    for phase, mask in product(PHASES, MASKS):
        try:
            shape = np.array(results["accuracy"][phase][mask], dtype=float).shape
        except (ValueError, TypeError):
            shape = ()
        if len(shape) != 3 or shape[0] != clients or min(shape[1:]) < done:
            yield f"accuracy.{phase}.{mask} must be (clients, tasks, tasks) for {clients} clients, got shape {shape}"
    for name, matrices in results.get("readouts", {}).items():
        for mask in MASKS:
            try:
                shape = np.array(matrices[mask], dtype=float).shape
            except (ValueError, TypeError, KeyError):
                shape = ()
            if len(shape) != 3 or shape[0] != clients or min(shape[1:]) < done:
                yield f"readouts.{name}.{mask} must be (clients, tasks, tasks) for {clients} clients, got shape {shape}"
    if len(sent) != clients or any(len(client) < done for client in sent):
        yield f"traffic.up must have lists for {done} tasks of each of {clients} clients, got {_short(sent)}"
    counts = results.get("parameters", {"trainable": [0], "total": [0]})
    if not counts["trainable"] or not counts["total"]:
        yield f"parameters must have trainable and total of each client, got {_short(counts)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
