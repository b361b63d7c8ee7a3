"""Messages between server and nodes, and the commands that a node has not yet acknowledged.

A message is one safetensors blob with a JSON header in its metadata; nothing in it is executed.
"""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedlscl.federated.method import Progress
from fedlscl.federated.payload import Payload, one_line, read_message, write_payload

BEGIN, TRAIN, TEST_BEFORE, UPLOAD = "begin_task", "train", "test_before", "upload"
DOWNLOAD, END, TEST_AFTER = "download", "end_task", "test_after"
READOUT_SUMS, READOUT = "readout_sums", "readout"
ROUND_KINDS = (TRAIN, TEST_BEFORE, UPLOAD, READOUT_SUMS)
"""Commands that are dropped when their exchange is over."""
ANSWER = "answer"
"""Prefix of the server's responses among the tensors of a request; within it, READOUT is that of the readouts'."""


class Command(NamedTuple):
    """One turn of a client; a node carries out each number once."""

    number: int
    kind: str
    task: int
    round: int


class Request(NamedTuple):
    """From the server to a client: its unacknowledged commands."""

    client: int
    run: str
    """Random id of the run; a node keeps a separate state for each."""
    identity: str
    """Fingerprint of the configuration; the node's must be equal."""
    acknowledged: int
    """The server has the results up to this number."""
    commands: list[Command]
    answer: Payload | None
    """Payload of the download among the commands; under the prefix READOUT, the readouts' heads."""

    def encode(self) -> bytes:
        """Serialise the request."""
        header = {**self._asdict(), "answer": self.answer is not None}
        return pack(header, with_prefix(ANSWER, self.answer or {}))


class Result(NamedTuple):
    """Result of one command."""

    number: int
    values: dict[str, Any]
    """Plain values."""
    tensors: Payload


class Reply(NamedTuple):
    """From a client to the server: results that the server has not acknowledged."""

    client: int
    done: int
    """Number of the last command that was carried out."""
    results: list[Result]
    refusal: str = ""
    """Error for which the request was refused."""

    def encode(self) -> bytes:
        """Serialise the reply."""
        header = {**self._asdict(), "results": [[result.number, result.values] for result in self.results]}
        tensors: Payload = {}
        for result in self.results:
            tensors |= with_prefix(str(result.number), result.tensors)
        return pack(header, tensors)


def read_request(data: bytes) -> Request:
    """Deserialise a request.

    Raises:
        ValueError: if it is malformed.
    """
    header, tensors = unpack(data)
    try:
        commands = [Command(*command) for command in header.pop("commands")]
        answer = under_prefix(ANSWER, tensors) if header.pop("answer") else None
        return Request(**header, commands=commands, answer=answer)
    except (TypeError, KeyError) as error:
        raise ValueError(f"request is malformed ({error}): use the same version of fedlscl everywhere.") from None


def read_reply(data: bytes, limit: int | None = None) -> Reply:
    """Deserialise an untrusted reply.

    Raises:
        ValueError: if it is malformed or has more than ``limit`` bytes.
    """
    header, tensors = unpack(data, limit)
    try:
        entries = header.pop("results")
        results = [Result(int(number), dict(values), under_prefix(str(number), tensors)) for number, values in entries]
        reply = Reply(**header, results=results)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"reply is malformed ({one_line(error)})") from None
    if type(reply.client) is not int or type(reply.done) is not int or type(reply.refusal) is not str:
        raise ValueError(f"reply is malformed (client {one_line(reply.client)}, done {one_line(reply.done)})")
    return reply


def with_prefix(prefix: str, tensors: Payload) -> Payload:
    """Add a prefix to names.

    Example:
        >>> with_prefix("answer", {"head.bias": 1})
        {'answer/head.bias': 1}
    """
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def under_prefix(prefix: str, tensors: Payload) -> Payload:
    """Select the names with a prefix and remove it."""
    start = f"{prefix}/"
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def pack(header: dict[str, Any], tensors: Payload) -> bytes:
    """Serialise plain values and tensors."""
    return write_payload(tensors, {"fedlscl": json.dumps(header, allow_nan=False)})


def unpack(data: bytes, limit: int | None = None) -> tuple[dict[str, Any], Payload]:
    """Deserialise the result of ``pack``.

    Raises:
        ValueError: if the message is malformed or has more than ``limit`` bytes.
    """
    metadata, tensors = read_message(data, limit)
    try:
        header = json.loads(metadata["fedlscl"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"message of {len(data)} bytes is not of fedlscl ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise ValueError(f"header of the message must be a mapping, got {type(header).__name__}")
    return header, tensors


@dataclass
class PendingCommands:
    """Unacknowledged commands of one client, numbered from 1, so that lost and repeated messages change nothing."""

    client: int
    number: int = 0
    """Number of the newest command."""
    acknowledged: int = 0
    """Number of the last command whose result has arrived."""
    commands: list[Command] = field(default_factory=list)
    answer: Payload | None = None
    """Payload of the download among the commands."""
    heads: Payload | None = None
    """Payload of the readout among the commands."""

    def add(self, kind: str, task: int, round_: int) -> None:
        """Add a command."""
        self.number += 1
        self.commands.append(Command(self.number, kind, task, round_))

    def add_download(self, answer: Payload, progress: Progress) -> None:
        """Add the response to the client's upload."""
        self.answer = answer
        self.add(DOWNLOAD, progress.task, progress.round)

    def add_readout(self, heads: Payload, progress: Progress) -> None:
        """Add the heads of readouts, which the client evaluates."""
        self.heads = heads
        self.add(READOUT, progress.task, progress.round)

    def request(self, run: str, identity: str) -> Request:
        """The request for all pending commands."""
        answer = self.answer
        if self.heads is not None:
            answer = {**(answer or {}), **with_prefix(READOUT, self.heads)}
        return Request(self.client, run, identity, self.acknowledged, list(self.commands), answer)

    def completed(self, reply: Reply) -> list[tuple[Command, Result]]:
        """The pending commands that a reply reports as done, with their results.

        Raises:
            ValueError: if the reply does not match the client and its commands.
        """
        if reply.client != self.client:
            raise ValueError(f"its reply must be of client {self.client}, got {reply.client}")
        if not self.acknowledged <= reply.done <= self.number:
            raise ValueError(f"its last command must be {self.acknowledged} to {self.number}, got {reply.done}")
        results = {result.number: result for result in reply.results}
        done = [command for command in self.commands if command.number <= reply.done]
        if missing := [command for command in done if command.number not in results]:
            raise ValueError(f"its reply has no result of command {missing[0].number} ({missing[0].kind})")
        return [(command, results[command.number]) for command in done]

    def acknowledge(self, reply: Reply) -> None:
        """Remove the commands that were carried out."""
        self.commands = [command for command in self.commands if command.number > reply.done]
        self.acknowledged = reply.done
        if not any(command.kind == DOWNLOAD for command in self.commands):
            self.answer = None
        if not any(command.kind == READOUT for command in self.commands):
            self.heads = None

    def drop_round(self) -> None:
        """Remove the commands of an exchange that ended without the client."""
        self.commands = [command for command in self.commands if command.kind not in ROUND_KINDS]

    def state_dict(self, answers: list[Payload]) -> dict[str, Any]:
        """Plain values; the answer as its index in ``answers``, since clients may share one."""
        indices = {
            name: next((i for i, answer in enumerate(answers) if answer is getattr(self, name)), None)
            for name in ("answer", "heads")
        }
        return {**vars(self), "commands": [list(command) for command in self.commands], **indices}

    def load_state_dict(self, state: dict[str, Any], answers: list[Payload]) -> None:
        """Restore the result of ``state_dict``."""
        self.client, self.number, self.acknowledged = state["client"], state["number"], state["acknowledged"]
        self.commands = [Command(*command) for command in state["commands"]]
        self.answer = None if state["answer"] is None else answers[state["answer"]]
        self.heads = None if state.get("heads") is None else answers[state["heads"]]
