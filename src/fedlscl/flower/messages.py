"""Messages between server and nodes, and what each node still has to do."""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from safetensors.torch import save

from fedlscl.federated.method import Progress
from fedlscl.federated.payload import Payload, one_line, read_payload

# What travels over the network: one safetensors message each way, its header in the metadata; nothing is unpickled.

BEGIN, TRAIN, TEST_BEFORE, UPLOAD, DOWNLOAD, END, TEST_AFTER = KINDS = (
    "begin_task",
    "train",
    "test_before",
    "upload",
    "download",
    "end_task",
    "test_after",
)
"""What a node can be told to do: the methods of `ClientRunner`."""
ANSWER = "answer"
"""Prefix of the tensors that a download takes over."""


class Command(NamedTuple):
    """One turn of one client; a node never does the same number twice."""

    number: int
    kind: str
    task: int
    round: int


class Request(NamedTuple):
    """From the server to a client: all that it was told and has not yet said to have done."""

    client: int
    run: str
    """Name of the run, drawn once; a node keeps a state of its own for each."""
    identity: str
    """Hash of what decides the result: a node with another configuration refuses."""
    acknowledged: int
    """Results up to this number have arrived."""
    commands: list[Command]
    answer: Payload | None

    def encode(self) -> bytes:
        """The message."""
        header = {**self._asdict(), "answer": self.answer is not None}
        return pack(header, {} if self.answer is None else prefixed(ANSWER, self.answer))


class Result(NamedTuple):
    """What one command gave."""

    number: int
    said: dict[str, Any]
    """Plain values."""
    tensors: Payload


class Reply(NamedTuple):
    """From a client to the server: results that the server has not yet acknowledged."""

    client: int
    done: int
    """The newest command that was carried out."""
    results: list[Result]
    refusal: str = ""
    """Why nothing was done."""

    def encode(self) -> bytes:
        """The message."""
        header = {**self._asdict(), "results": [[result.number, result.said] for result in self.results]}
        tensors: Payload = {}
        for result in self.results:
            tensors |= prefixed(str(result.number), result.tensors)
        return pack(header, tensors)


def read_request(data: bytes) -> Request:
    """What ``Letter.encode`` wrote.

    Raises:
        ValueError: if the bytes are none.
    """
    header, tensors = unpack(data)
    try:
        commands = [Command(*command) for command in header.pop("commands")]
        answer = tensors_under(ANSWER, tensors) if header.pop("answer") else None
        return Request(**header, commands=commands, answer=answer)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"letter lacks a part ({error}): use the same version of fedlscl on server and nodes."
        ) from None


def read_reply(data: bytes, limit: int | None = None) -> Reply:
    """What ``Reply.encode`` wrote; anybody may have written it.

    Raises:
        ValueError: if the bytes are none, or more than ``limit``.
    """
    header, tensors = unpack(data, limit)
    try:
        said = header.pop("results")
        results = [Result(int(number), dict(values), tensors_under(str(number), tensors)) for number, values in said]
        reply = Reply(**header, results=results)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"reply lacks a part ({one_line(error)})") from None
    if type(reply.client) is not int or type(reply.done) is not int or type(reply.refusal) is not str:
        raise ValueError(f"reply with client {one_line(reply.client)} and done {one_line(reply.done)} is malformed")
    return reply


def prefixed(prefix: str, tensors: Payload) -> Payload:
    """Names with a prefix.

    Example:
        >>> prefixed("answer", {"head.bias": 1})
        {'answer/head.bias': 1}
    """
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def tensors_under(prefix: str, tensors: Payload) -> Payload:
    """The names under a prefix, without it."""
    start = f"{prefix}/"
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def pack(header: dict[str, Any], tensors: Payload) -> bytes:
    """Tensors as safetensors, plain values as JSON in its metadata."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    return save(contiguous, metadata={"fedlscl": json.dumps(header, allow_nan=False)})


def unpack(data: bytes, limit: int | None = None) -> tuple[dict[str, Any], Payload]:
    """What ``pack`` wrote; tensors get memory of their own, since its alignment may decide the last bit of a product.

    Raises:
        ValueError: if the bytes are none, or more than ``limit``.
    """
    tensors = {name: value.clone() for name, value in read_payload(data, limit).items()}
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fedlscl"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"message of {len(data)} bytes is none of fedlscl ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise ValueError(f"message of {len(data)} bytes has a header that is no mapping")
    return header, tensors


# What the server has told a client and what of it has arrived: every command is carried out once, whatever is lost.

OF_A_ROUND = (TRAIN, TEST_BEFORE, UPLOAD)
"""Commands that are worth nothing when their round is over."""


@dataclass
class PendingCommands:
    """One client's commands, numbered from 1; each is carried out once, whatever is lost on the way."""

    client: int
    number: int = 0
    """The newest one."""
    acknowledged: int = 0
    """The newest one that the client is known to have carried out."""
    commands: list[Command] = field(default_factory=list)
    """Those that it is not known to have carried out."""
    answer: Payload | None = None
    """For the download among them."""

    def add(self, kind: str, task: int, round_: int) -> None:
        """Add a command."""
        self.number += 1
        self.commands.append(Command(self.number, kind, task, round_))

    def add_download(self, answer: Payload, progress: Progress) -> None:
        """Add the answer to the client's upload."""
        self.answer = answer
        self.add(DOWNLOAD, progress.task, progress.round)

    def request(self, run: str, identity: str) -> Request:
        """All open commands."""
        return Request(self.client, run, identity, self.acknowledged, list(self.commands), self.answer)

    def completed(self, reply: Reply) -> list[tuple[Command, Result]]:
        """The open commands that a reply reports as carried out, with their results.

        Raises:
            ValueError: if the reply is another client's, or does not match the commands.
        """
        if reply.client != self.client:
            raise ValueError(f"it says that it is client {reply.client}")
        if not self.acknowledged <= reply.done <= self.number:
            raise ValueError(f"it says that it did command {reply.done} of {self.acknowledged} to {self.number}")
        results = {result.number: result for result in reply.results}
        done = [command for command in self.commands if command.number <= reply.done]
        if missing := [command for command in done if command.number not in results]:
            raise ValueError(f"it sent no result of command {missing[0].number} ({missing[0].kind})")
        return [(command, results[command.number]) for command in done]

    def acknowledge(self, reply: Reply) -> None:
        """Remove what was carried out."""
        self.commands = [command for command in self.commands if command.number > reply.done]
        self.acknowledged = reply.done
        if not any(command.kind == DOWNLOAD for command in self.commands):
            self.answer = None

    def drop_round(self) -> None:
        """Remove commands of a round that ended without the client."""
        self.commands = [command for command in self.commands if command.kind not in OF_A_ROUND]

    def state_dict(self, answers: list[Payload]) -> dict[str, Any]:
        """Numbers and text; the answer as its index in ``answers``, since many clients may get the same."""
        index = next((i for i, answer in enumerate(answers) if answer is self.answer), None)
        return {**vars(self), "commands": [list(command) for command in self.commands], "answer": index}

    def load_state_dict(self, state: dict[str, Any], answers: list[Payload]) -> None:
        """Restore what ``state_dict`` gave."""
        self.client, self.number, self.acknowledged = state["client"], state["number"], state["acknowledged"]
        self.commands = [Command(*command) for command in state["commands"]]
        self.answer = None if state["answer"] is None else answers[state["answer"]]
