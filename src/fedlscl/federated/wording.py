"""Figures of a run in words, for the terminal."""

import math
from typing import TYPE_CHECKING, Any

from fedlscl.federated.description import describe_foundation, parameter_counts
from fedlscl.federated.device import fast_bf16

if TYPE_CHECKING:
    from fedlscl.federated.trainer import FederatedTrainer


def introduction(trainer: "FederatedTrainer") -> list[str]:
    """What is about to be done, in a few lines."""
    data, foundation = trainer.datamodule, describe_foundation(trainer)
    sizes = sorted({len(classes) for split in data.splits for classes in split.classes[: trainer.num_tasks]})
    classes = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    tasks, rounds = trainer.num_tasks, trainer.rounds_per_task
    train, test = (
        sum(len(ids) for split in data.splits for ids in parts(split)[:tasks])
        for parts in (lambda split: split.train, lambda split: split.test)
    )
    lines = [
        f"{type(trainer.method).__name__} on {data.dataset}: {len(trainer.clients)} clients, {tasks} tasks of "
        f"{classes} classes per client, {rounds} rounds per task",
        f"  images      {train:,} for training, {test:,} for testing, of all clients",
        f"  parameters  {parameter_line(parameter_counts(trainer))}, per client",
    ]
    if foundation is not None:
        mean, std = (" ".join(f"{value:g}" for value in foundation[name]) for name in ("mean", "std"))
        weights = foundation["fingerprint"][:12]
        lines.append(f"  foundation  {foundation['name']}, weights {weights}, mean {mean}, std {std}")
    if data.augment != "none":
        alone = "" if foundation is None else ": no cached ViT tokens in training"
        lines.append(f"  augment     {data.augment}{alone}")
    slow = trainer.precision == "bf16-mixed" and trainer.fabric.device.type == "cpu" and not fast_bf16()
    note = " (slow: this processor has no bf16 instructions; take 32-true or auto)" if slow else ""
    lines.append(f"  device      {trainer.fabric.device}, precision {trainer.precision}{note}, seed {trainer.seed}")
    if trainer.run_dir is not None:
        lines.append(f"  run         {trainer.run_dir}")
    if trainer.step:
        where = "after the last task" if trainer.progress.task >= tasks else f"from {place(trainer)}"
        lines.append(f"  goes on     {where}")
    return lines


def in_all(up: float, down: float, seconds: float) -> str:
    """The estimate for a whole run in one line.

    Example:
        >>> in_all(58.4e6, 47.4e6, 76)
        '  in all      about 58.4 MB up, 47.4 MB down, 0:01:16'
    """
    return f"  in all      about {in_bytes(up)} up, {in_bytes(down)} down, {in_hours(seconds)}"


def accuracies(figures: dict[str, float]) -> str:
    """The summary after a task in one line."""
    names = {"average": "average", "current": "current task", "forgetting": "forgetting"}
    parts = [f"{words} {percent(figures[f'seen/{name}'])} %" for name, words in names.items()]
    return f"{', '.join(parts)}; among the task's own classes {percent(figures['task/average'])} %"


def place(trainer: "FederatedTrainer") -> str:
    """Where the run is, counted from 1."""
    task, round_ = trainer.progress
    return f"task {task + 1}/{trainer.num_tasks}, round {round_ + 1}/{trainer.rounds_per_task}"


def percent(value: float | None) -> str:
    """A fraction in percent; a dash where nothing was measured.

    Example:
        >>> percent(0.12345), percent(-0.0001), percent(None)
        ('12.3', '0.0', '-')
    """
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"


def in_bytes(count: float) -> str:
    """A size in decimal units.

    Example:
        >>> in_bytes(999), in_bytes(171356)
        ('999 B', '171.4 kB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1000)), 4)
    return f"{count / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def in_hours(seconds: float) -> str:
    """A duration as h:mm:ss.

    Example:
        >>> in_hours(3725.4)
        '1:02:05'
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def parameter_line(parameters: dict[str, Any]) -> str:
    """Trainable and total parameters in words; a range where clients differ."""
    trainable, total = (_range(parameters[name]) for name in ("trainable", "total"))
    shared = f" ({parameters['foundation']:,} in the shared frozen ViT)" if parameters["foundation"] else ""
    return f"{trainable} trainable of {total}{shared}"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
