"""Flower's ServerApp and ClientApp; a project of your own has two modules of two lines each, see examples/flower."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlscl.cli import expanded, explain
from fedlscl.federated.payload import one_line

HANDSHAKE, REQUEST = "query", "train"
"""Flower's message types for our messages."""
RECORD, PARTITION = "fedlscl", "partition-id"
DATA_OPTIONS = {"root": "data-root", "manifest": "data-manifest"}
"""Options of ``read_federation`` by their names in --node-config."""


def server_app(folder: str | Path) -> ServerApp:
    """The app of the server; ``folder`` contains the file that the run's option ``config`` names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            _serve(Path(folder), grid, context.run_config)
        except Exception as error:
            if (reason := explain(error)) is not None:
                log(f"error: {reason}")
            raise

    return app


def _serve(folder: Path, grid: Grid, options: Mapping[str, Any]) -> None:
    """Train a federation in the folder ``run-dir``, or resume the run that it contains."""
    from fedlscl.cli.runs import lock
    from fedlscl.federated.metrics import summary
    from fedlscl.flower.federation import read_federation
    from fedlscl.flower.server import run_server

    federation = read_federation(folder / path_option(options, "config"))
    run_dir, deadline = path_option(options, "run-dir"), float(options["deadline"])
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = lock(run_dir)
    try:
        transport = FlowerTransport(grid, federation.num_clients, log)
        matrix = run_server(federation, transport, run_dir, deadline, log).matrix
    finally:
        os.close(handle)
    average = summary(matrix, federation.num_tasks - 1)["class_il/average"]
    log(f"done: mean class-incremental accuracy over all tasks {average:.4f}; results in {run_dir}")


def client_app(folder: str | Path) -> ClientApp:
    """The app of a node; ``folder`` contains the file that the run's option ``config`` names."""
    app = ClientApp()

    @app.query()
    def handshake(message: Message, context: Context) -> Message:
        record = ConfigRecord({PARTITION: int(context.node_config[PARTITION])})
        return Message(RecordDict({RECORD: record}), reply_to=message)

    @app.train()
    def request(message: Message, context: Context) -> Message:
        return Message(to_record(_answer(Path(folder), context, from_record(message.content))), reply_to=message)

    return app


def _answer(folder: Path, context: Context, request: bytes) -> bytes:
    # Imported here: Lightning takes seconds to import, and a handshake does not need it.
    from fedlscl.flower.federation import read_federation
    from fedlscl.flower.messages import Reply, pack
    from fedlscl.flower.node import Node

    config = context.node_config
    try:
        if "state-dir" not in config:
            raise ValueError("state-dir is missing: add it to --node-config.")
        own = {option: str(config[name]) for option, name in DATA_OPTIONS.items() if name in config}
        federation = read_federation(folder / path_option(context.run_config, "config"), **own)
        return Node(federation, int(config[PARTITION]), path_option(config, "state-dir")).answer(request)
    except Exception as error:
        if (reason := explain(error)) is None:
            raise
        return pack(Reply([], reason)._asdict())


@dataclass
class FlowerTransport:
    """Exchanges messages with the nodes of a SuperLink.

    Nodes report their client in a handshake; of several nodes with the same client the first one is used while it is
    online. A request that fails is sent again: nodes carry out no command twice.
    """

    grid: Grid
    num_clients: int
    log: Callable[[str], None] = lambda line: None
    pause: float = 0.5
    """Seconds between two polls for replies."""
    retry: float = 5.0
    """Seconds before a failed message is sent again."""
    node_of_client: dict[int, int] = field(default_factory=dict, init=False)

    def exchange(self, requests: dict[int, bytes], seconds: float) -> dict[int, bytes]:
        """Replies by client that arrive in time; returns as soon as all have arrived."""
        self.unknown_nodes: set[int] = set()  # without a client of this run
        self.in_flight: dict[str, int] = {}  # node by message id
        self.retry_at: dict[int, float] = {}  # by node
        replies: dict[int, bytes] = {}
        end = time.monotonic() + seconds
        while len(replies) < len(requests) and (left := end - time.monotonic()) > 0:
            self._send({client: data for client, data in requests.items() if client not in replies}, left)
            self._collect(replies)
            if len(replies) < len(requests):
                time.sleep(min(self.pause, max(0.0, end - time.monotonic())))
        return replies

    def _send(self, requests: dict[int, bytes], seconds_left: float) -> None:
        """Send handshakes to new nodes, and requests to nodes that are online."""
        online, known = set(self.grid.get_node_ids()), set(self.node_of_client.values())
        new = online - known - self.unknown_nodes if len(known) < self.num_clients or not known <= online else ()
        wanted = {node: (HANDSHAKE, RecordDict()) for node in new}
        for client, data in requests.items():
            if (node := self.node_of_client.get(client)) in online:
                wanted[node] = (REQUEST, to_record(data))
        now, busy = time.monotonic(), set(self.in_flight.values())
        for node, (kind, content) in wanted.items():
            if node not in busy and now >= self.retry_at.get(node, 0.0):
                # The lifetime ends with the deadline: later results are not used.
                message = Message(content, node, kind, ttl=max(seconds_left, 1.0))
                (message_id,) = self.grid.push_messages([message]) or [None]
                if message_id is None:
                    self.retry_at[node] = now + self.retry
                else:
                    self.in_flight[message_id] = node

    def _collect(self, replies: dict[int, bytes]) -> None:
        client_of_node = {node: client for client, node in self.node_of_client.items()}
        for message in self.grid.pull_messages(list(self.in_flight)) if self.in_flight else ():
            node = self.in_flight.pop(message.metadata.reply_to_message_id, None)
            if node is None:
                continue
            client = client_of_node.get(node)
            if message.has_error():
                sender = f"node {node}" if client is None else f"client {client}"
                self.log(f"{sender}: {one_line(message.error.reason, 300)}; retrying in {self.retry:g} s")
                self.retry_at[node] = time.monotonic() + self.retry
            elif message.metadata.message_type == HANDSHAKE:
                self._register(node, message)
            elif client is not None:
                replies[client] = from_record(message.content)

    def _register(self, node: int, message: Message) -> None:
        client = message.content.config_records.get(RECORD, {}).get(PARTITION)
        if type(client) is not int or not 0 <= client < self.num_clients:
            flaw = f"partition-id must be 0 to {self.num_clients - 1}, got {client!r}"
        elif (registered := self.node_of_client.get(client, node)) != node and registered in self.grid.get_node_ids():
            flaw = f"node {registered} has the same partition-id {client}"
        else:
            self.node_of_client[client] = node
            return
        self.log(f"node {node} is ignored: {flaw}")
        self.unknown_nodes.add(node)


def to_record(data: bytes) -> RecordDict:
    """Flower's record of a message: one array of bytes."""
    return RecordDict({RECORD: ArrayRecord({RECORD: Array("uint8", (len(data),), "safetensors", data)})})


def from_record(content: RecordDict) -> bytes:
    """The bytes in a record; empty if it has none of ours."""
    record = content.array_records.get(RECORD, {})
    return record[RECORD].data if RECORD in record else b""


def path_option(options: Mapping[str, Any], name: str) -> Path:
    """A path among Flower's options, with ``~`` and variables expanded on this machine."""
    return Path(expanded(str(options[name]), name))


def log(line: str) -> None:
    """Write a line to the server's log."""
    print(f"fedlscl: {line}", flush=True)
