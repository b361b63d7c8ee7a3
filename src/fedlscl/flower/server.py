"""FlowerPool: the clients of a federation over a network, as the trainer sees them."""

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fedlscl.callbacks.results import write_results
from fedlscl.cli.runs import CHECKPOINT, CONFIG
from fedlscl.federated.checkpoint import load_last_good, write_atomically
from fedlscl.federated.method import Progress, StreamShape
from fedlscl.federated.metrics import MASKS
from fedlscl.federated.payload import MAX_HEADER, Payload, Upload, one_line
from fedlscl.federated.pool import ClientRunner, Uploads
from fedlscl.federated.state import Callback, RunState
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.federated.validation import UploadLimits
from fedlscl.flower.federation import Federation
from fedlscl.flower.messages import (
    BEGIN,
    END,
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

HASH = re.compile("[0-9a-f]{64}")
PHASE = {TEST_BEFORE: "before", TEST_AFTER: "after"}


class Transport(Protocol):
    """Delivers requests, repeatedly if needed: a node carries out no command twice."""

    def exchange(self, requests: dict[int, bytes], seconds: float) -> dict[int, bytes]:
        """Replies by client, of those that arrived in time; returns as soon as all are there."""
        ...


def run_server(
    federation: Federation,
    transport: Transport,
    run_dir: Path,
    deadline: float = 600.0,
    log: Callable[[str], None] = lambda line: None,
) -> FederatedTrainer:
    """Train a federation of remote clients in ``run_dir``, or continue the run that is there.

    Args:
        federation: the configuration.
        transport: delivers requests to the clients.
        run_dir: for the checkpoint and the results.
        deadline: seconds that a round waits for its clients.
        log: takes a line about what happened.

    Raises:
        ValueError: if the folder holds another run, or a round has too few clients; the last checkpoint is kept.
    """
    pool = FlowerPool(federation, transport, deadline, log)
    trainer = copy(federation.trainer)
    # A node keeps the results of two requests only, so that the server may lose one round and no more.
    trainer.devices, trainer.checkpoint_every, trainer.run_dir = 1, 1, run_dir
    trainer.callbacks, trainer.identity = [NetworkLog(pool)], federation.identity
    job = (federation.method, federation.datamodule, federation.seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / CHECKPOINT
    if not path.exists():
        write_atomically(run_dir / CONFIG, federation.text.encode())
        trainer.setup(*job, pool)
        trainer.save(Progress(0, 0))  # with the run's id, before any client knows of it
    else:
        state = load_last_good(path)
        if state["identity"] != federation.identity or "pending" not in state:
            raise ValueError(f"run-dir {str(run_dir)!r} holds another run: choose another folder.")
    trainer.fit(*job, checkpoint=path, identity=federation.identity, pool=pool)
    return trainer


class FlowerPool:
    """Clients on other machines: commands are collected and sent once per round.

    Args:
        federation: the configuration.
        transport: delivers requests to the clients.
        deadline: seconds that a round waits for its clients; a later reply misses the round.
        log: takes a line about what happened.
    """

    def __init__(
        self,
        federation: Federation,
        transport: Transport,
        deadline: float = 600.0,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        if not deadline > 0:
            raise ValueError(f"deadline must be > 0 seconds, got {deadline}.")
        self.federation, self.transport, self.deadline, self.log = federation, transport, deadline, log
        self.run_id = uuid.uuid4().hex
        self.pending = [PendingCommands(client) for client in range(federation.num_clients)]
        self.descriptions: list[list[Description | None]] = [
            [None] * federation.num_tasks for _ in range(federation.num_clients)
        ]
        self.rounds: list[dict[str, Any]] = []
        """Seconds and attendance of every round; they differ from run to run, hence not part of the results."""

    def setup(self, run: RunState, limits: UploadLimits) -> None:
        """Work for a run; called by the trainer's ``setup``."""
        self.run, self.limits = run, limits
        run.data = self._describe_data()

    @property
    def stream(self) -> StreamShape | None:
        """With the number of classes that all clients state; None before the first description."""
        reference, data = self._reference([]), self.federation.datamodule
        return None if reference is None else StreamShape(reference.num_classes, data.num_clients, data.num_tasks)

    def begin_task(self, task: int, first_round: int) -> None:
        """Add the command to all clients."""
        if first_round == 0:
            for pending in self.pending:
                pending.add(BEGIN, task, 0)

    def train(self, progress: Progress, participants: list[int], with_uploads: bool) -> Uploads:
        """Send all open commands with those of this round, and wait for the replies."""
        began = time.perf_counter()
        for pending in self.pending:
            if pending.client in participants:
                pending.add(TRAIN, progress.task, progress.round)
                if progress.last:
                    pending.add(TEST_BEFORE, progress.task, progress.round)
                if with_uploads:
                    pending.add(UPLOAD, progress.task, progress.round)
        asked = [pending for pending in self.pending if progress.round == 0 or pending.client in participants]
        uploads, replied = self._exchange(asked)
        for pending in self.pending:
            pending.drop_round()
        seconds = time.perf_counter() - began
        missed = sorted({pending.client for pending in asked} - replied)
        place = {"task": progress.task, "round": progress.round}
        self.rounds.append({**place, "seconds": seconds, "asked": len(asked), "missed": missed})
        arrived = f"{len(replied)} of {len(asked)} clients in {seconds:.1f} s"
        self.log(f"task {progress.task + 1}, round {progress.round + 1}: {arrived}")
        return uploads

    def download(self, progress: Progress, answers: dict[int, Payload]) -> None:
        """Add the answers to the clients' next request."""
        for client, answer in answers.items():
            self.pending[client].add_download(answer, progress)

    def end_task(self, progress: Progress) -> None:
        """Add the commands to all clients."""
        for pending in self.pending:
            pending.add(END, progress.task, progress.round)
            pending.add(TEST_AFTER, progress.task, progress.round)

    def finish(self, save: Callable[[], None]) -> None:
        """Send what is still open after the last task.

        Raises:
            ValueError: if a client did not answer; the run can be continued when it is back.
        """
        asked = [pending for pending in self.pending if pending.commands]
        replied = self._exchange(asked)[1] if asked else set()
        save()
        if missed := [pending.client for pending in asked if pending.client not in replied]:
            raise ValueError(
                f"clients {missed} were not tested after the last task: start them, correct what the log says of "
                "them, and run again."
            )

    def state_dict(self) -> dict[str, Any]:
        """Open commands and what the clients have stated."""
        answers = list({id(pending.answer): pending.answer for pending in self.pending if pending.answer}.values())
        return {
            "run_id": self.run_id,
            "pending": [pending.state_dict(answers) for pending in self.pending],
            "answers": answers,
            "descriptions": [[found and list(found) for found in row] for row in self.descriptions],
            "rounds": self.rounds,
        }

    def load_state_dict(self, state: dict[str, Any], progress: Progress) -> None:
        """Restore what ``state_dict`` gave."""
        self.run_id, self.rounds = state["run_id"], state["rounds"]
        self.descriptions = [[found and Description(*found) for found in row] for row in state["descriptions"]]
        for pending, values in zip(self.pending, state["pending"], strict=True):
            pending.load_state_dict(values, state["answers"])
        self._update_run()
        self.log(f"resuming after {progress.task} tasks and {progress.round} rounds")

    def _exchange(self, asked: list[PendingCommands]) -> tuple[Uploads, set[int]]:
        """Send open commands and record the results; returns uploads, and the clients with a valid reply."""
        requests = {
            pending.client: pending.request(self.run_id, self.federation.identity).encode() for pending in asked
        }
        replies = self.transport.exchange(requests, self.deadline)
        uploads, parsed = Uploads([], {}), {}
        for client, data in sorted(replies.items()):
            try:
                parsed[client] = self._parse(client, data)
            except ValueError as error:
                uploads.unreadable[client] = str(error)
        stated = [fact for _, facts in parsed.values() for _, fact in facts if isinstance(fact, Description)]
        reference = self._reference(stated)
        for client, (reply, facts) in parsed.items():
            try:
                uploads.received.extend(self._record(client, reply, facts, reference))
            except ValueError as error:
                uploads.unreadable[client] = str(error)
        for client, reason in uploads.unreadable.items():
            self.log(f"client {client} is left out: {reason}")
        self._update_run()
        return uploads, replies.keys() - uploads.unreadable.keys()

    def _parse(self, client: int, data: bytes) -> "tuple[Reply, list[Fact]]":
        reply = read_reply(data, self.limits.num_bytes + MAX_HEADER)
        if reply.refusal:
            raise ValueError(one_line(reply.refusal, 300))
        done = self.pending[client].completed(reply)
        return reply, [(command, parse_result(client, command, result)) for command, result in done]

    def _record(self, client: int, reply: Reply, facts: "list[Fact]", reference: "Description | None") -> list[Upload]:
        for _, fact in facts:
            if isinstance(fact, Description) and reference is not None:
                check_classes(fact, reference)
        self.pending[client].acknowledge(reply)
        for command, fact in facts:
            if isinstance(fact, Measured):
                self.run.matrix.record(fact.phase, client, command.task, fact.accuracies)
            elif isinstance(fact, Description):
                self.descriptions[client][command.task] = fact
        return [fact for _, fact in facts if isinstance(fact, Upload)]

    def _reference(self, stated: "list[Description]") -> "Description | None":
        """A description whose classes all others must share: an accepted one, or that of most clients in ``stated``.

        The first exchange that brings a description decides for the whole run; a tie goes to the lowest client (ours).
        """
        known = next((found for row in self.descriptions for found in row if found is not None), None)
        votes = Counter(classes_of(found) for found in stated)
        return known or max(stated, key=lambda found: votes[classes_of(found)], default=None)

    def _update_run(self) -> None:
        self.run.data = self._describe_data()
        if not self.run.remote_nets and (stream := self.stream) is not None:
            runner = ClientRunner(self.run.method, self.run.engine, self.run.seed)
            self.run.remote_nets = [runner.build(p.client, stream).to("meta") for p in self.pending]

    def _describe_data(self) -> dict[str, Any]:
        """The same as `describe_data` gives of a simulation, as far as the clients have come."""
        known = [found for row in self.descriptions for found in row if found is not None]
        prints = sorted({found.fingerprint for found in known})

        def table(name: str) -> list[list[Any]]:
            return [[found and getattr(found, name) for found in row] for row in self.descriptions]

        return {
            "dataset": self.federation.datamodule.dataset,
            "fingerprint": prints[0] if len(prints) == 1 else prints,
            "num_classes": self.stream and self.stream.num_classes,
            "num_clients": len(self.descriptions),
            "num_tasks": len(self.descriptions[0]),
            "classes": table("classes"),
            "train_samples": table("train_samples"),
            "test_samples": table("test_samples"),
        }


class NetworkLog(Callback):
    """Writes network.json, and the results as far as the clients have reported, with every checkpoint."""

    def __init__(self, pool: FlowerPool) -> None:
        self.pool = pool

    def on_checkpoint(self, run: RunState) -> None:
        """Update the files."""
        assert run.run_dir is not None
        write_atomically(run.run_dir / "network.json", json.dumps(self.pool.rounds, indent=1).encode())
        if run.remote_nets:
            write_results(run)


class Description(NamedTuple):
    """What a client states when it begins a task: counts, no sample."""

    num_classes: int
    fingerprint: str
    class_names: str
    """SHA-256 of the names in label order, `names_hash`: labels have one meaning where it is equal."""
    classes: list[int]
    train_samples: int
    test_samples: int


class Measured(NamedTuple):
    """Accuracies (masks, tasks so far), 'before' or 'after' the last aggregation of a task."""

    phase: str
    accuracies: Tensor


Fact = tuple[Command, Upload | Description | Measured | None]
"""A command and the content of its result."""


def classes_of(found: Description) -> tuple[int, str]:
    """What must be equal on all nodes."""
    return found.num_classes, found.class_names


def parse_result(client: int, command: Command, result: Result) -> Upload | Description | Measured | None:
    """Content of a command's result; uploads are validated further before aggregation.

    Raises:
        ValueError: if it is malformed.
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
            raise ValueError(f"its accuracies after task {command.task + 1} are not in [0, 1]")
        return Measured(PHASE[command.kind], values)
    return parse_description(result.said) if command.kind == BEGIN else None


def parse_description(said: dict[str, Any]) -> Description:
    """A description whose parts have the right types.

    Raises:
        ValueError: if one has not.
    """
    values = [said.get(name) for name in Description._fields]
    num_classes, fingerprint, class_names, classes, train, test = values
    whole = all(type(number) is int and number >= 0 for number in (num_classes, train, test))
    hashes = all(type(text) is str and HASH.fullmatch(text) for text in (fingerprint, class_names))
    if not (whole and hashes and type(classes) is list):
        raise ValueError("what it states about its data is malformed: use the same version of fedlscl everywhere")
    if not all(type(label) is int and 0 <= label < said["num_classes"] for label in classes):
        raise ValueError("it names classes that its data set does not have")
    return Description(*values)


def check_classes(found: Description, reference: Description) -> None:
    """Check that labels mean the same on a client as on the others.

    Raises:
        ValueError: if the number of classes, their names or the order of the names differ.
    """
    if found.num_classes != reference.num_classes:
        flaw = f"num_classes must be {reference.num_classes} as on the other nodes, got {found.num_classes}"
    elif found.class_names != reference.class_names:
        own, others = found.class_names[:12], reference.class_names[:12]
        flaw = f"class_names must have the hash {others} of the other nodes, got {own}"
    else:
        return
    raise ValueError(f"{flaw}: give every node the same classes under the same names, numbered in the same order")
