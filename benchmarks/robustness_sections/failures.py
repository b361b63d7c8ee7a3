"""Clients that fail, more and more of them: does every run finish, or stop because of its quorum?"""

from functools import partial
from pathlib import Path
from typing import Any

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.metrics import summary
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.methods import FedAvg
from robustness_sections.notes import Notes

RATES = tuple(tenths / 10 for tenths in range(9))


def failures(notes: Notes, rates: tuple[float, ...] = RATES, seeds: int = 10, rounds: int = 3) -> dict[str, Any]:
    """By failure rate: how runs with a quorum of 1 ended, and accuracies of all runs where rounds may pass without."""
    found = {}
    for rate in rates:
        ends, accuracies = {"finished": 0, "stopped for want of a quorum": 0}, []
        for seed in range(seeds):
            end, accuracy = notes.once(f"rate {rate:.1f}, seed {seed}", partial(outcome, rate, seed, rounds))
            ends[end] += 1
            accuracies.append(accuracy)
        found[f"{rate:.1f}"] = {**ends, "accuracies": accuracies}
    return found


def outcome(rate: float, seed: int, rounds: int) -> tuple[str, float]:
    """How a run with a quorum of 1 ends, and the accuracy of one without."""
    end = "finished"
    try:
        trainer = learn(rate, seed, rounds, quorum=1)
    except ValueError as error:
        if not str(error).startswith("quorum 1 is not met: 0 of 5 clients answered"):
            raise
        end, trainer = "stopped for want of a quorum", learn(rate, seed, rounds, quorum=0)
    return end, summary(trainer.matrix, trainer.run.num_tasks - 1)["class_il/average"]


def learn(rate: float, seed: int, rounds: int, quorum: int) -> FederatedTrainer:
    """Digits, five clients, three tasks of two classes, FedAvg of a small CNN."""
    data = SpatialTemporalDataModule(
        dataset="digits",
        num_clients=5,
        num_tasks=3,
        private_classes=1,
        public_classes=5,
        batch_size=16,
        train_per_class=40,
        test_per_class=30,
    )
    options = {"rounds_per_task": rounds, "accelerator": "cpu", "failure_rate": rate, "quorum": quorum}
    trainer = FederatedTrainer(**options)
    method = FedAvg(small_model="test_resnet", small_image_size=16, local_epochs=2, batch_size=16, lr=0.003)
    trainer.fit(method, data, seed)
    return trainer


def draw(found: dict[str, Any], path: Path) -> None:
    """Accuracy over failure rate: mean, and the range of seeds."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fedlscl"
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    rates = [100 * float(rate) for rate in found]
    rows = [[100 * value for value in entry["accuracies"]] for entry in found.values()]
    axes.fill_between(rates, list(map(min, rows)), list(map(max, rows)), alpha=0.2, label="range of seeds")
    axes.plot(rates, [sum(row) / len(row) for row in rows], marker="o", label="mean")
    axes.set(xlabel="clients that fail in a round [%]", ylabel="class-incremental accuracy [%]", ylim=(0, None))
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
