"""Messages between server and nodes, and the commands that a node has not yet acknowledged.

A message is one safetensors blob whose metadata has a JSON header, in which tensors are named; nothing in it is
executed.
"""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fedlscl.federated.method import Progress
from fedlscl.federated.payload import Payload, one_line, read_message, write_payload

BEGIN, TRAIN, TEST_BEFORE, UPLOAD = "begin_task", "train", "test_before", "upload"
DOWNLOAD, END, TEST_AFTER = "download", "end_task", "test_after"
READOUT_SUMS, READOUT = "readout_sums", "readout"
ROUND_KINDS = (TRAIN, TEST_BEFORE, UPLOAD, READOUT_SUMS)
"""Commands that are dropped when their exchange is over."""
TENSOR = "__tensor__"
"""Key of a reference to a tensor."""


class Command(NamedTuple):
    """One turn of a client; a node carries out each number once."""

    number: int
    kind: str
    task: int
    round: int
    payload: Payload | None = None
    """The server's response to an upload, or the heads of readouts."""


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


class Reply(NamedTuple):
    """From a client to the server."""

    results: list[dict[str, Any]]
    """Of each command of the request, plain values and tensors by name."""
    refusal: str = ""
    """Error for which the request was refused."""


class Description(NamedTuple):
    """A client's report at the start of a task: counts only."""

    num_classes: int
    fingerprint: str
    class_names: str
    """`names_hash` of the class names in label order."""
    classes: list[int]
    train_samples: int
    test_samples: int


def read_request(data: bytes) -> Request:
    """Deserialise a request; raises a ValueError if it is malformed."""
    try:
        request = Request(**unpack(data))
        return request._replace(commands=[Command(*fields) for fields in request.commands])
    except TypeError as error:
        raise ValueError(f"request is malformed ({error}): use the same version of fedlscl everywhere.") from None


def read_reply(data: bytes, limit: int | None = None) -> Reply:
    """Deserialise an untrusted reply; raises a ValueError if it is malformed or has more than ``limit`` bytes."""
    try:
        reply = Reply(**unpack(data, limit))
    except TypeError as error:
        raise ValueError(f"reply is malformed ({one_line(error)})") from None
    results, refusal = reply
    if type(results) is not list or not all(type(each) is dict for each in results) or type(refusal) is not str:
        raise ValueError("reply is malformed: results must be a list of mappings, and refusal a text")
    return reply


def pack(message: Any) -> bytes:
    """Serialise nested dicts, lists and tuples of plain values and tensors."""
    tensors: Payload = {}

    def refer(tensor: Tensor) -> dict[str, str]:
        name = str(len(tensors))
        tensors[name] = tensor
        return {TENSOR: name}

    header = json.dumps(message, default=refer, allow_nan=False)
    return write_payload(tensors, {"fedlscl": header})


def unpack(data: bytes, limit: int | None = None) -> dict[str, Any]:
    """A dict that ``pack`` serialised; raises a ValueError if it is malformed or has more than ``limit`` bytes."""
    metadata, tensors = read_message(data, limit)

    def resolve(found: dict[str, Any]) -> Any:
        # Each tensor once: a short message must not refer to gigabytes.
        return tensors.pop(found[TENSOR]) if found.keys() == {TENSOR} else found

    try:
        header = json.loads(metadata["fedlscl"], object_hook=resolve)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"message of {len(data)} bytes is not of fedlscl ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise ValueError(f"header of the message must be a mapping, got {type(header).__name__}")
    return header


@dataclass
class PendingCommands:
    """Unacknowledged commands of one client, numbered from 1, so that lost and repeated messages change nothing."""

    number: int = 0
    """Number of the newest command."""
    acknowledged: int = 0
    """Number of the last command whose result has arrived."""
    commands: list[Command] = field(default_factory=list)

    def add(self, progress: Progress, *kinds: str, payload: Payload | None = None) -> None:
        """Add commands."""
        for kind in kinds:
            self.number += 1
            self.commands.append(Command(self.number, kind, *progress.position, payload))

    def acknowledge(self) -> None:
        """All results have arrived."""
        self.acknowledged, self.commands = self.number, []

    def drop_round(self) -> None:
        """Remove the commands of an exchange that ended without the client."""
        self.commands = [command for command in self.commands if command.kind not in ROUND_KINDS]
