"""The server: the trainer over FlowerPool, whose clients are on other machines."""

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from typing_extensions import override

from fedlscl.callbacks.results import write_results
from fedlscl.cli.runs import CHECKPOINT, CONFIG
from fedlscl.federated.checkpoint import load_last_good, write_atomically
from fedlscl.federated.method import Progress, StreamShape
from fedlscl.federated.metrics import MASKS
from fedlscl.federated.payload import MAX_HEADER, Payload, Upload, one_line
from fedlscl.federated.pool import ClientPool, ClientRunner, evaluated_on
from fedlscl.federated.readout import check_widths
from fedlscl.federated.state import Callback, RunState
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.flower import messages
from fedlscl.flower.federation import Federation
from fedlscl.flower.messages import Command, Description, PendingCommands, Request, pack, read_reply

SHA256 = re.compile("[0-9a-f]{64}")
PHASE = {messages.TEST_BEFORE: "before", messages.TEST_AFTER: "after"}
Log = Callable[[str], None]
Fact = Upload | Description | Tensor | dict[str, Tensor] | None
"""Content of a command's result; a tensor has the accuracies (masks, tasks so far), a dict those of readouts."""


class Transport(Protocol):
    """Delivers requests, repeatedly if needed: a node carries out no command twice."""

    def exchange(self, requests: dict[int, bytes], seconds: float) -> dict[int, bytes]:
        """Replies to these requests, by client, that arrive in time; returns as soon as all have arrived."""
        ...


def run_server(
    federation: Federation, transport: Transport, run_dir: Path, deadline: float = 600.0, log: Log = lambda line: None
) -> FederatedTrainer:
    """Train a federation of remote clients, or resume the run in ``run_dir``.

    Args:
        federation: the configuration.
        transport: delivers requests to the clients.
        run_dir: folder of checkpoint and results.
        deadline: seconds that a round waits for its clients; later replies miss the round.
        log: writes one line.

    Raises:
        ValueError: if the folder contains another run, or a round has too few clients; the last checkpoint is kept.
    """
    pool = FlowerPool(federation, transport, deadline, log)
    trainer = copy(federation.trainer)
    # Nodes keep the results of two requests only, hence a checkpoint after every round.
    trainer.devices, trainer.checkpoint_every, trainer.run_dir = 1, 1, run_dir
    trainer.callbacks, trainer.identity = [pool], federation.identity
    job = (federation.method, federation.datamodule, federation.seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / CHECKPOINT
    if not path.exists():
        write_atomically(run_dir / CONFIG, federation.text.encode())
        trainer.setup(*job, pool)
        trainer.save(Progress(0, 0))  # the run's id is saved before a client gets it
    elif load_last_good(path)["identity"] != federation.identity:
        raise ValueError(f"run-dir {str(run_dir)!r} contains another run: choose another folder.")
    trainer.fit(*job, checkpoint=path, identity=federation.identity, pool=pool)
    return trainer


class FlowerPool(ClientPool, Callback):
    """Clients on other machines: commands are collected and sent once per round; see `run_server`.

    As a callback it writes network.json and the results of all clients that have reported, with every checkpoint.
    """

    def __init__(
        self, federation: Federation, transport: Transport, deadline: float = 600.0, log: Log = lambda line: None
    ) -> None:
        if not deadline > 0:
            raise ValueError(f"deadline must be > 0 seconds, got {deadline}.")
        self.federation, self.transport, self.deadline, self.log = federation, transport, deadline, log
        self.run_id = uuid.uuid4().hex
        self.clients = range(federation.num_clients)
        self.pending = [PendingCommands() for _ in self.clients]
        self.descriptions: list[list[Description | None]] = [[None] * federation.num_tasks for _ in self.clients]
        self.rounds: list[dict[str, Any]] = []
        """Seconds and missing clients of every round; not part of the results, since they differ from run to run."""

    @property
    def stream(self) -> StreamShape | None:
        """Sizes of the data; None before a client has reported its classes."""
        reference, data = self._reference([]), self.federation.datamodule
        return None if reference is None else StreamShape(reference.num_classes, data.num_clients, data.num_tasks)

    @override
    def setup(self, run: RunState) -> None:
        self.run = run
        self._update_run()

    @override
    def begin_task(self, task: int, first_round: int) -> None:
        if first_round == 0:
            self._add(Progress(task, 0), messages.BEGIN)

    @override
    def train(self, progress: Progress, participants: list[int], with_uploads: bool) -> list[Upload]:
        began = time.perf_counter()
        kinds = [messages.TRAIN]
        kinds += [messages.TEST_BEFORE] if progress.last else []
        kinds += [messages.UPLOAD] if with_uploads else []
        for client in participants:
            self.pending[client].add(progress, *kinds)
        asked = self.clients if progress.round == 0 else participants
        uploads, missed = self._exchange(asked)
        self._reject(progress, missed)
        seconds, (task, round_) = time.perf_counter() - began, progress.position
        number = {"seconds": seconds, "asked": len(asked), "missed": sorted(missed)}
        self.rounds.append({"task": task, "round": round_, **number})
        arrived = f"{len(asked) - len(missed)} of {len(asked)} clients"
        self.log(f"task {task + 1}, round {round_ + 1}: {arrived} in {seconds:.1f} s")
        return uploads

    @override
    def download(self, progress: Progress, answers: dict[int, Payload]) -> None:
        for client, answer in answers.items():
            self.pending[client].add(progress, messages.DOWNLOAD, payload=answer)

    @override
    def end_task(self, progress: Progress) -> None:
        self._add(progress, messages.END, messages.TEST_AFTER)

    @override
    def readout_sums(self, progress: Progress, save: Callable[[], None]) -> list[Upload]:
        save()  # nodes keep the results of two requests only
        self._add(progress, messages.READOUT_SUMS)
        uploads, missed = self._exchange(self.clients)
        self._reject(progress, missed, late="its sums of features did not arrive in time")
        return uploads

    @override
    def evaluate_readouts(self, progress: Progress, answer: Payload) -> None:
        for pending in self.pending:
            pending.add(progress, messages.READOUT, payload=answer)

    @override
    def finish(self, save: Callable[[], None]) -> None:
        asked = [client for client in self.clients if self.pending[client].commands]
        missed = sorted(self._exchange(asked)[1]) if asked else []
        save()
        if missed:
            raise ValueError(
                f"clients {missed} were not tested after the last task: start them, correct what the log says of "
                "them, and run again."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        # Clients may share a payload, which is saved once.
        payloads = {id(c.payload): c.payload for each in self.pending for c in each.commands if c.payload is not None}
        places = {key: place for place, key in enumerate(payloads)}

        def state(pending: PendingCommands) -> dict[str, Any]:
            commands = [[*command[:-1], places.get(id(command.payload))] for command in pending.commands]
            return {**vars(pending), "commands": commands}

        return {
            "run_id": self.run_id,
            "pending": [state(pending) for pending in self.pending],
            "payloads": list(payloads.values()),
            "descriptions": [[found and list(found) for found in row] for row in self.descriptions],
            "rounds": self.rounds,
        }

    @override
    def load_state_dict(self, state: dict[str, Any], progress: Progress) -> None:
        self.run_id, self.rounds = state["run_id"], state["rounds"]
        self.descriptions = [[found and Description(*found) for found in row] for row in state["descriptions"]]
        payloads = dict(enumerate(state["payloads"]))
        for pending, saved in zip(self.pending, state["pending"], strict=True):
            pending.number, pending.acknowledged = saved["number"], saved["acknowledged"]
            pending.commands = [Command(*each[:-1], payload=payloads.get(each[-1])) for each in saved["commands"]]
        self._update_run()
        self.log(f"resuming after {progress.task} tasks and {progress.round} rounds")

    @override
    def on_checkpoint(self, run: RunState) -> None:
        assert run.run_dir is not None
        write_atomically(run.run_dir / "network.json", json.dumps(self.rounds, indent=1).encode())
        if run.remote_nets:
            write_results(run)

    def _add(self, progress: Progress, *kinds: str) -> None:
        for pending in self.pending:
            pending.add(progress, *kinds)

    def _reject(self, progress: Progress, missed: dict[int, str], late: str = "") -> None:
        for client, reason in sorted(missed.items()):
            if reason or late:
                self.run.validator.reject(client, progress, reason or late)

    def _exchange(self, asked: Sequence[int]) -> tuple[list[Upload], dict[int, str]]:
        """Send pending commands and record the results.

        Returns the uploads, and by client why there is no valid reply: empty if none arrived.
        """
        requests = {client: self._request(client) for client in asked}
        replies = self.transport.exchange(requests, self.deadline)
        uploads: list[Upload] = []
        unreadable: dict[int, str] = {}
        parsed: dict[int, list[tuple[Command, Fact]]] = {}
        for client, data in sorted(replies.items()):
            try:
                parsed[client] = self._parse(client, data)
            except ValueError as error:
                unreadable[client] = str(error)
        reported = [fact for facts in parsed.values() for _, fact in facts if isinstance(fact, Description)]
        reference = self._reference(reported)
        for client, facts in parsed.items():
            flaws = (class_error(fact, reference) for _, fact in facts if isinstance(fact, Description))
            if flaw := next(filter(None, flaws), ""):
                unreadable[client] = flaw
            else:
                self.pending[client].acknowledge()
                self._record(client, facts, uploads)
        for client in asked:
            self.pending[client].drop_round()
        for client, reason in unreadable.items():
            self.log(f"client {client} is left out: {reason}")
        self._update_run()
        return uploads, unreadable | dict.fromkeys(requests.keys() - replies.keys(), "")

    def _request(self, client: int) -> bytes:
        pending = self.pending[client]
        ours = self.run_id, self.federation.identity
        return pack(Request(client, *ours, pending.acknowledged, pending.commands)._asdict())

    def _parse(self, client: int, data: bytes) -> list[tuple[Command, Fact]]:
        results, refusal = read_reply(data, self.run.validator.max_bytes + MAX_HEADER)
        commands = self.pending[client].commands
        if refusal:
            raise ValueError(one_line(refusal, 300))
        if len(results) != len(commands):
            raise ValueError(f"its reply must have {len(commands)} results, got {len(results)}")
        names, pairs = self.run.readouts.names, zip(commands, results, strict=True)
        return [(command, parse_result(client, command, result, names)) for command, result in pairs]

    def _record(self, client: int, facts: list[tuple[Command, Fact]], uploads: list[Upload]) -> None:
        for command, fact in facts:
            match fact:
                case Upload():
                    uploads.append(fact)
                case Description():
                    self.descriptions[client][command.task] = fact
                case Tensor():
                    self.run.matrix.record(PHASE[command.kind], client, command.task, fact)
                case dict():
                    for name, rows in fact.items():
                        self.run.readouts.record(name, client, command.task, rows)

    @property
    def _known(self) -> list[Description]:
        return [found for row in self.descriptions for found in row if found is not None]

    def _reference(self, reported: list[Description]) -> Description | None:
        """The description whose classes all clients must share: the first accepted one, or else the most frequent.

        The exchange that brings the first descriptions decides for the whole run; ties go to the lowest client (ours).
        """
        votes = Counter((found.num_classes, found.class_names) for found in reported)
        most = max(reported, key=lambda found: votes[found.num_classes, found.class_names], default=None)
        return next(iter(self._known), most)

    def _update_run(self) -> None:
        """Describe the data as ``LocalPool`` does, and build one net structure per client."""
        run = self.run
        stream = run.validator.stream = self.stream
        fingerprints = sorted({found.fingerprint for found in self._known})
        run.data = {
            "dataset": self.federation.datamodule.dataset,
            "fingerprint": fingerprints[0] if len(fingerprints) == 1 else fingerprints,
            "num_classes": stream and stream.num_classes,
            "num_clients": self.federation.num_clients,
            "num_tasks": self.federation.num_tasks,
        }
        for name in ("classes", "train_samples", "test_samples"):
            run.data[name] = [[found and getattr(found, name) for found in row] for row in self.descriptions]
        run.data |= evaluated_on(self.federation.datamodule)
        if not run.remote_nets and stream is not None:
            runner = ClientRunner(run.method, run.engine, run.seed, run.readout_config)
            run.remote_nets = [runner.build(client, stream).to("meta") for client in self.clients]
            run.readouts.widths = check_widths(run.readout_config, run.remote_nets)


def parse_result(client: int, command: Command, result: dict[str, Any], readouts: Sequence[str] = ()) -> Fact:
    """Content of a command's result; uploads are validated later, ``readouts`` are the names of the expected ones.

    Raises:
        ValueError: if it is malformed.
    """
    if command.kind in (messages.UPLOAD, messages.READOUT_SUMS):
        match result:
            case {"payload": dict() as payload, "class_counts": Tensor() as counts} if all(
                isinstance(value, Tensor) for value in payload.values()
            ):
                where = {"client": client, "task": command.task, "round": command.round}
                return Upload(**where, payload=payload, class_counts=counts)
        raise ValueError("its upload must have class counts and a payload of tensors")
    if command.kind in PHASE:
        return parse_accuracies(result.get("accuracies"), command.task)
    if command.kind == messages.READOUT:
        return {name: parse_accuracies(result.get(name), command.task) for name in readouts}
    return parse_description(result) if command.kind == messages.BEGIN else None


def parse_accuracies(values: Any, task: int) -> Tensor:
    """Accuracies (masks, tasks so far) after a task; raises a ValueError if they are not in [0, 1]."""
    shape = len(MASKS), task + 1
    if not isinstance(values, Tensor) or values.shape != shape:
        raise ValueError(f"its accuracies after task {task + 1} must have shape {shape}")
    if not (values.is_floating_point() and ((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"its accuracies after task {task + 1} must be in [0, 1]")
    return values


def parse_description(values: dict[str, Any]) -> Description:
    """Check the types of a description; raises a ValueError if one is wrong."""
    found = Description(*(values.get(name) for name in Description._fields))  # type: ignore[arg-type]
    counts = (found.num_classes, found.train_samples, found.test_samples)
    has_counts = all(type(number) is int and number >= 0 for number in counts)
    has_hashes = all(type(text) is str and SHA256.fullmatch(text) for text in (found.fingerprint, found.class_names))
    if not (has_counts and has_hashes and type(found.classes) is list):
        raise ValueError("its description of the data is malformed: use the same version of fedlscl everywhere")
    if not all(type(label) is int and 0 <= label < found.num_classes for label in found.classes):
        raise ValueError(f"its classes must be in [0, {found.num_classes - 1}]")
    return found


def class_error(found: Description, reference: Description | None) -> str:
    """Why labels have another meaning than on the other clients, or an empty string."""
    if reference is None:
        return ""
    if found.num_classes != reference.num_classes:
        flaw = f"num_classes must be {reference.num_classes} as on the other nodes, got {found.num_classes}"
    elif found.class_names != reference.class_names:
        own, others = found.class_names[:12], reference.class_names[:12]
        flaw = f"class_names must have the hash {others} of the other nodes, got {own}"
    else:
        return ""
    return f"{flaw}: give every node the same classes under the same names, numbered in the same order"
