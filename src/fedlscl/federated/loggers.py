"""Scalars of a run, the same for TensorBoard and for any logger of Lightning."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from lightning.fabric.loggers.logger import Logger
from typing_extensions import override

from fedlscl.federated.client import Client
from fedlscl.federated.method import Stage
from fedlscl.federated.metrics import AT_SERVER, MASKS, average_accuracy, flat, plain, summary
from fedlscl.federated.state import Callback, RunState


@dataclass
class Lap:
    """Costs since the last lap."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By name of the stage, and 'server' and 'evaluation'."""
    images: int = 0
    """Seen in training, repetitions counted."""
    training_seconds: float = 0.0
    """The stages' part of ``seconds``."""


class Timed(Callback):
    """Base of callbacks that time the parts of the run."""

    def __init__(self) -> None:
        self._lap, self._round_started = Lap(), 0.0

    def lap(self) -> Lap:
        """The sums since the last call."""
        lap, self._lap = self._lap, Lap()
        return lap

    @property
    def round_seconds(self) -> float:
        """Seconds since the current round started."""
        return time.perf_counter() - self._round_started

    @override
    def on_round_start(self, run: RunState) -> None:
        self._round_started = time.perf_counter()

    @override
    def on_batch_end(self, run: RunState, client: Client | None, num_images: int) -> None:
        self._lap.images += num_images

    @override
    def on_stage_end(
        self, run: RunState, client: Client | None, stage: Stage, terms: dict[str, float], seconds: float
    ) -> None:
        self._lap.seconds[stage.name] += seconds
        self._lap.training_seconds += seconds

    @override
    def on_server_end(self, run: RunState, seconds: float) -> None:
        self._lap.seconds["server"] += seconds

    @override
    def on_evaluation_end(self, run: RunState, client: Client, phase: str, seconds: float) -> None:
        self._lap.seconds["evaluation"] += seconds


class ScalarCallback(Timed):
    """Base of callbacks that log scalars; the step is the number of rounds before the current one."""

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Log values by name."""
        raise NotImplementedError

    @override
    def on_round_end(self, run: RunState) -> None:
        self.log(round_scalars(run, self.lap(), self.round_seconds), run.step)

    @override
    def on_task_end(self, run: RunState) -> None:
        self.log(task_scalars(run), run.step)


class LoggerCallback(ScalarCallback):
    """Logs to Lightning loggers.

    Scalars are sent when a checkpoint is written: a resumed run repeats the rounds after the last checkpoint, and most
    loggers cannot replace a step. A run without a folder writes no checkpoint: a step is sent when the next one starts.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        super().__init__()
        self.loggers = loggers
        self._pending: dict[int, dict[str, float]] = {}

    @override
    def on_fit_start(self, run: RunState) -> None:
        for logger in self.loggers:
            # Fabric's own CSVLogger has no file for hyper-parameters.
            with suppress(NotImplementedError):
                logger.log_hyperparams(hyperparameters(run))

    @override
    def log(self, scalars: dict[str, float], step: int) -> None:
        self._pending.setdefault(step, {}).update(scalars)

    @override
    def on_round_start(self, run: RunState) -> None:
        super().on_round_start(run)
        # Not before: the accuracies of a task belong to the step of its last round, and each step is one call.
        if run.run_dir is None:
            self.on_checkpoint(run)

    @override
    def on_checkpoint(self, run: RunState) -> None:
        for logger in self.loggers:
            for step, scalars in self._pending.items():
                logger.log_metrics(scalars, step)
            logger.save()
        self._pending = {}

    @override
    def on_fit_end(self, run: RunState, status: str = "success") -> None:
        if run.run_dir is None:
            self.on_checkpoint(run)
        for logger in self.loggers:
            logger.finalize(status)

    @override
    def on_exception(self, run: RunState) -> None:
        self.on_fit_end(run, "failed")


def round_scalars(run: RunState, lap: Lap, seconds: float) -> dict[str, float]:
    """Loss terms, bytes, seconds, speed and memory of the current round, by tag.

    Loss terms are those of a stage's last pass if it has several, by client, and their means over clients.
    """
    scalars: dict[str, float] = {}
    by_term: dict[str, list[float]] = {}
    for entry in run.history:
        if (entry["task"], entry["round"]) != run.progress.position:
            continue
        who = "server" if entry["client"] == AT_SERVER else f"client_{entry['client']}"
        for name, value in entry["terms"].items():
            term = f"{entry['stage']}/{name}"
            scalars[f"train/{who}/{term}"] = value
            if entry["client"] != AT_SERVER:
                by_term.setdefault(term, []).append(value)
    scalars |= {f"loss/{term}": fmean(values) for term, values in by_term.items()}
    scalars["uploads/rejected"] = sum((found.task, found.round) == run.progress.position for found in run.rejected)
    for direction in ("up", "down"):
        total = int(run.traffic[direction][:, *run.progress.position].sum())
        scalars[f"traffic/{direction}_bytes"] = total
        scalars[f"traffic/{direction}_bytes_per_client"] = total / max(1, len(run.participants))
    scalars |= {f"seconds/{name}": value for name, value in lap.seconds.items()}
    scalars |= {f"memory/{name}_peak_bytes": size for name, size in peak_memory().items() if size}
    scalars["seconds/round"] = seconds
    if lap.training_seconds:
        scalars["speed/images_per_second"] = lap.images / lap.training_seconds
    return scalars


def task_scalars(run: RunState) -> dict[str, float]:
    """Accuracies after the current task, by tag."""
    task = run.progress.task
    scalars = {f"accuracy_{name}": value for name, value in summary(run.matrix, task).items()}
    for name, values in run.readouts.values.items():
        for mask, accuracies in zip(MASKS, values, strict=True):
            scalars[f"readout_{mask}/{name}"] = float(accuracies[:, task].nanmean(1).nanmean())
    for mask in MASKS:
        for client, average in enumerate(average_accuracy(run.matrix.of(mask))[:, task].tolist()):
            scalars[f"accuracy_{mask}/client_{client}"] = average
    return scalars


def hyperparameters(run: RunState) -> dict[str, Any]:
    """Method, data set, seed and the method's fields under dotted names; numbers, or text."""
    values = {"method": type(run.method).__name__, "seed": run.seed, "dataset": run.data["dataset"]}
    values |= {"rounds_per_task": run.rounds_per_task, **flat(plain(run.method))}
    # TensorBoard would show True as 1.0000.
    return {n: v if isinstance(v, int | float) and not isinstance(v, bool) else str(v) for n, v in values.items()}


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process so far, on the host and on CUDA devices."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "device": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0}
