"""ServerApp and ClientApp of Flower. An app of one's own has two modules of two lines each: see examples/flower."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlscl.cli.paths import expanded
from fedlscl.federated.payload import one_line

if TYPE_CHECKING:
    from fedlscl.flower.federation import Federation


# Letters over Flower's Grid: who is where, until when, and again where something was lost.

HELLO, LETTER = "query", "train"
"""Types of our messages, out of Flower's."""
RECORD, PARTITION = "fedlscl", "partition-id"


class FlowerTransport:
    """Carries letters to the nodes that a SuperLink has registered.

    A node says which client it is; the first that says so is it for as long as it is online. A letter whose node fails
    is sent again: nodes do nothing twice.

    Args:
        grid: Flower's.
        num_clients: clients are numbered below it.
        say: takes a line about what happened.
        pause: seconds between two looks for replies.
        retry: seconds after which a letter that came back with an error is sent again.
    """

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        say: Callable[[str], None] = lambda line: None,
        pause: float = 0.5,
        retry: float = 5.0,
    ) -> None:
        self.grid, self.num_clients, self.say, self.pause, self.retry = grid, num_clients, say, pause, retry
        self.node_of_client: dict[int, int] = {}
        """Node of each client."""
        self.unknown_nodes: set[int] = set()
        """Nodes that turned out to be no client of this run, in this exchange."""

    def exchange(self, requests: dict[int, bytes], seconds: float) -> dict[int, bytes]:
        """Replies by client, of those that came in time; returns as soon as all are there."""
        # Asked anew where a client is missing: who came second may be the one that is left.
        self.unknown_nodes.clear()
        end, round_ = time.monotonic() + seconds, _Round(requests, {}, {}, {})
        while len(round_.replies) < len(requests) and (left := end - time.monotonic()) > 0:
            self._send(round_, left)
            self._collect(round_)
            if len(round_.replies) < len(requests):
                time.sleep(min(self.pause, max(0.0, end - time.monotonic())))
        return round_.replies

    def _send(self, round_: "_Round", left: float) -> None:
        """Greet nodes that nobody knows yet; send what is neither answered nor under way to those online."""
        online, now = set(self.grid.get_node_ids()), time.monotonic()
        unknown = online - set(self.node_of_client.values()) - self.unknown_nodes
        if len(self.node_of_client) == self.num_clients and set(self.node_of_client.values()) <= online:
            unknown = set()
        busy = set(round_.under_way.values())
        wanted = {node: (HELLO, RecordDict()) for node in unknown}
        for client, data in round_.requests.items():
            if client not in round_.replies and self.node_of_client.get(client) in online:
                wanted[self.node_of_client[client]] = (LETTER, carried(data))
        for node, (kind, content) in wanted.items():
            if node not in busy and now >= round_.not_before.get(node, 0.0):
                # What is not fetched by the deadline is not worth doing.
                (number,) = self.grid.push_messages([Message(content, node, kind, ttl=max(left, 1.0))]) or [None]
                if number is None:
                    round_.not_before[node] = now + self.retry
                else:
                    round_.under_way[number] = node

    def _collect(self, round_: "_Round") -> None:
        if not round_.under_way:
            return
        for message in self.grid.pull_messages(list(round_.under_way)):
            node = round_.under_way.pop(message.metadata.reply_to_message_id, None)
            if node is None:
                continue
            client = next((client for client, home in self.node_of_client.items() if home == node), None)
            if message.has_error():
                who = f"node {node}" if client is None else f"client {client}"
                self.say(f"{who}: {one_line(message.error.reason, 300)}; asked again in {self.retry:g} s")
                round_.not_before[node] = time.monotonic() + self.retry
            elif message.metadata.message_type == HELLO:
                self._settle(node, message)
            elif client is not None:
                round_.replies[client] = carried_by(message.content)

    def _settle(self, node: int, message: Message) -> None:
        """Note which client a node says that it is."""
        client = message.content.config_records.get(RECORD, {}).get(PARTITION)
        if type(client) is not int or not 0 <= client < self.num_clients:
            self.say(f"node {node} has partition-id {client!r}, which is none of {self.num_clients} clients: ignored")
            self.unknown_nodes.add(node)
        elif (
            self.node_of_client.get(client, node) in self.grid.get_node_ids()
            and self.node_of_client.get(client, node) != node
        ):
            self.say(f"node {node} has partition-id {client} as node {self.node_of_client[client]} has: ignored")
            self.unknown_nodes.add(node)
        else:
            self.node_of_client[client] = node


class _Round(NamedTuple):
    """An exchange under way."""

    requests: dict[int, bytes]
    replies: dict[int, bytes]
    under_way: dict[str, int]
    """Node by message."""
    not_before: dict[int, float]
    """When a node that failed is tried again."""


def carried(data: bytes) -> RecordDict:
    """A letter or reply as Flower carries it: in one array, untouched."""
    return RecordDict({RECORD: ArrayRecord({RECORD: Array("uint8", (len(data),), "safetensors", data)})})


def carried_by(content: RecordDict) -> bytes:
    """The bytes of a letter or reply; none where there is nothing of ours."""
    record = content.array_records.get(RECORD, {})
    return record[RECORD].data if RECORD in record else b""


def client_app(folder: str | Path) -> ClientApp:
    """The app of a node.

    Args:
        folder: where the configuration lies that the run names (``config``); the app's own folder.
    """
    app = ClientApp()

    @app.query()
    def handshake(message: Message, context: Context) -> Message:
        said = ConfigRecord({PARTITION: int(context.node_config[PARTITION])})
        return Message(RecordDict({RECORD: said}), reply_to=message)

    @app.train()
    def request(message: Message, context: Context) -> Message:
        return Message(carried(_answer(Path(folder), context, carried_by(message.content))), reply_to=message)

    return app


def _answer(folder: Path, context: Context, request: bytes) -> bytes:
    # Here, since torch takes seconds to load and a greeting needs none of it.
    from fedlscl.cli.errors import explain
    from fedlscl.flower.federation import read_federation
    from fedlscl.flower.messages import Reply
    from fedlscl.flower.node import Node

    index, config = int(context.node_config[PARTITION]), context.node_config
    try:
        if "state-dir" not in config:
            raise ValueError("state-dir is missing: add it to --node-config.")
        own = {option: str(config[name]) for option, name in OWN_DATA.items() if name in config}
        federation = read_federation(folder / place(context.run_config, "config"), **own)
        return Node(federation, index, place(config, "state-dir")).answer(request)
    except Exception as error:
        reason = explain(error)
        if reason is None:
            raise
        return Reply(index, 0, [], reason).encode()


OWN_DATA = {"root": "data-root", "manifest": "data-manifest"}
"""Where a node's data are, among its --node-config."""


def server_app(folder: str | Path) -> ServerApp:
    """The app of the server.

    Args:
        folder: where the configuration lies that the run names (``config``); the app's own folder.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from fedlscl.cli.errors import explain
        from fedlscl.flower.federation import read_federation

        try:
            run(read_federation(Path(folder) / place(context.run_config, "config")), grid, context)
        except Exception as error:
            if (reason := explain(error)) is not None:
                say(f"error: {reason}")
            raise

    return app


def run(federation: "Federation", grid: Grid, context: Context) -> None:
    """Train a federation in the folder ``run-dir``, or continue the run that is there."""
    import os

    from fedlscl.cli.runs import lock
    from fedlscl.federated.metrics import summary
    from fedlscl.flower.server import run_server

    run_dir, deadline = place(context.run_config, "run-dir"), float(context.run_config["deadline"])
    transport = FlowerTransport(grid, federation.num_clients, say)
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = lock(run_dir)
    try:
        matrix = run_server(federation, transport, run_dir, deadline, say).matrix
    finally:
        os.close(handle)
    average = summary(matrix, federation.num_tasks - 1)["class_il/average"]
    say(f"done: mean class-incremental accuracy over all tasks {average:.4f}; results in {run_dir}")


def place(options: Mapping[str, Any], name: str) -> Path:
    """A path among Flower's options, with ``~`` and variables expanded on the machine where it is."""
    return Path(expanded(str(options[name]), name))


def say(line: str) -> None:
    """Write a line to the server's log."""
    print(f"fedlscl: {line}", flush=True)
