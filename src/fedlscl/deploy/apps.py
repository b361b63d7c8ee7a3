"""ServerApp and ClientApp of Flower. An app of one's own has two modules of two lines each: see examples/flower."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlscl.cli.paths import expanded
from fedlscl.deploy.flower import PARTITION, RECORD, FlowerPost, carried, carried_by

if TYPE_CHECKING:
    from fedlscl.deploy.federation import Federation


def client_app(folder: str | Path) -> ClientApp:
    """The app of a node.

    Args:
        folder: where the configuration lies that the run names (``config``); the app's own folder.
    """
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        said = ConfigRecord({PARTITION: int(context.node_config[PARTITION])})
        return Message(RecordDict({RECORD: said}), reply_to=message)

    @app.train()
    def letter(message: Message, context: Context) -> Message:
        return Message(carried(_answer(Path(folder), context, carried_by(message.content))), reply_to=message)

    return app


def _answer(folder: Path, context: Context, letter: bytes) -> bytes:
    # Here, since torch takes seconds to load and a greeting needs none of it.
    from fedlscl.cli.errors import explain
    from fedlscl.deploy.federation import read_federation
    from fedlscl.deploy.letters import Reply
    from fedlscl.deploy.node import Node

    index, config = int(context.node_config[PARTITION]), context.node_config
    try:
        if "state-dir" not in config:
            raise ValueError("state-dir is missing: add it to --node-config.")
        own = {option: str(config[name]) for option, name in OWN_DATA.items() if name in config}
        federation = read_federation(folder / place(context.run_config, "config"), **own)
        return Node(federation, index, place(config, "state-dir")).answer(letter)
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
        from fedlscl.deploy.federation import read_federation

        try:
            run(read_federation(Path(folder) / place(context.run_config, "config")), grid, context)
        except Exception as error:
            if (reason := explain(error)) is not None:
                say(f"error: {reason}")
            raise

    return app


def run(federation: "Federation", grid: Grid, context: Context) -> None:
    """Coordinate a run in the folder ``run-dir``, or go on with the one that is there."""
    import os

    from fedlscl.cli.runs import lock
    from fedlscl.deploy.coordinator import Coordinator
    from fedlscl.federated.metrics import summary

    run_dir, deadline = place(context.run_config, "run-dir"), float(context.run_config["deadline"])
    post = FlowerPost(grid, federation.num_clients, say)
    coordinator = Coordinator(federation, post, run_dir, deadline, say)
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = lock(run_dir)
    try:
        knowledge = coordinator.fit()
    finally:
        os.close(handle)
    average = summary(knowledge.matrix, federation.num_tasks - 1)["seen/average"]
    say(f"done: mean accuracy over all tasks (seen) {average:.4f}; results in {run_dir}")


def place(options: Mapping[str, Any], name: str) -> Path:
    """A path among Flower's options, with ``~`` and variables expanded on the machine where it is."""
    return Path(expanded(str(options[name]), name))


def say(line: str) -> None:
    """Write a line to the server's log."""
    print(f"fedlscl: {line}", flush=True)
