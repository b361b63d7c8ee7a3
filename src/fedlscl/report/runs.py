"""Finished runs on disk: finding, reading and grouping them."""

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from fedlscl.federated.metrics import MASKS, PHASES, matrix_rows

# A run as it lies on disk: results, costs, configuration.

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
    counts, rejected = results.get("parameters", {"foundation": 0}), results.get("quarantined", [])
    names = ("trainable", "total") if "parameters" in results else ()
    if not isinstance(counts, dict) or not all(_has_ints(counts.get(name)) for name in names):
        yield f"parameters must have trainable and total of each client, got {_short(counts)}"
    if not isinstance(counts.get("foundation"), int):
        yield f"parameters.foundation must be int, got {_short(counts.get('foundation'))}"
    for refusal in rejected if isinstance(rejected, list) else [rejected]:
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


# Which results.json files stand for the runs under a path.

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


# Runs that differ in nothing but the seed, their means and deviations, and which groups may be ranked together.

NOT_A_SETTING = {
    "seed_everything",
    "method.class_path",
    *(f"trainer.{name}" for name in ("accelerator", "devices", "cache_gb", "cache_dir", "compile")),
    *(f"trainer.{name}" for name in ("default_root_dir", "name", "callbacks", "precision", "max_tasks")),
    *(f"data.{name}" for name in ("root", "cache_dir", "download", "num_workers", "manifest")),
}
"""Options that change where, when and how exactly something is computed, or which repetition it is."""
MOST_NAMED = 3
"""Differing options that a group's name holds."""
ORACLES = ("Joint", "JointLSCL")
"""Methods that pool all data: upper bounds, which are not ranked. By name, as imports take seconds."""
ORACLE, UNFINISHED = "oracles, not ranked", "unfinished runs, not ranked"


class Spread(NamedTuple):
    """A figure over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation (n - 1); None for a single seed."""


@dataclass(frozen=True)
class Group:
    """One method in one setting, over seeds."""

    name: str
    runs: tuple[Run, ...]
    """By seed."""
    comparable: str = ""
    """Which set of groups of equal conditions it belongs to; empty where there is one set."""

    @property
    def seeds(self) -> list[int]:
        """One per run."""
        return [run.seed for run in self.runs]

    @property
    def tasks(self) -> int:
        """Tasks that every run has finished."""
        return self.runs[0].tasks

    @property
    def is_finished(self) -> bool:
        """Whether the runs have learned all tasks that they were to learn."""
        return self.tasks >= self.runs[0].goal

    @property
    def is_oracle(self) -> bool:
        """Whether the method pools all data."""
        return self.runs[0].results["method"]["name"] in ORACLES

    @property
    def heading(self) -> str:
        """Of its set: which one of several, and how many tasks where trainer.max_tasks left some out."""
        planned = self.runs[0].planned
        return ", ".join(filter(None, (self.comparable, _progress(self.runs[0]) if self.tasks < planned else "")))

    @property
    def section(self) -> str:
        """Heading of its rows in tables; groups are ranked only against those of the same section."""
        if not self.is_finished:
            return UNFINISHED
        return ", ".join(filter(None, (self.heading, ORACLE * self.is_oracle)))

    @property
    def is_ranked(self) -> bool:
        """Whether it is compared with the others of its section."""
        return self.is_finished and not self.is_oracle

    def final(self, figure: str) -> Spread | None:
        """A figure after the last task, as in results.json's summary, or a cost; None where a run does not have it."""
        values = [final(run, figure) for run in self.runs]
        return None if None in values else spread(np.array(values, dtype=float))

    def known(self, figure: str) -> Spread:
        """A figure that every run has."""
        found = self.final(figure)
        assert found is not None, figure
        return found

    def course(self, figure: str) -> np.ndarray:
        """A figure of the summary after each task, (seeds, tasks)."""
        return np.array([[figures[figure] for figures in run.results["summary"]] for run in self.runs])

    def matrix(self, mask: str) -> np.ndarray:
        """Accuracies (after task, on task), mean over clients and seeds, NaN above the diagonal."""
        return np.mean([run.matrix(mask).mean(0) for run in self.runs], axis=0)

    def ranked_clients(self, mask: str) -> np.ndarray:
        """Final accuracies of each seed's clients, worst first, (seeds, clients)."""
        return np.sort([run.client_averages(mask) for run in self.runs], axis=1)


def final(run: Run, figure: str) -> float | None:
    """A figure of one run after its last task: of the summary, bytes sent, seconds, or images trained on."""
    if figure in ("up_bytes", "down_bytes"):
        return run.results["traffic"][figure]
    if figure in ("total_seconds", "images"):
        return None if run.costs is None else run.costs.get(figure)
    return run.results["summary"][-1].get(figure)


def spread(values: np.ndarray) -> Spread:
    """Mean and sample standard deviation.

    Example:
        >>> spread(np.array([1.0, 3.0])), spread(np.array([5.0]))
        (Spread(mean=2.0, deviation=1.4142135623730951), Spread(mean=5.0, deviation=None))
    """
    return Spread(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups by name and setting in the order of every table.

    Groups are ranked by final ``seen`` accuracy within a set of equal conditions (ours): data, clients, tasks, learned
    tasks, rounds per task, and at least one common split. Oracles follow their set; unfinished runs come last.

    Raises:
        ValueError: if two runs differ in nothing.
    """
    groups: list[Group] = []
    is_mixed = len({(run.tasks, run.planned) for run in runs}) > 1
    for name in dict.fromkeys(run.name for run in runs):
        settings: dict[tuple[tuple[str, str], ...], list[Run]] = {}
        for run in runs:
            if run.name == name:
                settings.setdefault(tuple(sorted(setting(run).items())), []).append(run)
        labels = _labels(name, list(settings.values()), is_mixed)
        for label, alike in zip(labels, settings.values(), strict=True):
            _check_seeds(alike)
            groups.append(Group(label, tuple(sorted(alike, key=lambda run: run.seed))))
    finished = sorted((group for group in groups if group.is_finished), key=_merit)
    unfinished = sorted((group for group in groups if not group.is_finished), key=_merit)
    sets = sorted(_comparable(finished), key=lambda alike: (-alike[0].tasks, -len(alike), _merit(alike[0])))
    ordered = [
        replace(group, comparable=f"set {number}" if len(sets) > 1 else "")
        for number, alike in enumerate(sets, start=1)
        for group in sorted(alike, key=lambda group: group.is_oracle)
    ]
    return ordered + unfinished


def _merit(group: Group) -> tuple[int, float, str]:
    return -group.tasks, -group.known("seen/average").mean, group.name


def _comparable(groups: Sequence[Group]) -> list[list[Group]]:
    sets: list[tuple[set[tuple[object, ...]], list[Group]]] = []
    for group in groups:
        keys = {_terms(run) for run in group.runs}
        joined = [entry for entry in sets if entry[0] & keys]
        sets = [entry for entry in sets if not entry[0] & keys]
        sets.append((keys.union(*(k for k, _ in joined)), [*(g for _, found in joined for g in found), group]))
    return [sorted(found, key=_merit) for _, found in sets]


def _terms(run: Run) -> tuple[object, ...]:
    """What two runs must share to be ranked against each other."""
    data = run.results["data"]
    rounds = run.results["trainer"]["rounds_per_task"]
    return data["fingerprint"], data["num_clients"], run.planned, run.tasks, rounds, split_hash(run)


def split_hash(run: Run) -> str:
    """Of who has which classes and how many samples of them in each finished task."""
    data = run.results["data"]
    parts = [data["classes"], data.get("train_samples"), data.get("test_samples")]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def setting(run: Run) -> dict[str, str]:
    """What runs of one group have in common, as text."""
    # A path of weights says less than their hash, an import path less than the method's name.
    options = {name: value for name, value in run.options.items() if name not in NOT_A_SETTING}
    options = {name: value for name, value in options.items() if name.split(".")[-1] != "weights"}
    data, foundation = run.results["data"], run.results.get("foundation") or {}
    hashes = {"data_hash": data.get("fingerprint"), "weights_hash": foundation.get("fingerprint")}
    found = {**options, "method": run.results["method"]["name"], **hashes, "tasks_done": f"{run.tasks} of {run.goal}"}
    return {name: str(value) for name, value in found.items()}


def _labels(name: str, settings: list[list[Run]], is_mixed: bool) -> list[str]:
    """The name alone, or with the number of tasks where that is not obvious, and the options that differ."""
    firsts = [runs[0] for runs in settings]
    known = [setting(run) for run in firsts]
    keys = sorted({key for one in known for key in one if any(other.get(key) != one[key] for other in known)})
    named = [key for key in keys if key not in ("tasks_done", "data.num_tasks")][:MOST_NAMED]
    is_several = len({(run.tasks, run.planned) for run in firsts}) > 1
    texts = []
    for run, one in zip(firsts, known, strict=True):
        is_partial = run.tasks < run.goal or (is_mixed and run.tasks < run.planned)
        parts = [_progress(run)] if is_partial or is_several else []
        parts += [", ".join(f"{key.split('.')[-1]}={one.get(key)}" for key in named)] if named else []
        texts.append("; ".join(parts))
    texts = [f"{text}; {n}".lstrip("; ") if texts.count(text) > 1 else text for n, text in enumerate(texts, start=1)]
    return [f"{name} ({text})" if text else name for text in texts]


def _progress(run: Run) -> str:
    return f"{run.tasks} of {run.planned} tasks"


def _check_seeds(runs: list[Run]) -> None:
    by_seed: dict[int, Run] = {}
    for run in runs:
        if run.seed in by_seed:
            pair = f"{str(by_seed[run.seed].path.parent)!r} and {str(run.path.parent)!r}"
            raise ValueError(f"{pair} are the same run with the same seed {run.seed}: give one of them.")
        by_seed[run.seed] = run


# What is not equal between groups of runs: a reader must know it before comparing them.

SETS = "Sets differ in data, clients, tasks, rounds per task or split: rank runs only within one set."


def inequalities(groups: Sequence[Group]) -> list[str]:
    """One sentence for each condition that is not the same in all groups, and for runs of identical results."""
    found: dict[str, dict[str, list[str]]] = {}
    for group in groups:
        for what, value in (entry for run in group.runs for entry in _conditions(group, run)):
            names = found.setdefault(what, {}).setdefault(str(value), [])
            names += [] if group.name in names else [group.name]
    different = [_sentence(what, values) for what, values in found.items() if len(values) > 1]
    is_split = any(group.comparable for group in groups)
    return [SETS] * is_split + different + _copies(groups)


def _copies(groups: Sequence[Group]) -> list[str]:
    alike: dict[str, list[str]] = {}
    for group in groups:
        for run in group.runs:
            alike.setdefault(json.dumps(run.results, sort_keys=True), []).append(f"{group.name} seed {run.seed}")
    return [
        f"Identical results (copies of one run?): {', '.join(names)}." for names in alike.values() if len(names) > 1
    ]


def _sentence(what: str, values: dict[str, list[str]]) -> str:
    *most, last = [f"{value} ({', '.join(names)})" for value, names in values.items()]
    return f"{what}: {', '.join(most)} and {last}."


def _conditions(group: Group, run: Run) -> Iterator[tuple[str, Any]]:
    data, trainer, foundation = (run.results[name] for name in ("data", "trainer", "foundation"))
    yield "Data set", f"{data['dataset']} {data['fingerprint'][:12]}"
    yield "Clients", data["num_clients"]
    yield "Finished tasks", f"{run.tasks} of {run.planned}"
    yield "Rounds per task", trainer["rounds_per_task"]
    if "local_epochs" in run.results["method"]["fields"]:
        yield "Local epochs", run.results["method"]["fields"]["local_epochs"]
    yield "Precision", trainer["precision"]
    yield "Seeds", ", ".join(map(str, group.seeds))
    yield f"Split of seed {run.seed}", split_hash(run)
    if foundation:
        yield "Frozen ViT", f"{foundation['name']} {foundation['fingerprint'][:12]}"
    if run.devices:
        yield "Device", ", ".join(run.devices)
