"""What travels over the network: one safetensors message each way, its header in the metadata; nothing is unpickled."""

import json
from typing import Any, NamedTuple

from safetensors.torch import save

from fedlscl.federated.payload import Payload, one_line, read_payload

BEGIN, TRAIN, TEST_BEFORE, UPLOAD, DOWNLOAD, END, TEST_AFTER = KINDS = (
    "begin_task",
    "train",
    "test_before",
    "upload",
    "download",
    "end_task",
    "test_after",
)
"""What a node can be told to do: the turns of `LocalWork`."""
ANSWER = "answer"
"""Prefix of the tensors that a download takes over."""


class Command(NamedTuple):
    """One turn of one client; a node never does the same number twice."""

    number: int
    kind: str
    task: int
    round: int


class Letter(NamedTuple):
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


def read_letter(data: bytes) -> Letter:
    """What ``Letter.encode`` wrote.

    Raises:
        ValueError: if the bytes are none.
    """
    header, tensors = unpack(data)
    try:
        commands = [Command(*command) for command in header.pop("commands")]
        answer = tensors_under(ANSWER, tensors) if header.pop("answer") else None
        return Letter(**header, commands=commands, answer=answer)
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
