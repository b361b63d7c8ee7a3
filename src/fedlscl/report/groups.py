"""Runs that differ only in the seed, their means and deviations, and which groups may be ranked together."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fedlscl.federated.metrics import average_after
from fedlscl.report.runs import MAX_LEFT, MIN_FALL, Run

NOT_A_SETTING = {"seed_everything", "method.class_path"}
NOT_A_SETTING |= {f"data.{name}" for name in ("root", "cache_dir", "download", "num_workers", "manifest")}
NOT_A_SETTING |= {f"trainer.{name}" for name in ("accelerator", "devices", "precision", "deterministic", "compile")}
NOT_A_SETTING |= {f"trainer.{name}" for name in ("cache_gb", "clients_gb", "cache_dir", "default_root_dir", "name")}
NOT_A_SETTING |= {f"trainer.{name}" for name in ("callbacks", "loggers", "max_tasks")}
"""Options that change only where, when and how precisely something is computed, or which repetition it is.

Some are options of earlier versions, which configurations of old runs still have.
"""
NEUTRAL = {"data.evaluate_on": "test", "data.validation_per_class": 0}
"""Values of newer options with which they change nothing."""
MAX_NAMED = 3
"""Maximum number of differing options in a group's name."""
TRAINING_FREE = ("AFCL", "STSA", "STSAE", "FedNCM", "FedRAN", "FedRidge", "FrozenLDA")
"""Methods whose only head is in closed form."""
CENTRALISED = ("Joint", "JointLSCL")
"""Methods that pool all data, which are not ranked. By name, because their import takes seconds."""
READOUTS = "readouts/"
"""Begins the figure of a readout's accuracy, readouts/NAME/MASK."""
ALL_UP = "all_up_bytes"
"""The figure of the bytes that a method and its readouts upload."""
NOT_CONVERGED = (
    "† not converged at this budget: the training cross-entropy of a stage, mean over clients and tasks, still fell by "
    f"more than {100 * MIN_FALL:.0f} % in the last round, and was more than {100 * MAX_LEFT:.0f} % of that of guessing."
)


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
    heading: str = ""
    """The set under equal conditions if there are several, and the tasks if trainer.max_tasks left some out."""

    @property
    def seeds(self) -> list[int]:
        """Seed of each run."""
        return [run.seed for run in self.runs]

    @property
    def tasks(self) -> int:
        """Finished tasks of every run."""
        return self.runs[0].tasks

    @property
    def is_finished(self) -> bool:
        """Whether the runs have finished all their tasks."""
        return self.tasks >= self.runs[0].goal

    @property
    def is_centralised(self) -> bool:
        """Whether the method pools all data."""
        return self.runs[0].results["method"]["name"] in CENTRALISED

    @property
    def section(self) -> str:
        """Heading of its rows in tables; groups are ranked only against those of the same section."""
        if not self.is_finished:
            return "unfinished runs, not ranked"
        note = "all data (centralised), not ranked" if self.is_centralised else ""
        return ", ".join(filter(None, (self.heading, note)))

    @property
    def is_converged(self) -> bool | None:
        """Whether all runs have converged, see `has_converged`; None if that cannot be told."""
        known = [run.is_converged for run in self.runs]
        return None if None in known and False not in known else all(known)

    @property
    def mark(self) -> str:
        """A dagger after the name of a group that has not converged."""
        return "†" if self.is_converged is False else ""

    def final(self, figure: str) -> Spread | None:
        """A figure after the last task, see `final`; None if a run does not have it."""
        known = [value for run in self.runs if (value := final(run, figure)) is not None]
        if len(known) < len(self.runs):
            return None
        return Spread(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None)

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
    """A figure of one run after its last task: of the summary, bytes, seconds, or images."""
    if figure.startswith(READOUTS):
        name, _, mask = figure.removeprefix(READOUTS).rpartition("/")
        matrices = run.results.get("readouts", {}).get(name)
        return None if matrices is None else average_after(matrices[mask], run.tasks - 1)
    known = run.results["summary"][-1] | run.costs | run.results["traffic"]
    known[ALL_UP] = known["up_bytes"] + known.get("readout_up_bytes", 0)
    return known.get(figure)


def readouts(groups: Sequence[Group]) -> list[str]:
    """Names of the readouts that any run has, in the order of the runs."""
    return list(dict.fromkeys(n for group in groups for run in group.runs for n in run.results.get("readouts", {})))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups by name and setting in the order of every table.

    Groups are ranked by final class-incremental accuracy within a set of equal conditions (ours): data, clients, tasks,
    finished tasks, rounds per task, and at least one common split. Centralised methods follow their set; unfinished
    runs come last.

    Raises:
        ValueError: if two runs do not differ.
    """
    by_name: dict[str, dict[frozenset[tuple[str, str]], list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run.seed):
        by_name[run.name][frozenset(setting(run).items())].append(run)
    is_mixed = len({(run.tasks, run.planned) for run in runs}) > 1
    groups: list[Group] = []
    for name, settings in by_name.items():
        labels = _labels(name, [alike[0] for alike in settings.values()], is_mixed)
        groups += [Group(label, tuple(alike)) for label, alike in zip(labels, settings.values(), strict=True)]
    for run, other in (pair for group in groups for pair in pairwise(group.runs)):
        if run.seed == other.seed:
            pair = f"{str(run.path.parent)!r} and {str(other.path.parent)!r}"
            raise ValueError(f"{pair} are the same run with the same seed {run.seed}: give one of them.")
    groups.sort(key=_merit)
    sets = _comparable([group for group in groups if group.is_finished])
    sets.sort(key=lambda alike: (-alike[0].tasks, -len(alike), _merit(alike[0])))
    ordered = []
    for number, alike in enumerate(sets, start=1):
        first = alike[0].runs[0]
        parts = [f"set {number}"] * (len(sets) > 1) + [_progress(first)] * (first.tasks < first.planned)
        alike.sort(key=lambda group: group.is_centralised)
        ordered += [replace(group, heading=", ".join(parts)) for group in alike]
    return ordered + [group for group in groups if not group.is_finished]


def _merit(group: Group) -> tuple[int, float, str]:
    return -group.tasks, -group.known("class_il/average").mean, group.name


def _comparable(groups: Sequence[Group]) -> list[list[Group]]:
    """Sets of groups that are connected by runs under equal conditions."""
    sets: list[tuple[set[tuple[object, ...]], list[Group]]] = []
    for group in groups:
        terms = {_terms(run) for run in group.runs}
        joined = [entry for entry in sets if entry[0] & terms]
        sets = [entry for entry in sets if entry not in joined]
        sets.append((terms.union(*(known for known, _ in joined)), [*(g for _, found in joined for g in found), group]))
    return [sorted(found, key=_merit) for _, found in sets]


def _terms(run: Run) -> tuple[object, ...]:
    """Conditions that two runs must share to be ranked against each other."""
    data, rounds = run.results["data"], run.results["trainer"]["rounds_per_task"]
    images = data.get("evaluated_on", "test")
    return data["fingerprint"], data["num_clients"], run.planned, run.tasks, rounds, split_hash(run), images


def classifier(run: Run) -> str:
    """What classifies the features; accuracies of different classifiers do not compare the features (ours)."""
    method = run.results["method"]
    collaborator = method["fields"].get("collaborator") or {}
    if any(collaborator.get(name) for name in ("analytic_weight", "adapted_weight")):
        return "trained and closed-form heads"
    return "a closed-form head" if method["name"] in TRAINING_FREE else "a trained head"


def split_hash(run: Run) -> str:
    """Hash of who has which classes and how many samples of them in each finished task."""
    data = run.results["data"]
    parts = [data["classes"], data.get("train_samples"), data.get("test_samples")]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def setting(run: Run) -> dict[str, str]:
    """Options that runs of one group share, as text; weights by their hash, the method by its name."""
    # An option that a run's version did not have yet is one at its default, if that changes nothing.
    found = {
        name: value
        for name, value in run.options.items()
        if name not in NOT_A_SETTING and name.split(".")[-1] != "weights" and value not in (None, NEUTRAL.get(name))
    }
    data, foundation = run.results["data"], run.results["foundation"] or {}
    found |= {"method": run.results["method"]["name"], "tasks_done": f"{run.tasks} of {run.goal}"}
    found |= {"data_hash": data["fingerprint"], "weights_hash": foundation.get("fingerprint")}
    return {name: str(value) for name, value in found.items()}


def _labels(name: str, runs: list[Run], is_mixed: bool) -> list[str]:
    """Names of groups by a run of each: with the number of tasks if they differ, and the options that differ."""
    known = [setting(run) for run in runs]
    different = [key for key in sorted(set().union(*known)) if len({one.get(key) for one in known}) > 1]
    named = [key for key in different if key not in ("tasks_done", "data.num_tasks")][:MAX_NAMED]
    is_several = len({(run.tasks, run.planned) for run in runs}) > 1
    texts = []
    for run, one in zip(runs, known, strict=True):
        is_partial = run.tasks < run.goal or (is_mixed and run.tasks < run.planned)
        parts = [_progress(run)] if is_partial or is_several else []
        parts += [", ".join(f"{key.split('.')[-1]}={one.get(key)}" for key in named)] if named else []
        texts.append("; ".join(parts))
    texts = [f"{text}; {n}".lstrip("; ") if texts.count(text) > 1 else text for n, text in enumerate(texts, start=1)]
    return [f"{name} ({text})" if text else name for text in texts]


def _progress(run: Run) -> str:
    return f"{run.tasks} of {run.planned} tasks"


SETS = "Sets differ in data, clients, tasks, rounds per task, split or test images: rank runs only within one set."


def inequalities(groups: Sequence[Group]) -> list[str]:
    """One sentence for each condition that differs between groups, and for runs of identical results."""
    conditions: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    copies = defaultdict(list)
    for group in groups:
        for run in group.runs:
            copies[json.dumps(run.results, sort_keys=True)].append(f"{group.name} seed {run.seed}")
            for what, value in _conditions(group, run):
                conditions[what][value][group.name] = None
    notes = [SETS] if len({group.heading for group in groups if group.is_finished}) > 1 else []
    for what, values in conditions.items():
        *others, last = [f"{value} ({', '.join(names)})" for value, names in values.items()]
        notes += [f"{what}: {', '.join(others)} and {last}."] if others else []
    return notes + [f"Identical results (copies of one run?): {', '.join(n)}." for n in copies.values() if len(n) > 1]


def _conditions(group: Group, run: Run) -> Iterator[tuple[str, str]]:
    data, trainer, foundation = (run.results[name] for name in ("data", "trainer", "foundation"))
    fields = run.results["method"]["fields"]
    found = {
        "Data set": f"{data['dataset']} {data['fingerprint'][:12]}",
        "Accuracy on": f"{data.get('evaluated_on', 'test')} images",
        "Clients": data["num_clients"],
        "Finished tasks": f"{run.tasks} of {run.planned}",
        "Rounds per task": trainer["rounds_per_task"],
        "Local epochs": fields.get("local_epochs"),
        "Classifier": classifier(run),
        "Readouts": ", ".join(run.results.get("readouts", {})) or "none",
        "Precision": trainer["precision"],
        "Seeds": ", ".join(map(str, group.seeds)),
        f"Split of seed {run.seed}": split_hash(run),
        "Frozen ViT": foundation and f"{foundation['name']} {foundation['fingerprint'][:12]}",
        "Device": ", ".join(run.recorded("device")) or None,
    }
    return ((what, str(value)) for what, value in found.items() if value is not None)
