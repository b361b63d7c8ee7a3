"""Result files of a run: what it is and what came out, equal to the byte however often it was interrupted."""

import csv
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.costs import CostLog, Timed
from fedlscl.federated.metrics import MASKS, PHASES, average_accuracy, summary, to_lists

if TYPE_CHECKING:
    from fedlscl.federated.trainer import FederatedTrainer

SCHEMA = 1
"""Of results.json; raised when a name in it changes its meaning."""


class Results(Timed):
    """Writes results.json, matrix.csv and rounds.csv after every task, and costs.json after every round.

    Clients, tasks and rounds are counted from 0 in all of them, accuracies are fractions.
    """

    def on_fit_start(self, trainer: "FederatedTrainer") -> None:
        """Take up the costs of the sessions before this one."""
        self.costs = None if trainer.run_dir is None else CostLog(trainer.run_dir / "costs.json", trainer)

    def on_round_start(self, trainer: "FederatedTrainer") -> None:
        """Start the round's clock."""
        self.round_began = time.perf_counter()

    def on_round_end(self, trainer: "FederatedTrainer") -> None:
        """Stop it."""
        if self.costs is not None:
            self.costs.add_round(*trainer.progress, time.perf_counter() - self.round_began)

    def on_checkpoint(self, trainer: "FederatedTrainer") -> None:
        """Write the costs."""
        if self.costs is not None:
            self.costs.add(self.lap())
            self.costs.write()

    def on_task_end(self, trainer: "FederatedTrainer") -> None:
        """Write the results so far."""
        if trainer.run_dir is None:
            return
        done = results(trainer)
        files = {
            "results.json": json.dumps(done, indent=1, allow_nan=False) + "\n",
            "matrix.csv": to_csv(matrix_rows(done["accuracy"])),
            "rounds.csv": to_csv(round_rows(done["traffic"], trainer.history, done["tasks_done"])),
        }
        for name, text in files.items():
            write_atomically(trainer.run_dir / name, text.encode())

    def on_fit_end(self, trainer: "FederatedTrainer") -> None:
        """Write everything once more: a run that was complete already did not come past a task's end."""
        self.on_task_end(trainer)
        self.on_checkpoint(trainer)

    def on_exception(self, trainer: "FederatedTrainer") -> None:
        """Interrupted work has its costs, too; the results stand as of the last task."""
        self.on_checkpoint(trainer)


def results(trainer: "FederatedTrainer") -> dict[str, Any]:
    """Everything about a run that is the same whenever it is repeated, in plain values."""
    done = tasks_done(trainer)
    values = {name: amounts[:, :done] for name, amounts in trainer.traffic.items()}
    return {
        "schema": SCHEMA,
        "versions": {name: version(name) for name in ("fedlscl", "torch", "lightning", "timm")},
        "seed": trainer.seed,
        "method": {"class": type(trainer.method).__name__, "fields": plain(trainer.method)},
        "trainer": {name: getattr(trainer, name) for name in ("rounds_per_task", "server_every", "precision")},
        "data": describe_data(trainer),
        "foundation": describe_foundation(trainer),
        "parameters": {
            **parameter_counts(trainer),
            "uploaded_per_round": [int(client.max()) if done else 0 for client in values["up_values"]],
        },
        "tasks_done": done,
        "accuracy": to_lists(trainer.matrix),
        "summary": [plain(summary(trainer.matrix, task)) for task in range(done)],
        "clients": {mask: _clients(trainer.matrix.of(mask), done) for mask in MASKS},
        "traffic": {
            "bytes_up": int(values["up"].sum()),
            "bytes_down": int(values["down"].sum()),
            **{name: amounts.tolist() for name, amounts in values.items()},
        },
    }


def tasks_done(trainer: "FederatedTrainer") -> int:
    """Tasks that every client has learned and was tested on."""
    return int((~trainer.matrix.of("seen")[:, :, 0].isnan()).all(0).sum())


def parameter_counts(trainer: "FederatedTrainer") -> dict[str, Any]:
    """Parameters of each client's net, the shared foundation included in ``total``, by client."""
    nets = [client.net for client in trainer.clients]
    foundation = nets[0].foundation
    shared = 0 if foundation is None else sum(p.numel() for p in foundation.vit.parameters())
    return {
        "foundation": shared,
        "trainable": [sum(p.numel() for p in net.parameters() if p.requires_grad) for net in nets],
        "total": [shared + sum(p.numel() for p in net.parameters()) for net in nets],
    }


def describe_foundation(trainer: "FederatedTrainer") -> dict[str, str] | None:
    """Which frozen ViT, by name and hash of its weights; None where the method has none."""
    foundation = trainer.clients[0].net.foundation
    return None if foundation is None else {"name": foundation.config.name, "fingerprint": foundation.fingerprint}


def describe_data(trainer: "FederatedTrainer") -> dict[str, Any]:
    """The data set and who gets what of it: client x task."""
    data = trainer.datamodule
    tasks, streams = range(trainer.num_tasks), [data.stream(client) for client in range(data.num_clients)]
    return {
        "dataset": data.dataset,
        "fingerprint": data.data.fingerprint,
        "num_classes": data.num_classes,
        "num_clients": data.num_clients,
        "num_tasks": trainer.num_tasks,
        "classes": [[stream.classes(task).tolist() for task in tasks] for stream in streams],
        "train_samples": [[len(stream.train_ids(task)) for task in tasks] for stream in streams],
        "test_samples": [[len(stream.test_ids(task)) for task in tasks] for stream in streams],
    }


def plain(value: Any) -> Any:
    """Fields of dataclasses by name, and what JSON can say as it is; NaN becomes None.

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


def matrix_rows(accuracy: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The accuracy matrix of ``results`` in long form."""
    for phase in PHASES:
        for mask in MASKS:
            for client, after in enumerate(accuracy[phase][mask]):
                for n, row in enumerate(after):
                    for t, value in enumerate(row):
                        if value is not None:
                            names = ("phase", "mask", "client", "after_task", "task", "accuracy")
                            yield dict(zip(names, (phase, mask, client, n, t, value), strict=True))


def round_rows(traffic: dict[str, Any], history: list[dict[str, Any]], tasks: int) -> Iterator[dict[str, Any]]:
    """Bytes and loss terms of every client in every round of the first ``tasks`` tasks."""
    losses: dict[tuple[int, int, int], dict[str, float]] = {}
    for entry in history:
        terms = {f"{entry['stage']}/{name}": value for name, value in entry["terms"].items()}
        losses.setdefault((entry["task"], entry["round"], entry["client"]), {}).update(terms)
    for task in range(tasks):
        for round_ in range(len(traffic["up"][0][task])):
            for client, (up, down) in enumerate(zip(traffic["up"], traffic["down"], strict=True)):
                place = {"task": task, "round": round_, "client": client}
                sizes = {"bytes_up": up[task][round_], "bytes_down": down[task][round_]}
                yield place | sizes | losses.get((task, round_, client), {})


def to_csv(rows: Iterator[dict[str, Any]]) -> str:
    """A table whose columns come in the order in which the rows first name them; floats as repr."""
    collected = list(rows)
    columns = list(dict.fromkeys(name for row in collected for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(collected)
    return text.getvalue()


def _clients(matrix: Tensor, done: int) -> dict[str, Any] | None:
    if not done:
        return None
    average = average_accuracy(matrix)[:, done - 1]
    worst = int(average.argmin())
    return {"average": average.tolist(), "worst": worst, "worst_average": float(average[worst])}
