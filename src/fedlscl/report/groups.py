"""Runs that differ in nothing but the seed, and their means and deviations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedlscl.report.runs import Run

NOT_A_SETTING = {
    "seed_everything",
    "method.class_path",
    *(f"trainer.{name}" for name in ("accelerator", "devices", "cache_gb", "cache_dir", "compile")),
    *(f"trainer.{name}" for name in ("default_root_dir", "name", "callbacks", "precision")),
    *(f"data.{name}" for name in ("root", "cache_dir", "download", "num_workers", "manifest")),
}
"""Options that change where, when and how exactly something is computed, or which repetition it is."""
MOST_NAMED = 3
"""Differing options that a group's name holds."""


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

    @property
    def seeds(self) -> list[int]:
        """One per run."""
        return [run.seed for run in self.runs]

    @property
    def tasks(self) -> int:
        """Tasks that every run has finished."""
        return self.runs[0].tasks

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
    """Groups by name and setting, best final ``seen`` accuracy first.

    Raises:
        ValueError: if two runs differ in nothing.
    """
    groups: list[Group] = []
    for name in dict.fromkeys(run.name for run in runs):
        settings: dict[tuple[tuple[str, str], ...], list[Run]] = {}
        for run in runs:
            if run.name == name:
                settings.setdefault(tuple(sorted(setting(run).items())), []).append(run)
        labels = _labels(name, [dict(entries) for entries in settings])
        for label, alike in zip(labels, settings.values(), strict=True):
            _check_seeds(alike)
            groups.append(Group(label, tuple(sorted(alike, key=lambda run: run.seed))))
    return sorted(groups, key=lambda group: (-group.known("seen/average").mean, group.name))


def setting(run: Run) -> dict[str, str]:
    """What runs of one group have in common, as text."""
    # A path of weights says less than their hash, an import path less than the method's name.
    options = {name: value for name, value in run.options.items() if name not in NOT_A_SETTING}
    options = {name: value for name, value in options.items() if name.split(".")[-1] != "weights"}
    data, foundation = run.results["data"], run.results.get("foundation") or {}
    hashes = {"data_hash": data.get("fingerprint"), "weights_hash": foundation.get("fingerprint")}
    found = {**options, "method": run.results["method"]["name"], **hashes, "tasks_done": run.tasks}
    return {name: str(value) for name, value in found.items()}


def _labels(name: str, settings: list[dict[str, str]]) -> list[str]:
    """The name alone, or with the options in which its settings differ."""
    if len(settings) == 1:
        return [name]
    keys = sorted({key for one in settings for key in one if any(other.get(key) != one[key] for other in settings)})
    texts = [", ".join(f"{key.split('.')[-1]}={one.get(key)}" for key in keys[:MOST_NAMED]) for one in settings]
    return [f"{name} ({text}{f'; {n}' if texts.count(text) > 1 else ''})" for n, text in enumerate(texts, start=1)]


def _check_seeds(runs: list[Run]) -> None:
    by_seed: dict[int, Run] = {}
    for run in runs:
        if run.seed in by_seed:
            pair = f"{str(by_seed[run.seed].path.parent)!r} and {str(run.path.parent)!r}"
            raise ValueError(f"{pair} are the same run with the same seed {run.seed}: give one of them.")
        by_seed[run.seed] = run
