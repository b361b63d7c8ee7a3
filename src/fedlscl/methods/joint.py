"""Joint training: the upper bound of every table, and no federated method.

It breaks federation and continual learning on purpose: the server pools the training samples of all clients and of all
tasks so far, one net learns them at once, and everybody gets it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Progress, Stage
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.methods.fedavg import FedAvg
from fedlscl.modules.classification import ClassificationModule

TRAINER = 0
"""The client whose net learns the pool."""


@dataclass(kw_only=True)
class Joint(FedAvg):
    """Oracle: all data of all clients and tasks so far, trained at once.

    It runs in simulation only, and its traffic is that of handing out one net.
    """

    card: ClassVar = MethodCard("oracle", trains="as FedAvg, on everything pooled", uploads="everything, on purpose")

    from_scratch: bool = True
    """Begin every task with fresh weights, so that earlier tasks have no head start."""
    pool: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def begin_task(self, client: Client) -> None:
        """Add the client's samples to the pool."""
        for name, values in {"ids": client.train_ids, "classes": client.classes}.items():
            self.pool[name] = torch.cat([self.pool.get(name, values[:0]), values]).unique()
        if client.id == TRAINER and self.from_scratch:
            client.net.load_state_dict(self.build_net(client.id, len(client.net.head.weight)).state_dict())

    def stages(self, client: Client) -> Iterator[Stage]:
        """One client learns the pool; the others wait."""
        if client.id == TRAINER:
            module = ClassificationModule(client.net, self.pool["classes"], lr=self.lr)
            yield Stage("train", module, client.loader(self.pool["ids"], self.batch_size), self.local_epochs)

    def upload(self, client: Client) -> Payload:
        """The net that learned."""
        return outgoing(client.net.state_dict()) if client.id == TRAINER else {}

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Hand out the one net."""
        (answer,) = [upload.payload for upload in uploads if upload.client == TRAINER]
        return [answer] * len(uploads)

    def state_dict(self) -> dict[str, Any]:
        """The pool."""
        return dict(self.pool)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the pool."""
        self.pool = dict(state)
