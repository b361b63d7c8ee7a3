"""What the server knows of a run: accuracies, traffic, and what its clients say of their data."""

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor

from fedlscl.deploy.federation import Federation
from fedlscl.deploy.letters import BEGIN, TEST_AFTER, TEST_BEFORE, UPLOAD, Command, Result, tensors_under
from fedlscl.federated.metrics import MASKS, AccuracyMatrix
from fedlscl.federated.payload import Upload
from fedlscl.federated.traffic import no_traffic

PHASE = {TEST_BEFORE: "before", TEST_AFTER: "after"}


class Description(NamedTuple):
    """What a client says when it begins a task: counts, no sample."""

    num_classes: int
    fingerprint: str
    classes: list[int]
    train_samples: int
    test_samples: int


class Knowledge:
    """Everything that results.json is made of."""

    def __init__(self, federation: Federation) -> None:
        clients, tasks = federation.num_clients, federation.num_tasks
        self.dataset = federation.datamodule.dataset
        self.matrix = AccuracyMatrix(clients, tasks)
        self.traffic = no_traffic(clients, tasks, federation.trainer.rounds_per_task)
        self.history: list[dict[str, Any]] = []
        self.descriptions: list[list[Description | None]] = [[None] * tasks for _ in range(clients)]
        self.rounds: list[dict[str, Any]] = []
        """Seconds and attendance of every round; never the same twice, so apart from the results."""

    @property
    def num_classes(self) -> int | None:
        """What most clients say; None as long as nobody has."""
        said = Counter(found.num_classes for row in self.descriptions for found in row if found is not None)
        return said.most_common(1)[0][0] if said else None

    def enter(self, client: int, task: int, fact: "Description | Measured") -> None:
        """Take over what a client said."""
        if isinstance(fact, Measured):
            self.matrix.record(fact.phase, client, task, fact.accuracies)
        else:
            self.descriptions[client][task] = fact

    def data(self) -> dict[str, Any]:
        """The same as ``describe_data`` gives of a simulation, as far as the clients have come."""
        known = [found for row in self.descriptions for found in row if found is not None]
        prints = sorted({found.fingerprint for found in known})

        def table(name: str) -> list[list[Any]]:
            return [[found and getattr(found, name) for found in row] for row in self.descriptions]

        return {
            "dataset": self.dataset,
            "fingerprint": prints[0] if len(prints) == 1 else prints,
            "num_classes": self.num_classes,
            "num_clients": len(self.descriptions),
            "num_tasks": len(self.descriptions[0]),
            "classes": table("classes"),
            "train_samples": table("train_samples"),
            "test_samples": table("test_samples"),
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text."""
        said = [[found and list(found) for found in row] for row in self.descriptions]
        return {
            "matrix": self.matrix.values,
            "traffic": self.traffic,
            "history": self.history,
            "descriptions": said,
            "rounds": self.rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.matrix.values, self.traffic = state["matrix"], state["traffic"]
        self.history, self.rounds = state["history"], state["rounds"]
        self.descriptions = [[found and Description(*found) for found in row] for row in state["descriptions"]]


class Measured(NamedTuple):
    """Accuracies (masks, tasks so far), 'before' or 'after' the last aggregation of a task."""

    phase: str
    accuracies: Tensor


def fact_of(client: int, command: Command, result: Result) -> Upload | Description | Measured | None:
    """What the result of a command says; the door checks uploads further.

    Raises:
        ValueError: if it cannot be right.
    """
    if command.kind == UPLOAD:
        if "class_counts" not in result.tensors:
            raise ValueError("its upload has no class counts")
        payload, counts = tensors_under("payload", result.tensors), result.tensors["class_counts"]
        return Upload(client=client, task=command.task, round=command.round, payload=payload, class_counts=counts)
    if command.kind in PHASE:
        values = result.tensors.get("accuracies")
        if values is None or values.shape != (len(MASKS), command.task + 1):
            raise ValueError(f"its accuracies after task {command.task + 1} are missing or of another shape")
        if not (values.is_floating_point() and ((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"its accuracies after task {command.task + 1} are no shares")
        return Measured(PHASE[command.kind], values)
    return described(result.said) if command.kind == BEGIN else None


def described(said: dict[str, Any]) -> Description:
    """A description that has the right parts.

    Raises:
        ValueError: if it has not.
    """
    values = [said.get(name) for name in Description._fields]
    num_classes, fingerprint, classes, train, test = values
    whole = all(type(number) is int and number >= 0 for number in (num_classes, train, test))
    if not (whole and type(fingerprint) is str and len(fingerprint) <= 64 and type(classes) is list):
        raise ValueError("what it says of its data is malformed")
    if not all(type(label) is int and 0 <= label < said["num_classes"] for label in classes):
        raise ValueError("it names classes that its data set has not")
    return Description(said["num_classes"], fingerprint, classes, said["train_samples"], said["test_samples"])
