"""Result files of a run: what it is and what came out, equal to the byte however often it was interrupted."""

import time
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.costs import CostLog, Timed
from fedlscl.federated.description import (
    describe_data,
    describe_foundation,
    describe_small_models,
    parameter_counts,
    plain,
)
from fedlscl.federated.export import matrix_rows, round_rows, to_csv, to_json
from fedlscl.federated.flops import flops_by_client
from fedlscl.federated.metrics import MASKS, average_accuracy, summary, to_lists

if TYPE_CHECKING:
    from fedlscl.federated.trainer import FederatedTrainer

SCHEMA = 1
"""Of results.json; raised when a name in it changes its meaning."""


class Results(Timed):
    """Writes results.json, matrix.csv and rounds.csv after every task, and costs.json after every round.

    Clients, tasks and rounds are counted from 0 in all of them, accuracies are fractions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs: CostLog | None = None

    def on_fit_start(self, trainer: "FederatedTrainer") -> None:
        """Take up the costs of the sessions before this one."""
        if trainer.run_dir is not None:
            self.costs = CostLog(trainer.run_dir / "costs.json", trainer)

    def on_round_start(self, trainer: "FederatedTrainer") -> None:
        """Start the round's clock."""
        self.round_began = time.perf_counter()

    def on_round_end(self, trainer: "FederatedTrainer") -> None:
        """Stop it."""
        if self.costs is not None:
            self.costs.add_round(trainer.progress.task, trainer.progress.round, time.perf_counter() - self.round_began)

    def on_checkpoint(self, trainer: "FederatedTrainer") -> None:
        """Write the costs."""
        if self.costs is not None:
            self.costs.add(self.lap())
            self.costs.write()

    def on_task_end(self, trainer: "FederatedTrainer") -> None:
        """Write the results so far."""
        if trainer.run_dir is not None:
            write_results(trainer)

    def on_fit_end(self, trainer: "FederatedTrainer") -> None:
        """Write everything once more: a run that was complete already did not come past a task's end."""
        self.on_task_end(trainer)
        self.on_checkpoint(trainer)

    def on_exception(self, trainer: "FederatedTrainer") -> None:
        """Interrupted work has its costs, too; the results stand as of the last task."""
        with suppress(OSError):
            self.on_checkpoint(trainer)


def write_results(trainer: "FederatedTrainer", data: dict[str, Any] | None = None) -> None:
    """Write results.json, matrix.csv and rounds.csv; ``data`` as for ``results``."""
    assert trainer.run_dir is not None
    done = results(trainer, data)
    files = {
        "results.json": to_json(done),
        "matrix.csv": to_csv(matrix_rows(done["accuracy"])),
        "rounds.csv": to_csv(round_rows(done["traffic"], trainer.history, done["tasks_done"])),
    }
    for name, text in files.items():
        write_atomically(trainer.run_dir / name, text.encode())


def results(trainer: "FederatedTrainer", data: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything about a run that is the same whenever it is repeated, in plain values.

    ``data`` is what ``describe_data`` would say, where the trainer has none to look into.
    """
    done = tasks_done(trainer)
    values = {name: amounts[:, :done] for name, amounts in trainer.traffic.items()}
    return {
        "schema": SCHEMA,
        "versions": {name: version(name) for name in ("fedlscl", "torch", "lightning", "timm")},
        "seed": trainer.seed,
        "method": {"name": type(trainer.method).__name__, "fields": plain(trainer.method)},
        "trainer": {name: getattr(trainer, name) for name in ("rounds_per_task", "server_every", "precision")},
        "data": describe_data(trainer) if data is None else data,
        "foundation": describe_foundation(trainer),
        "small_models": describe_small_models(trainer),
        "parameters": {
            **parameter_counts(trainer),
            "uploaded_per_round": [int(client.max()) if done else 0 for client in values["up_values"]],
        },
        "flops_per_image": flops_by_client(trainer) if data is None else None,
        "tasks_done": done,
        "accuracy": to_lists(trainer.matrix),
        "summary": [plain(summary(trainer.matrix, task)) for task in range(done)],
        "clients": {mask: _clients(trainer.matrix.of(mask), done) for mask in MASKS},
        "quarantined": [refusal._asdict() for refusal in trainer.server.door.refusals],
        "traffic": {
            "up_bytes": int(values["up"].sum()),
            "down_bytes": int(values["down"].sum()),
            **{name: amounts.tolist() for name, amounts in values.items()},
        },
    }


def tasks_done(trainer: "FederatedTrainer") -> int:
    """Tasks that every client has learned and was tested on."""
    return int((~trainer.matrix.of("seen")[:, :, 0].isnan()).all(0).sum())


def _clients(matrix: Tensor, done: int) -> dict[str, Any] | None:
    if not done:
        return None
    average = average_accuracy(matrix)[:, done - 1]
    worst = int(average.argmin())
    return {"average": average.tolist(), "worst": worst, "worst_average": float(average[worst])}
