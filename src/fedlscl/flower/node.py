"""Node: one client on its own machine, which carries out the server's commands and keeps its state in one file."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlscl.cli.runs import identify_data
from fedlscl.data.loader import names_hash
from fedlscl.federated.checkpoint import load_last_good, save_checkpoint
from fedlscl.federated.client import Client
from fedlscl.federated.method import StreamShape
from fedlscl.federated.payload import Payload
from fedlscl.flower import messages
from fedlscl.flower.federation import Federation
from fedlscl.flower.messages import READOUT, Command, Reply, Request, Result, read_request, under_prefix, with_prefix

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
            with locked(self.folder):
                return self._answer(request).encode()
        except ValueError as error:
            return Reply(self.index, 0, [], " ".join(str(error).split())).encode()

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

    def _answer(self, request: Request) -> Reply:
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
        done, acknowledged, kept_from = state["numbers"] if state else (0, 0, 0)
        if request.acknowledged > done:
            problem = "is missing" if state is None else "is older than the server's"
            raise ValueError(f"the state of client {self.index} in {path} {problem}: restore it, or start a new run.")
        if request.acknowledged < kept_from:
            raise ValueError(f"the server's checkpoint is too old for client {self.index}: restore its newest one.")
        outbox = [Result(**entry) for entry in state["outbox"]] if state else []
        new = [command for command in request.commands if command.number > done]
        if new:
            client = self._client(state)
            outbox += [Result(c.number, *self._run(client, c, request.answer)) for c in new]
            done = new[-1].number
            # Results of the previous request are kept, too, for a server that resumes from its previous checkpoint.
            outbox = newest_uploads([result for result in outbox if result.number > acknowledged])
            state = {
                "identity": request.identity,
                "data": identity,
                "client": client.state_dict(),
                "numbers": [done, request.acknowledged, acknowledged],
                "outbox": [result._asdict() for result in outbox],
            }
            save_checkpoint(path, state)
        return Reply(self.index, done, [result for result in outbox if result.number > request.acknowledged])

    def _client(self, state: dict[str, Any] | None) -> Client:
        self.runner = self.federation.client_runner(self.folder / "tokens")
        data = self.federation.datamodule
        net = self.runner.build(self.index, StreamShape(data.num_classes, data.num_clients, data.num_tasks))
        client = Client(id=self.index, net=net, data=data.stream(self.index), engine=self.runner.engine)
        if state is not None:
            client.load_state_dict(state["client"])
        return client

    def _run(self, client: Client, command: Command, answer: Payload | None) -> tuple[dict[str, Any], Payload]:
        """Carry out one command; returns the values and tensors of its result."""
        client.task, client.round = command.task, command.round
        match command.kind:
            case messages.BEGIN:
                self.runner.begin_task(client)
                return self._description(client), {}
            case messages.TRAIN:
                self.runner.train(client, lambda _, stage: self.runner.engine.train(stage))
            case messages.UPLOAD:
                upload = self.runner.upload(client)
                tensors = with_prefix("payload", upload.payload) | {"class_counts": upload.class_counts}
                return {"samples": upload.num_samples}, tensors
            case messages.DOWNLOAD if answer is not None:
                self.runner.download(client, {n: v for n, v in answer.items() if not n.startswith(f"{READOUT}/")})
            case messages.END:
                self.runner.end_task(client)
            case messages.TEST_BEFORE | messages.TEST_AFTER:
                return {}, {"accuracies": self.runner.evaluate(client)}
            case messages.READOUT_SUMS:
                upload = self.runner.readout_sums(client)
                tensors = with_prefix("payload", upload.payload) | {"class_counts": upload.class_counts}
                return {}, tensors
            case messages.READOUT if answer is not None:
                return {}, self.runner.evaluate_readouts(client, under_prefix(READOUT, answer))
            case _:
                raise ValueError(f"command {command.kind!r} is unknown: use the same version of fedlscl everywhere.")
        return {}, {}

    def _description(self, client: Client) -> dict[str, Any]:
        data = self.federation.datamodule
        return {
            "num_classes": data.num_classes,
            "fingerprint": data.data.fingerprint,
            "class_names": names_hash(data.class_names),
            "classes": client.classes.tolist(),
            "train_samples": len(client.train_ids),
            "test_samples": len(client.data.evaluation_ids(client.task)),
        }


def newest_uploads(outbox: list[Result], number: int = 2) -> list[Result]:
    """Remove all but the newest uploads."""
    uploads = [result.number for result in outbox if "samples" in result.values]
    return [result for result in outbox if result.number not in uploads[:-number]]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Exclude other processes from a folder: a repeated request may arrive while the first one is being answered."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
