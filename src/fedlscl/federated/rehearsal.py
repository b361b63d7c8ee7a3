"""Runs on tiny fake data that keep every message: what the contract looks at."""

from typing import Any

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.callbacks import Callback
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.payload import Payload, Upload
from fedlscl.federated.trainer import FederatedTrainer


class Recorded(FederatedTrainer):
    """Two rounds per task on the CPU, with all messages kept."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"accelerator": "cpu", "rounds_per_task": 2, "quorum": 0} | options)
        self.uploads: list[Upload] = []
        self.answers: list[list[Payload]] = []

    def _server_round(self, uploads: list[Upload]) -> None:
        aggregate = self.method.aggregate

        def recorded(uploads: list[Upload], progress: Progress) -> list[Payload]:
            self.answers.append(aggregate(uploads, progress))
            return self.answers[-1]

        self.uploads += uploads
        self.method.aggregate = recorded
        try:
            super()._server_round(uploads)
        finally:
            del self.method.aggregate

    @property
    def states(self) -> dict[str, Any]:
        """All that a checkpoint says of server and clients."""
        return {"method": self.method.state_dict(), "clients": [client.state_dict() for client in self.clients]}


class Stopped(Exception):
    """The run was stopped on purpose."""


class Stop(Callback):
    """Ends a run after its n-th checkpoint."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_checkpoint(self, trainer: FederatedTrainer) -> None:
        """Count."""
        self.left -= 1
        if not self.left:
            raise Stopped


def fake_data(**options: Any) -> SpatialTemporalDataModule:
    """Two clients, two tasks of two classes, six classes in all, where ``options`` do not say otherwise."""
    common = dict(
        dataset="fake", fake_classes=6, num_clients=2, num_tasks=2, private_classes=2, public_classes=2,
        train_per_class=8, test_per_class=4, image_size=16, batch_size=8,
    )  # fmt: skip
    return SpatialTemporalDataModule(**common | options)


def learn(method: Method, **options: Any) -> Recorded:
    """A finished run on the fake data."""
    run = Recorded(**options)
    run.fit(method, fake_data())
    return run
