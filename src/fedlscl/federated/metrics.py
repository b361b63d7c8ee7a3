"""The accuracy of every client, after every task, on every task, what the field derives from it, and both as text."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

AT_SERVER = -1
"""Client id in ``history`` entries of stages that the server trained."""
MASKS = ("task_il", "class_il")
"""Task-incremental: only the classes of the image's task compete (Table 1 of the paper). Class-incremental: all classes
that the client has seen so far."""
PHASES = ("before", "after")
"""Measured before the last aggregation of a task, and after it."""
SCHEMA = 2
"""Version of results.json; raised when a name in it changes its meaning."""


class AccuracyMatrix:
    """``values[phase, mask, client, n, t]``: accuracy of a client after task n on task t; NaN where t > n."""

    def __init__(self, num_clients: int, num_tasks: int) -> None:
        self.values = torch.full((len(PHASES), len(MASKS), num_clients, num_tasks, num_tasks), torch.nan).double()

    def record(self, phase: str, client: int, after_task: int, rows: Tensor) -> None:
        """Set accuracies (masks, tasks so far) of one client."""
        self.values[PHASES.index(phase), :, client, after_task, : rows.shape[1]] = rows.double()

    def of(self, mask: str, phase: str = "after") -> Tensor:
        """The matrix (clients, tasks, tasks) under one mask."""
        return self.values[PHASES.index(phase), MASKS.index(mask)]


def correct(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Whether the label has the largest logit among ``classes``, (B,) bool."""
    return classes.to(logits.device)[logits[:, classes.to(logits.device)].argmax(1)] == labels


def current_accuracy(matrix: Tensor) -> Tensor:
    """Accuracy on the newest task (Table 1), (clients, tasks)."""
    return matrix.diagonal(dim1=1, dim2=2)


def average_accuracy(matrix: Tensor) -> Tensor:
    """Mean accuracy over all tasks so far (Table 2), (clients, tasks)."""
    return matrix.nanmean(2)


def forgetting(matrix: Tensor) -> Tensor:
    """Best earlier accuracy minus the current one, mean over earlier tasks, (clients, tasks); 0 after the first task.

    Example:
        >>> forgetting(torch.tensor([[[0.9, torch.nan], [0.5, 0.7]]]))
        tensor([[0.0000, 0.4000]])
    """
    values = torch.zeros(matrix.shape[:2], dtype=matrix.dtype)
    for n in range(1, matrix.shape[1]):
        values[:, n] = (matrix[:, :n, :n].nan_to_num(-1).amax(1) - matrix[:, n, :n]).mean(1)
    return values


def backward_transfer(matrix: Tensor) -> Tensor:
    """Current accuracy minus that right after training, mean over earlier tasks, (clients, tasks).

    Example:
        >>> backward_transfer(torch.tensor([[[0.9, torch.nan], [0.5, 0.7]]]))
        tensor([[ 0.0000, -0.4000]])
    """
    values = torch.zeros(matrix.shape[:2], dtype=matrix.dtype)
    for n in range(1, matrix.shape[1]):
        values[:, n] = (matrix[:, n, :n] - current_accuracy(matrix)[:, :n]).mean(1)
    return values


def summary(matrix: AccuracyMatrix, task: int) -> dict[str, float]:
    """Figures after a task, by ``mask/name``: means over clients, and the worst client."""
    figures: dict[str, float] = {}
    for mask in MASKS:
        after, before = matrix.of(mask), matrix.of(mask, "before")
        mean = average_accuracy(after)[:, task]
        figures |= {
            f"{mask}/average": float(mean.mean()),
            f"{mask}/worst_client": float(mean.min()),
            f"{mask}/current": float(current_accuracy(after)[:, task].mean()),
            f"{mask}/forgetting": float(forgetting(after)[:, task].mean()),
            f"{mask}/backward_transfer": float(backward_transfer(after)[:, task].mean()),
            f"{mask}/average_before_aggregation": float(average_accuracy(before)[:, task].nanmean()),
        }
    return figures


def average_after(matrix: list[list[list[float | None]]], task: int) -> float | None:
    """Mean over clients and tasks so far of accuracies (clients, after task, on task); None if one was not measured.

    Example:
        >>> average_after([[[0.5, None], [0.25, 0.75]]], 1), average_after([[[0.5, None], [None, None]]], 1)
        (0.5, None)
    """
    values = [value for client in matrix for value in client[task][: task + 1]]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def plain(value: Any) -> Any:
    """JSON values: dataclasses become dicts of their ``init`` fields, numbers that are not finite become None.

    Example:
        >>> plain({"a": (1, float("nan"))})
        {'a': [1, None]}
    """
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if isinstance(value, int | str | None) else str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict.

    Example:
        >>> flat({"a": {"b": 1}, "c": 2})
        {'a.b': 1, 'c': 2}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def to_json(value: Any) -> str:
    """Indented JSON with lists of numbers on one line."""
    text = json.dumps(value, indent=1, allow_nan=False)
    # Strings of JSON hold no line break, so that only lists can match.
    return re.sub(r"\[(\n[^\[\]{}]+)\]", lambda found: "[" + re.sub(r"\n *", " ", found[1]).strip() + "]", text) + "\n"


def to_csv(rows: Iterable[dict[str, Any]]) -> str:
    """CSV with the columns in the order in which the rows first name them; floats as repr."""
    rows, text = list(rows), io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def matrix_rows(accuracy: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``accuracy[phase][mask]`` of results.json in long form."""
    for phase in PHASES:
        for mask in MASKS:
            for client, after in enumerate(accuracy[phase][mask]):
                for n, row in enumerate(after):
                    where = {"phase": phase, "mask": mask, "client": client, "after_task": n}
                    yield from (where | {"task": t, "accuracy": v} for t, v in enumerate(row) if v is not None)


def round_rows(traffic: dict[str, Any], history: list[dict[str, Any]], tasks: int) -> Iterator[dict[str, Any]]:
    """Bytes and loss terms of every client in every round of the first ``tasks`` tasks.

    Rounds in which the server trained have a row of client -1 with the terms of the last stage of each name.
    """
    losses: dict[tuple[int, int, int], dict[str, float]] = {}
    for entry in history:
        terms = {f"{entry['stage']}/{name}": value for name, value in entry["terms"].items()}
        losses.setdefault((entry["task"], entry["round"], entry["client"]), {}).update(terms)
    for task in range(tasks):
        for round_ in range(len(traffic["up"][0][task])):
            for client, (up, down) in enumerate(zip(traffic["up"], traffic["down"], strict=True)):
                row = {"task": task, "round": round_, "client": client}
                row |= {"bytes_up": up[task][round_], "bytes_down": down[task][round_]}
                yield row | losses.get((task, round_, client), {})
            if (task, round_, AT_SERVER) in losses:
                yield {"task": task, "round": round_, "client": AT_SERVER} | losses[task, round_, AT_SERVER]
