"""Algorithm 1 over a network: the server's part of `FederatedTrainer`, with letters in place of calls."""

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from fedlscl.callbacks import AT_SERVER
from fedlscl.callbacks.results import write_results
from fedlscl.cli.runs import CHECKPOINT, CONFIG
from fedlscl.data import Batch
from fedlscl.federated.cache import PrefixCache
from fedlscl.federated.checkpoint import load_last_good, save_checkpoint, write_atomically
from fedlscl.federated.client import Client
from fedlscl.federated.engine import Engine, connect
from fedlscl.federated.method import Progress, Stage
from fedlscl.federated.metrics import MASKS, AccuracyMatrix
from fedlscl.federated.payload import LARGEST_HEADER, Upload, one_line
from fedlscl.federated.trainer import LocalWork, Server, count, no_traffic
from fedlscl.federated.validation import UploadValidator
from fedlscl.flower.federation import Federation
from fedlscl.flower.messages import (
    BEGIN,
    TEST_AFTER,
    TEST_BEFORE,
    TRAIN,
    UPLOAD,
    Command,
    PendingCommands,
    Reply,
    Result,
    read_reply,
    tensors_under,
)
from fedlscl.nets.net import Net

# What the server knows of a run: accuracies, traffic, and what its clients say of their data.

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


class Transport(Protocol):
    """Delivers letters, as often as it takes: a node does nothing twice."""

    def exchange(self, requests: dict[int, bytes], seconds: float) -> dict[int, bytes]:
        """Replies by client, of those that came in time; returns as soon as all are there."""
        ...


class Coordinator:
    """Runs the tasks and rounds of a federation whose clients are elsewhere.

    Args:
        federation: the configuration.
        transport: carries the letters.
        run_dir: for the checkpoint and the results; a run that has a checkpoint there goes on from it.
        deadline: seconds that a round waits for its clients; who is later misses it.
        say: takes a line about what happened.
    """

    def __init__(
        self,
        federation: Federation,
        transport: Transport,
        run_dir: Path,
        deadline: float = 600.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if not deadline > 0:
            raise ValueError(f"deadline {deadline} leaves clients no time: choose more than 0 seconds.")
        self.federation, self.transport, self.run_dir, self.deadline, self.say = (
            federation,
            transport,
            run_dir,
            deadline,
            say,
        )
        self.method, self.seed, self.trainer = deepcopy(federation.method), federation.seed, federation.trainer
        self.last_round = self.trainer.rounds_per_task - 1
        self.run = uuid.uuid4().hex
        self.knowledge = Knowledge(federation)
        self.pending_by_client = [PendingCommands(client) for client in range(federation.num_clients)]
        self.engine = Engine(connect(self.trainer.accelerator, 1, self.trainer.precision), cast(PrefixCache, NoCache()))
        self.server: Server | None = None
        self.nets: list[Net] = []

    def fit(self) -> Knowledge:
        """Learn all tasks, from the checkpoint on where there is one.

        Raises:
            ValueError: where a round has too few clients; the checkpoint of the round before stands.
        """
        start = self._begin()
        for task in range(start.task, self.federation.num_tasks):
            for round_ in range(start.round if task == start.task else 0, self.last_round + 1):
                self._round(Progress(task, round_, round_ == self.last_round, task == self.federation.num_tasks - 1))
        self._end()
        return self.knowledge

    def _round(self, progress: Progress) -> None:
        began = time.perf_counter()
        participants = self.trainer.sampling.participants(len(self.pending_by_client), self.seed, progress)
        aggregates = self.trainer.server_every == "round" or progress.last
        for pending in self.pending_by_client:
            if progress.round == 0:
                pending.turn_over(progress.task, self.last_round)
            if pending.client in participants:
                kinds = [TRAIN, *[TEST_BEFORE] * progress.last, *[UPLOAD] * aggregates]
                for kind in kinds:
                    pending.tell(kind, *progress)
        asked = [pending for pending in self.pending_by_client if progress.round == 0 or pending.client in participants]
        uploads, came = self._exchange(asked, progress)
        for pending in self.pending_by_client:
            pending.miss()
        if aggregates:
            self._server_round(uploads, progress)
        seconds, missed = time.perf_counter() - began, sorted({pending.client for pending in asked} - came)
        place = {"task": progress.task, "round": progress.round}
        self.knowledge.rounds.append({**place, "seconds": seconds, "asked": len(asked), "missed": missed})
        self._save(Progress(progress.task + 1, 0) if progress.last else Progress(progress.task, progress.round + 1))
        here = f"{len(came)} of {len(asked)} clients in {seconds:.1f} s"
        self.say(f"task {progress.task + 1}, round {progress.round + 1}: {here}")

    def _exchange(self, pending_by_client: list[PendingCommands], progress: Progress) -> tuple[list[Upload], set[int]]:
        """Send what is open, enter what comes back; returns uploads, and the clients that replied as they should."""
        requests = {
            pending.client: pending.request(self.run, self.federation.identity).encode()
            for pending in pending_by_client
        }
        replies = self.transport.exchange(requests, self.deadline)
        read: dict[int, tuple[Reply, list[Fact]]] = {}
        uploads: list[Upload] = []
        errors_found: dict[int, str] = {}
        for client, data in sorted(replies.items()):
            try:
                read[client] = self._read(client, data)
            except ValueError as error:
                errors_found[client] = str(error)
        found = [fact for _, facts in read.values() for _, fact in facts if isinstance(fact, Description)]
        reference = self.knowledge.reference(found)
        for client, (reply, facts) in read.items():
            try:
                uploads += self._take(client, reply, facts, reference)
            except ValueError as error:
                errors_found[client] = str(error)
        self._open()
        for client, flaw in errors_found.items():
            self.say(f"client {client} is left out: {flaw}")
            if self.server is not None:
                self.server.validator.reject(client, progress, flaw)
        return uploads, replies.keys() - errors_found.keys()

    def _read(self, client: int, data: bytes) -> tuple[Reply, list[Fact]]:
        reply = read_reply(data, self.trainer.limits.num_bytes + LARGEST_HEADER)
        if reply.refusal:
            raise ValueError(one_line(reply.refusal, 300))
        done = self.pending_by_client[client].done_in(reply)
        return reply, [(command, fact_of(client, command, result)) for command, result in done]

    def _take(self, client: int, reply: Reply, facts: list[Fact], reference: Description | None) -> list[Upload]:
        for _, fact in facts:
            if isinstance(fact, Description) and reference is not None:
                check_classes(fact, reference)
        self.pending_by_client[client].acknowledge(reply)
        for command, fact in facts:
            if isinstance(fact, Description | Measured):
                self.knowledge.enter(client, command.task, fact)
        return [fact for _, fact in facts if isinstance(fact, Upload)]

    def _server_round(self, uploads: list[Upload], progress: Progress) -> None:
        if self.server is not None:
            for upload in uploads:
                count(self.knowledge.traffic, "up", upload.client, progress, upload.payload)
            uploads = self.server.filter(uploads, progress)
        self.trainer.sampling.check_quorum(len(uploads), len(self.pending_by_client), progress)
        if self.server is None or not any(upload.num_samples for upload in uploads):
            return

        def train(client: Client | None, stage: Stage) -> None:
            terms = self.engine.train(stage)
            where = {"task": progress.task, "round": progress.round, "client": AT_SERVER}
            self.knowledge.history.append({**where, "stage": stage.name, "terms": terms})

        self.server.train(uploads, progress, train)
        for client, answer in self.server.aggregate(uploads, progress).items():
            count(self.knowledge.traffic, "down", client, progress, answer)
            self.pending_by_client[client].give(answer, progress)

    def _open(self) -> None:
        """Make the server as soon as a client has said how many classes there are."""
        if self.server is None and (num_classes := self.knowledge.num_classes) is not None:
            validator = UploadValidator(self.method, len(self.pending_by_client), num_classes, self.trainer.limits)
            self.server = Server(self.method, self.seed, validator)
            local = LocalWork(self.method, self.engine, self.seed)
            self.nets = [local.build(pending.client, num_classes).to("meta") for pending in self.pending_by_client]

    def _begin(self) -> Progress:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / CHECKPOINT
        if not path.exists():
            write_atomically(self.run_dir / CONFIG, self.federation.text.encode())
            self._save(Progress(0, 0))
            return Progress(0, 0)
        state = load_last_good(path)
        if state["identity"] != self.federation.identity or "pending" not in state:
            raise ValueError(f"run-dir {str(self.run_dir)!r} holds another run: choose another folder.")
        self.run = state["run"]
        self.knowledge.load_state_dict(state["knowledge"])
        self.method.load_state_dict(state["method"])
        self._open()
        if self.server is not None:
            self.server.validator.load_state_dict(state["validator"])
        for pending, values in zip(self.pending_by_client, state["pending"], strict=True):
            pending.load_state_dict(values, state["answers"])
        progress = Progress(*state["progress"])
        self.say(f"going on from {path}: {progress.task} tasks and {progress.round} rounds are done")
        return progress

    def _end(self) -> None:
        """Let every client end its last task and be tested."""
        last = self.federation.num_tasks - 1
        for pending in self.pending_by_client:
            pending.end(last, self.last_round)
        asked = [pending for pending in self.pending_by_client if pending.commands]
        _, came = self._exchange(asked, Progress(last, self.last_round, True, True)) if asked else ([], set())
        self._save(Progress(last + 1, 0))
        if missing := [pending.client for pending in asked if pending.client not in came]:
            raise ValueError(
                f"clients {missing} were not tested after the last task: start them, correct what the log says of "
                "them, and run again."
            )

    def _save(self, progress: Progress) -> None:
        """Write the checkpoint, and the results as far as they go."""
        answers = list(
            {id(pending.answer): pending.answer for pending in self.pending_by_client if pending.answer}.values()
        )
        state = {
            "identity": self.federation.identity,
            "run": self.run,
            "progress": list(progress),
            "method": self.method.state_dict(),
            "validator": {} if self.server is None else self.server.validator.state_dict(),
            "knowledge": self.knowledge.state_dict(),
            "pending": [pending.state_dict(answers) for pending in self.pending_by_client],
            "answers": answers,
        }
        save_checkpoint(self.run_dir / CHECKPOINT, state)
        write_atomically(self.run_dir / "network.json", json.dumps(self.knowledge.rounds, indent=1).encode())
        if self.server is not None:
            write_results(cast(Any, Viewed(self)), self.knowledge.data())


class Viewed:
    """A coordinator as `results` sees a trainer."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.run_dir, self.method, self.seed = coordinator.run_dir, coordinator.method, coordinator.seed
        trainer, knowledge = coordinator.trainer, coordinator.knowledge
        self.rounds_per_task, self.server_every = trainer.rounds_per_task, trainer.server_every
        self.precision, self.sampling, self.limits = trainer.precision, trainer.sampling, trainer.limits
        self.matrix, self.traffic, self.history = knowledge.matrix, knowledge.traffic, knowledge.history
        self.server, self.num_tasks = coordinator.server, coordinator.federation.num_tasks
        self.clients = [Built(net) for net in coordinator.nets]


class Built(NamedTuple):
    """Of a client the server knows the net's structure."""

    net: Net


class NoCache:
    """In place of the cache of frozen prefixes: the server has no images whose prefix could come again."""

    def attach(self, batch: Batch, *_: Any) -> Batch:
        """The batch as it is."""
        return batch
