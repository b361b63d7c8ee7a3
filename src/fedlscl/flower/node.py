"""A client on a machine of its own: it does what letters tell it, once, and keeps everything in one file."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlscl.cli.runs import identify_data
from fedlscl.data.images import names_hash
from fedlscl.federated.checkpoint import load_last_good, save_checkpoint
from fedlscl.federated.client import Client
from fedlscl.federated.method import Stage, StreamShape
from fedlscl.federated.payload import Payload
from fedlscl.flower.federation import Federation
from fedlscl.flower.messages import (
    BEGIN,
    DOWNLOAD,
    END,
    TEST_AFTER,
    TEST_BEFORE,
    TRAIN,
    UPLOAD,
    Command,
    Reply,
    Request,
    Result,
    prefixed,
    read_request,
)

RUN_NAME = re.compile(r"[0-9a-f]{1,64}")


class Node:
    """Answers letters for one client.

    Args:
        federation: the configuration, with the node's own data.
        index: which client it is.
        folder: where its state is kept, one file for each run.
    """

    def __init__(self, federation: Federation, index: int, folder: Path) -> None:
        if not 0 <= index < federation.num_clients:
            raise ValueError(f"partition-id {index}: num_clients is {federation.num_clients}, use 0 to K - 1.")
        self.federation, self.index, self.folder = federation, index, folder

    def answer(self, data: bytes) -> bytes:
        """Do what is new in a letter and reply; a letter that comes again gets the same reply.

        What the node cannot accept (another configuration, a lost state) comes back as a refusal in one line.
        """
        try:
            request = read_request(data)
            self._check(request)
            self.folder.mkdir(parents=True, exist_ok=True)
            with alone(self.folder):
                return self._answer(request).encode()
        except ValueError as error:
            return Reply(self.index, 0, [], " ".join(str(error).split())).encode()

    def _check(self, request: Request) -> None:
        if request.client != self.index:
            raise ValueError(f"a letter for client {request.client} came to client {self.index}.")
        if not RUN_NAME.fullmatch(request.run):
            raise ValueError(f"run {request.run!r} is no name of a run.")
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
            state = None  # Nothing of it was accepted: corrected data begin again.
        done, acknowledged, kept_from = state["numbers"] if state else (0, 0, 0)
        if request.acknowledged > done:
            what = "is gone" if state is None else "is older than what the server has of it"
            raise ValueError(f"the state of client {self.index} in {path} {what}: restore it, or start a new run.")
        if request.acknowledged < kept_from:
            raise ValueError(f"the server's checkpoint is too old for client {self.index}: restore its newest one.")
        outbox = [Result(**entry) for entry in state["outbox"]] if state else []
        fresh = [command for command in request.commands if command.number > done]
        if fresh:
            client = self._client(state)
            outbox += [Result(c.number, *self._do(client, c, request.answer)) for c in fresh]
            done = fresh[-1].number
            # One letter longer than needed: the server, too, may have to go back to the checkpoint before.
            outbox = [result for result in outbox if result.number > acknowledged]
            numbers = [done, request.acknowledged, acknowledged]
            said = [result._asdict() for result in newest_uploads(outbox)]
            kept = {"client": client.state_dict(), "numbers": numbers, "outbox": said}
            # Replaced in one step: a node that is killed continues from the state before.
            save_checkpoint(path, {"identity": request.identity, "data": identity, **kept})
        return Reply(self.index, done, [result for result in outbox if result.number > request.acknowledged])

    def _client(self, state: dict[str, Any] | None) -> Client:
        """The client as it was when the state was saved."""
        self.runner = self.federation.client_runner(self.folder / "tokens")
        data = self.federation.datamodule
        net = self.runner.build(self.index, StreamShape(data.num_classes, data.num_clients, data.num_tasks))
        client = Client(id=self.index, net=net, data=data.stream(self.index), engine=self.runner.engine)
        if state is not None:
            client.load_state_dict(state["client"])
        return client

    def _do(self, client: Client, command: Command, answer: Payload | None) -> tuple[dict[str, Any], Payload]:
        """Carry out one command; returns what is sent about it: an upload, counts, or accuracies."""
        client.task, client.round = command.task, command.round
        if command.kind == BEGIN:
            self.runner.begin_task(client)
            return self._description(client), {}
        if command.kind == TRAIN:
            self.runner.train(client, self._train)
        elif command.kind == UPLOAD:
            upload = self.runner.upload(client)
            counts = {"class_counts": upload.class_counts}
            return {"samples": upload.num_samples}, prefixed("payload", upload.payload) | counts
        elif command.kind == DOWNLOAD and answer is not None:
            self.runner.download(client, answer)
        elif command.kind == END:
            self.runner.end_task(client)
        elif command.kind in (TEST_BEFORE, TEST_AFTER):
            return {}, {"accuracies": self.runner.evaluate(client)}
        else:
            raise ValueError(f"command {command.kind!r} is unknown: use the same version of fedlscl everywhere.")
        return {}, {}

    def _train(self, client: Client | None, stage: Stage) -> None:
        self.runner.engine.train(stage)

    def _description(self, client: Client) -> dict[str, Any]:
        data = self.federation.datamodule
        return {
            "num_classes": data.num_classes,
            "fingerprint": data.data.fingerprint,
            "class_names": names_hash(data.class_names),
            "classes": client.classes.tolist(),
            "train_samples": len(client.train_ids),
            "test_samples": len(client.data.test_ids(client.task)),
        }


def newest_uploads(outbox: list[Result], number: int = 2) -> list[Result]:
    """Without uploads whose rounds are over: those before the last two."""
    uploads = [result.number for result in outbox if "samples" in result.said]
    return [result for result in outbox if result.number not in uploads[:-number]]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works in a folder: a letter may be delivered while its twin is still in hand."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
