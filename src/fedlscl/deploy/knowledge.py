"""What the server knows of a run: accuracies, traffic, and what its clients say of their data."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from fedlscl.deploy.federation import Federation
from fedlscl.deploy.letters import BEGIN, TEST_AFTER, TEST_BEFORE, UPLOAD, Command, Result, tensors_under
from fedlscl.federated.metrics import MASKS, AccuracyMatrix
from fedlscl.federated.payload import Upload
from fedlscl.federated.traffic import no_traffic

HASH = re.compile("[0-9a-f]{64}")
PHASE = {TEST_BEFORE: "before", TEST_AFTER: "after"}


class Description(NamedTuple):
    """What a client says when it begins a task: counts, no sample."""

    num_classes: int
    fingerprint: str
    class_names: str
    """SHA-256 of the names in label order, `names_hash`: labels have one meaning where it is equal."""
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
        """What all clients say; None before the first description."""
        reference = self.reference()
        return None if reference is None else reference.num_classes

    def reference(self, fresh: Iterable[Description] = ()) -> Description | None:
        """A description whose classes the others have to share: what has been accepted, or most of ``fresh``.

        The first exchange that brings a description decides for the whole run; a tie goes to the lowest client (ours).
        """
        known = next((found for row in self.descriptions for found in row if found is not None), None)
        fresh = list(fresh)
        votes = Counter(classes_of(found) for found in fresh)
        return known or max(fresh, key=lambda found: votes[classes_of(found)], default=None)

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


def classes_of(found: Description) -> tuple[int, str]:
    """What has to be equal on all nodes."""
    return found.num_classes, found.class_names


class Measured(NamedTuple):
    """Accuracies (masks, tasks so far), 'before' or 'after' the last aggregation of a task."""

    phase: str
    accuracies: Tensor


Fact = tuple[Command, Upload | Description | Measured | None]
"""A command and what its result says."""


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
    num_classes, fingerprint, class_names, classes, train, test = values
    whole = all(type(number) is int and number >= 0 for number in (num_classes, train, test))
    hashes = all(type(text) is str and HASH.fullmatch(text) for text in (fingerprint, class_names))
    if not (whole and hashes and type(classes) is list):
        raise ValueError("what it says of its data is malformed: use the same version of fedlscl everywhere")
    if not all(type(label) is int and 0 <= label < said["num_classes"] for label in classes):
        raise ValueError("it names classes that its data set has not")
    return Description(*values)


def check_classes(found: Description, reference: Description) -> None:
    """Compare what the labels of a client mean with what they mean to the others.

    Raises:
        ValueError: if numbers of classes, their names or the order of the names differ.
    """
    if found.num_classes != reference.num_classes:
        flaw = f"num_classes must be {reference.num_classes} as on the other nodes, got {found.num_classes}"
    elif found.class_names != reference.class_names:
        own, others = found.class_names[:12], reference.class_names[:12]
        flaw = f"class_names must have the hash {others} of the other nodes, got {own}"
    else:
        return
    raise ValueError(f"{flaw}: give every node the same classes under the same names, numbered in the same order")
