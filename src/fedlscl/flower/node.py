"""Node: one client on its own machine, which carries out the server's commands and keeps its state in one file."""

import fcntl
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from fedlscl.cli.runs import identify_data
from fedlscl.data.loader import names_hash
from fedlscl.federated.checkpoint import load_last_good, save_checkpoint
from fedlscl.federated.client import Client
from fedlscl.federated.method import StreamShape
from fedlscl.flower import messages
from fedlscl.flower.federation import Federation
from fedlscl.flower.messages import Command, Description, Reply, Request, pack, read_request

RUN_ID = re.compile(r"[0-9a-f]{1,64}")


class Node:
    """Answers requests for one client.

    Args:
        federation: the configuration, with the node's own data.
        index: the client.
        folder: folder of its state, one file for each run.
    """

    def __init__(self, federation: Federation, index: int, folder: Path) -> None:
        if not 0 <= index < federation.num_clients:
            raise ValueError(f"partition-id must be in [0, {federation.num_clients - 1}], got {index}.")
        self.federation, self.index, self.folder = federation, index, folder

    def answer(self, data: bytes) -> bytes:
        """Carry out the new commands of a request; a repeated request gets the same reply.

        Errors (another configuration, a lost state) are replied as a refusal in one line.
        """
        try:
            request = read_request(data)
            self._check(request)
            self.folder.mkdir(parents=True, exist_ok=True)
            # A repeated request may arrive in another process while the first one is being answered.
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                reply = Reply(self._results(request))
            finally:
                os.close(handle)
        except ValueError as error:
            reply = Reply([], " ".join(str(error).split()))
        return pack(reply._asdict())

    def _check(self, request: Request) -> None:
        if request.client != self.index:
            raise ValueError(f"client of the request must be {self.index}, got {request.client}.")
        if not RUN_ID.fullmatch(request.run):
            raise ValueError(f"run must be 1 to 64 hexadecimal digits, got {request.run!r}.")
        if request.identity != self.federation.identity:
            raise ValueError(
                f"client {self.index} has another configuration: use the server's YAML file and weights files on "
                "every node."
            )

    def _results(self, request: Request) -> list[dict[str, Any]]:
        path = self.folder / f"{request.run}.pt"
        state = load_last_good(path, request.identity) if path.exists() else None
        data = self.federation.datamodule
        identity = identify_data(data.data.fingerprint, data.splits)
        if state is not None and state["data"] != identity:
            if request.acknowledged:
                raise ValueError(
                    f"the data of client {self.index} must not change during a run: restore its images, labels, class "
                    "names and split, or start a new run."
                )
            state = None  # The server has accepted nothing yet: start again with the corrected data.
        done, replies = (state["done"], state["replies"]) if state else (0, [])
        if request.acknowledged > done:
            problem = "is missing" if state is None else "is older than the server's"
            raise ValueError(f"the state of client {self.index} in {path} {problem}: restore it, or start a new run.")
        # By the command and its payload, since a number may stand for another command after a server's restart.
        commands = {hashlib.sha256(pack(command)).hexdigest(): command for command in request.commands}
        known = {key: result for reply in replies for key, result in reply.items()}
        new = [key for key, command in commands.items() if command.number > done]
        if commands.keys() - known.keys() - set(new):
            raise ValueError(f"the server's checkpoint is too old for client {self.index}: restore its newest one.")
        if not new:
            return [known[key] for key in commands]
        client = self._client(state)
        known |= {key: self._run(client, commands[key]) for key in new}
        reply = {key: known[key] for key in commands}
        state = {
            "identity": request.identity,
            "data": identity,
            "client": client.state_dict(),
            "done": commands[new[-1]].number,
            # That of the previous request, too, for a server that resumes from its previous checkpoint.
            "replies": [*replies[-1:], reply],
        }
        save_checkpoint(path, state)
        return list(reply.values())

    def _client(self, state: dict[str, Any] | None) -> Client:
        self.runner = self.federation.client_runner(self.folder / "tokens")
        data = self.federation.datamodule
        net = self.runner.build(self.index, StreamShape(data.num_classes, data.num_clients, data.num_tasks))
        client = Client(id=self.index, net=net, data=data.stream(self.index), engine=self.runner.engine)
        if state is not None:
            client.load_state_dict(state["client"])
        return client

    def _run(self, client: Client, command: Command) -> dict[str, Any]:
        """Carry out one command; returns the plain values and tensors of its result."""
        runner, payload = self.runner, command.payload
        client.task, client.round = command.task, command.round
        match command.kind:
            case messages.BEGIN:
                runner.begin_task(client)
                data = self.federation.datamodule
                return Description(
                    num_classes=data.num_classes,
                    fingerprint=data.data.fingerprint,
                    class_names=names_hash(data.class_names),
                    classes=client.classes.tolist(),
                    train_samples=len(client.train_ids),
                    test_samples=len(client.data.evaluation_ids(client.task)),
                )._asdict()
            case messages.TRAIN:
                runner.train(client, lambda _, stage: runner.engine.train(stage))
            case messages.UPLOAD | messages.READOUT_SUMS as kind:
                upload = runner.upload(client) if kind == messages.UPLOAD else runner.readout_sums(client)
                return {"payload": upload.payload, "class_counts": upload.class_counts}
            case messages.DOWNLOAD if payload is not None:
                runner.download(client, payload)
            case messages.END:
                runner.end_task(client)
            case messages.TEST_BEFORE | messages.TEST_AFTER:
                return {"accuracies": runner.evaluate(client)}
            case messages.READOUT if payload is not None:
                return runner.evaluate_readouts(client, payload)
            case kind:
                raise ValueError(f"command {kind!r} is unknown: use the same version of fedlscl everywhere.")
        return {}
