"""What clients of other processes did, brought to all: one process then knows as much as if it had done everything."""

from typing import Any

from fedlscl.federated.client import Client
from fedlscl.federated.engine import Engine
from fedlscl.federated.metrics import AccuracyMatrix
from fedlscl.federated.ranks import Ranks


def gather_history(ranks: Ranks, history: list[dict[str, Any]], begun: int) -> None:
    """Replace what was noted from position ``begun`` on by what all processes noted, in the order of clients."""
    if ranks.size > 1:
        history[begun:] = sorted(ranks.gather(history[begun:]), key=lambda entry: entry["client"])


def gather_accuracies(ranks: Ranks, matrix: AccuracyMatrix, phase: str, task: int, clients: list[Client]) -> None:
    """Enter what the other processes measured of ``clients`` after a task."""
    mine = [(client.id, matrix.row(phase, client.id, task)) for client in clients if ranks.owns(client.id)]
    for client, row in ranks.gather(mine):
        matrix.record(phase, client, task, row)


def gather_clients(ranks: Ranks, engine: Engine, clients: list[Client]) -> None:
    """Bring the other processes' clients to where they are there."""
    if ranks.size > 1:
        mine = [(client.id, client.state_dict()) for client in clients if ranks.owns(client.id)]
        for index, state in ranks.gather(mine):
            if not ranks.owns(index):
                with engine.on_device(clients[index]):
                    clients[index].load_state_dict(state)
