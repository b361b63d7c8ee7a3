"""The whole federation between two rounds: what a checkpoint holds, and how it is taken up."""

from typing import TYPE_CHECKING, Any

from fedlscl.federated.method import Progress

if TYPE_CHECKING:
    from fedlscl.federated.trainer import FederatedTrainer


def state_of(trainer: "FederatedTrainer", progress: Progress) -> dict[str, Any]:
    """Tensors and plain values, as they are before the round of ``progress``."""
    return {
        "identity": trainer.identity,
        "progress": list(progress),
        "method": trainer.method.state_dict(),
        "door": trainer.server.door.state_dict(),
        "clients": [client.state_dict() for client in trainer.clients],
        "matrix": trainer.matrix.values,
        "traffic": trainer.traffic,
        "history": trainer.history,
    }


def take_up(trainer: "FederatedTrainer", state: dict[str, Any]) -> Progress:
    """Put a trainer whose clients are built where ``state_of`` found one; returns the round that comes next."""
    trainer.method.load_state_dict(state["method"])
    trainer.server.door.load_state_dict(state["door"])
    progress = Progress(*state["progress"])
    for client, values in zip(trainer.clients, state["clients"], strict=True):
        with trainer.engine.on_device(client):
            client.load_state_dict(values)
        client.task, client.round = min(progress.task, trainer.num_tasks - 1), progress.round
    trainer.matrix.values = state["matrix"]
    trainer.traffic, trainer.history = state["traffic"], state["history"]
    return progress
