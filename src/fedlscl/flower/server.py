"""The server: the trainer over FlowerPool, whose clients are on other machines."""

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from typing_extensions import override

from fedlscl.callbacks.results import write_results
from fedlscl.cli.runs import CHECKPOINT, CONFIG
from fedlscl.federated.checkpoint import load_last_good, write_atomically
from fedlscl.federated.method import Progress, StreamShape
from fedlscl.federated.metrics import MASKS
from fedlscl.federated.payload import MAX_HEADER, Payload, Upload, one_line
from fedlscl.federated.pool import ClientPool, ClientRunner, Uploads, evaluated_on
from fedlscl.federated.readout import check_widths
from fedlscl.federated.state import Callback, RunState
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.flower.federation import Federation
from fedlscl.flower.messages import (
    BEGIN,
    END,
    READOUT,
    READOUT_SUMS,
    TEST_AFTER,
    TEST_BEFORE,
    TRAIN,
    UPLOAD,
    Command,
    PendingCommands,
    Reply,
    Result,
    read_reply,
    under_prefix,
)

SHA256 = re.compile("[0-9a-f]{64}")
PHASE = {TEST_BEFORE: "before", TEST_AFTER: "after"}
Log = Callable[[str], None]


class Transport(Protocol):
    """Delivers requests, repeatedly if needed: a node carries out no command twice."""

    def exchange(self, requests: dict[int, bytes], seconds: float) -> dict[int, bytes]:
        """Replies by client that arrive in time; returns as soon as all have arrived."""
        ...


def run_server(
    federation: Federation,
    transport: Transport,
    run_dir: Path,
    deadline: float = 600.0,
    log: Log = lambda line: None,
) -> FederatedTrainer:
    """Train a federation of remote clients, or resume the run in ``run_dir``.

    Args:
        federation: the configuration.
        transport: delivers requests to the clients.
        run_dir: folder of checkpoint and results.
        deadline: seconds that a round waits for its clients.
        log: writes one line.

    Raises:
        ValueError: if the folder contains another run, or a round has too few clients; the last checkpoint is kept.
    """
    pool = FlowerPool(federation, transport, deadline, log)
    trainer = copy(federation.trainer)
    # Nodes keep the results of two requests only, hence a checkpoint after every round.
    trainer.devices, trainer.checkpoint_every, trainer.run_dir = 1, 1, run_dir
    trainer.callbacks, trainer.identity = [NetworkLog(pool)], federation.identity
    job = (federation.method, federation.datamodule, federation.seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / CHECKPOINT
    if path.exists():
        state = load_last_good(path)
        if state["identity"] != federation.identity or "pending" not in state:
            raise ValueError(f"run-dir {str(run_dir)!r} contains another run: choose another folder.")
    else:
        write_atomically(run_dir / CONFIG, federation.text.encode())
        trainer.setup(*job, pool)
        trainer.save(Progress(0, 0))  # the run's id is saved before a client gets it
    trainer.fit(*job, checkpoint=path, identity=federation.identity, pool=pool)
    return trainer


class NetworkLog(Callback):
    """Writes network.json and the results of all clients that have reported, with every checkpoint."""

    def __init__(self, pool: "FlowerPool") -> None:
        self.pool = pool

    @override
    def on_checkpoint(self, run: RunState) -> None:
        assert run.run_dir is not None
        write_atomically(run.run_dir / "network.json", json.dumps(self.pool.rounds, indent=1).encode())
        if run.remote_nets:
            write_results(run)


class Description(NamedTuple):
    """A client's report at the start of a task: counts only."""

    num_classes: int
    fingerprint: str
    class_names: str
    """`names_hash` of the class names in label order."""
    classes: list[int]
    train_samples: int
    test_samples: int


Fact = Upload | Description | Tensor | dict[str, Tensor] | None
"""Content of a command's result; a tensor has the accuracies (masks, tasks so far), a dict those of readouts."""


class FlowerPool(ClientPool):
    """Clients on other machines: commands are collected and sent once per round.

    Args:
        federation: the configuration.
        transport: delivers requests to the clients.
        deadline: seconds that a round waits for its clients; later replies miss the round.
        log: writes one line.
    """

    def __init__(
        self, federation: Federation, transport: Transport, deadline: float = 600.0, log: Log = lambda line: None
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
        """Seconds and missing clients of every round; not part of the results, since they differ from run to run."""

    @property
    @override
    def stream(self) -> StreamShape | None:
        reference, data = self._reference([]), self.federation.datamodule
        return None if reference is None else StreamShape(reference.num_classes, data.num_clients, data.num_tasks)

    @override
    def setup(self, run: RunState) -> None:
        self.run = run
        self._update_run()

    @override
    def begin_task(self, task: int, first_round: int) -> None:
        if first_round == 0:
            for pending in self.pending:
                pending.add(BEGIN, task, 0)

    @override
    def train(self, progress: Progress, participants: list[int], with_uploads: bool) -> Uploads:
        began = time.perf_counter()
        kinds = [TRAIN]
        if progress.last:
            kinds.append(TEST_BEFORE)
        if with_uploads:
            kinds.append(UPLOAD)
        for client in participants:
            for kind in kinds:
                self.pending[client].add(kind, progress.task, progress.round)
        asked = [pending for pending in self.pending if progress.round == 0 or pending.client in participants]
        uploads, replied = self._exchange(asked)
        for pending in self.pending:
            pending.drop_round()
        seconds = time.perf_counter() - began
        missed = sorted({pending.client for pending in asked} - replied)
        position = {"task": progress.task, "round": progress.round}
        self.rounds.append({**position, "seconds": seconds, "asked": len(asked), "missed": missed})
        arrived = f"{len(replied)} of {len(asked)} clients in {seconds:.1f} s"
        self.log(f"task {progress.task + 1}, round {progress.round + 1}: {arrived}")
        return uploads

    @override
    def download(self, progress: Progress, answers: dict[int, Payload]) -> None:
        for client, answer in answers.items():
            self.pending[client].add_download(answer, progress)

    @override
    def end_task(self, progress: Progress) -> None:
        for pending in self.pending:
            pending.add(END, progress.task, progress.round)
            pending.add(TEST_AFTER, progress.task, progress.round)

    @override
    def readout_sums(self, progress: Progress, save: Callable[[], None]) -> Uploads:
        save()  # nodes keep the results of two requests only
        for pending in self.pending:
            pending.add(READOUT_SUMS, progress.task, progress.round)
        uploads, replied = self._exchange(self.pending, READOUT_SUMS)
        for pending in self.pending:
            pending.drop_round()
            if pending.client not in replied:
                uploads.unreadable.setdefault(pending.client, "its sums of features did not arrive in time")
        return uploads

    @override
    def evaluate_readouts(self, progress: Progress, answers: dict[int, Payload]) -> None:
        for client, answer in answers.items():
            self.pending[client].add_readout(answer, progress)

    @override
    def finish(self, save: Callable[[], None]) -> None:
        asked = [pending for pending in self.pending if pending.commands]
        replied = self._exchange(asked)[1] if asked else set()
        save()
        if missed := [pending.client for pending in asked if pending.client not in replied]:
            raise ValueError(
                f"clients {missed} were not tested after the last task: start them, correct what the log says of "
                "them, and run again."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        payloads = [payload for pending in self.pending for payload in (pending.answer, pending.heads) if payload]
        answers = list({id(payload): payload for payload in payloads}.values())
        return {
            "run_id": self.run_id,
            "pending": [pending.state_dict(answers) for pending in self.pending],
            "answers": answers,
            "descriptions": [[None if found is None else list(found) for found in row] for row in self.descriptions],
            "rounds": self.rounds,
        }

    @override
    def load_state_dict(self, state: dict[str, Any], progress: Progress) -> None:
        self.run_id, self.rounds = state["run_id"], state["rounds"]
        self.descriptions = [
            [None if found is None else Description(*found) for found in row] for row in state["descriptions"]
        ]
        for pending, values in zip(self.pending, state["pending"], strict=True):
            pending.load_state_dict(values, state["answers"])
        self._update_run()
        self.log(f"resuming after {progress.task} tasks and {progress.round} rounds")

    def _exchange(self, asked: list[PendingCommands], kind: str = UPLOAD) -> tuple[Uploads, set[int]]:
        """Send pending commands and record the results.

        Returns the uploads that are results of ``kind``, and the clients with a valid reply.
        """
        identity = self.federation.identity
        requests = {pending.client: pending.request(self.run_id, identity).encode() for pending in asked}
        replies = self.transport.exchange(requests, self.deadline)
        uploads, parsed = Uploads([], {}), {}
        for client, data in sorted(replies.items()):
            try:
                parsed[client] = self._parse(client, data)
            except ValueError as error:
                uploads.unreadable[client] = str(error)
        reported = [fact for _, facts in parsed.values() for _, fact in facts if isinstance(fact, Description)]
        reference = self._reference(reported)
        for client, (reply, facts) in parsed.items():
            try:
                found = self._record(client, reply, facts, reference)
                uploads.received.extend(fact for command, fact in found if command.kind == kind)
            except ValueError as error:
                uploads.unreadable[client] = str(error)
        for client, reason in uploads.unreadable.items():
            self.log(f"client {client} is left out: {reason}")
        self._update_run()
        return uploads, replies.keys() - uploads.unreadable.keys()

    def _parse(self, client: int, data: bytes) -> tuple[Reply, list[tuple[Command, Fact]]]:
        reply = read_reply(data, self.run.validator.max_bytes + MAX_HEADER)
        if reply.refusal:
            raise ValueError(one_line(reply.refusal, 300))
        done = self.pending[client].completed(reply)
        names = self.run.readouts.names
        return reply, [(command, parse_result(client, command, result, names)) for command, result in done]

    def _record(
        self, client: int, reply: Reply, facts: list[tuple[Command, Fact]], reference: Description | None
    ) -> list[tuple[Command, Upload]]:
        for _, fact in facts:
            if isinstance(fact, Description) and reference is not None:
                check_classes(fact, reference)
        self.pending[client].acknowledge(reply)
        for command, fact in facts:
            if isinstance(fact, Tensor):
                self.run.matrix.record(PHASE[command.kind], client, command.task, fact)
            elif isinstance(fact, dict):
                for name, rows in fact.items():
                    self.run.readouts.record(name, client, command.task, rows)
            elif isinstance(fact, Description):
                self.descriptions[client][command.task] = fact
        return [(command, fact) for command, fact in facts if isinstance(fact, Upload)]

    def _reference(self, reported: list[Description]) -> Description | None:
        """The description whose classes all clients must share: the first accepted one, or else the most frequent.

        The exchange that brings the first descriptions decides for the whole run; ties go to the lowest client (ours).
        """
        known = next((found for row in self.descriptions for found in row if found is not None), None)
        votes = Counter((found.num_classes, found.class_names) for found in reported)
        return known or max(reported, key=lambda found: votes[found.num_classes, found.class_names], default=None)

    def _update_run(self) -> None:
        """Describe the data in the form of ``describe_data``, and build one net structure per client."""
        known = [found for row in self.descriptions for found in row if found is not None]
        fingerprints = sorted({found.fingerprint for found in known})

        def table(name: str) -> list[list[Any]]:
            return [[None if found is None else getattr(found, name) for found in row] for row in self.descriptions]

        self.run.data = {
            "dataset": self.federation.datamodule.dataset,
            "fingerprint": fingerprints[0] if len(fingerprints) == 1 else fingerprints,
            "num_classes": self.stream and self.stream.num_classes,
            "num_clients": self.federation.num_clients,
            "num_tasks": self.federation.num_tasks,
            "classes": table("classes"),
            "train_samples": table("train_samples"),
            "test_samples": table("test_samples"),
            **evaluated_on(self.federation.datamodule),
        }
        if not self.run.remote_nets and (stream := self.stream) is not None:
            runner = ClientRunner(self.run.method, self.run.engine, self.run.seed, self.run.readout_config)
            self.run.remote_nets = [runner.build(p.client, stream).to("meta") for p in self.pending]
            self.run.readouts.widths = check_widths(self.run.readout_config, self.run.remote_nets)


def parse_result(client: int, command: Command, result: Result, readouts: Sequence[str] = ()) -> Fact:
    """Content of a command's result; uploads are validated later, ``readouts`` are the names of the expected ones.

    Raises:
        ValueError: if it is malformed.
    """
    if command.kind in (UPLOAD, READOUT_SUMS):
        if "class_counts" not in result.tensors:
            raise ValueError("its upload has no class counts")
        payload, counts = under_prefix("payload", result.tensors), result.tensors["class_counts"]
        return Upload(client=client, task=command.task, round=command.round, payload=payload, class_counts=counts)
    if command.kind in PHASE:
        return parse_accuracies(result.tensors.get("accuracies"), command.task)
    if command.kind == READOUT:
        return {name: parse_accuracies(result.tensors.get(name), command.task) for name in readouts}
    return parse_description(result.values) if command.kind == BEGIN else None


def parse_accuracies(values: Tensor | None, task: int) -> Tensor:
    """Accuracies (masks, tasks so far) after a task.

    Raises:
        ValueError: if they have another shape, or are not in [0, 1].
    """
    shape = len(MASKS), task + 1
    if values is None or values.shape != shape:
        raise ValueError(f"its accuracies after task {task + 1} must have shape {shape}")
    if not (values.is_floating_point() and ((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"its accuracies after task {task + 1} must be in [0, 1]")
    return values


def parse_description(values: dict[str, Any]) -> Description:
    """Check the types of a description.

    Raises:
        ValueError: if one is wrong.
    """
    found = Description(*(values.get(name) for name in Description._fields))  # type: ignore[arg-type]
    counts = (found.num_classes, found.train_samples, found.test_samples)
    has_counts = all(type(number) is int and number >= 0 for number in counts)
    has_hashes = all(type(text) is str and SHA256.fullmatch(text) for text in (found.fingerprint, found.class_names))
    if not (has_counts and has_hashes and type(found.classes) is list):
        raise ValueError("its description of the data is malformed: use the same version of fedlscl everywhere")
    if not all(type(label) is int and 0 <= label < found.num_classes for label in found.classes):
        raise ValueError(f"its classes must be in [0, {found.num_classes - 1}]")
    return found


def check_classes(found: Description, reference: Description) -> None:
    """Check that labels have the same meaning as on the other clients.

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
