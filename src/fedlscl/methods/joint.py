"""Joint training on the pooled data of all clients: a reference, not a federated method.

It violates federation and continual learning on purpose: one net is trained on the samples of all clients and tasks so
far, and all clients get it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import Method, MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.methods.fedavg import FedAvg
from fedlscl.methods.fedlscl import Collaborative
from fedlscl.modules import ClassificationModule, CollaborativeModule, Learner
from fedlscl.nets.collaborator import Collaborator
from fedlscl.nets.net import Net

TRAINER = 0
"""The client whose net is trained on the pool."""


@dataclass(kw_only=True)
class _Pool(Method):
    """The server's pool of all samples so far, and one net for all clients."""

    simulation_only: ClassVar = True
    from_scratch: bool = True
    """Train from scratch in every task, so that earlier tasks are not trained longer."""
    pool: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @override
    def begin_task(self, client: Client) -> None:
        for name, values in {"ids": client.train_ids, "classes": client.classes}.items():
            self.pool[name] = torch.cat([self.pool.get(name, values[:0]), values]).unique()
        if client.id == TRAINER and self.from_scratch:
            fresh = self.build_net(client.id, StreamShape(len(client.net.head.weight)))
            client.net.load_state_dict(fresh.state_dict())

    @override
    def stages(self, client: Client) -> Iterator[Stage]:
        if client.id == TRAINER:
            batches = client.loader(self.pool["ids"], self.batch_size)
            yield Stage("train", self.objective(client), batches, self.local_epochs)

    @override
    def objective(self, client: Client) -> Learner:
        return ClassificationModule(client.net, self.pool["classes"], lr=self.lr)

    @override
    def upload(self, client: Client) -> Payload:
        return outgoing(client.net.state_dict()) if client.id == TRAINER else {}

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        return dict(net.state_dict()) if upload.client == TRAINER else {}

    @override
    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        (answer,) = [upload.payload for upload in uploads if upload.client == TRAINER]
        return [answer] * len(uploads)


@dataclass(kw_only=True)
class Joint(_Pool, FedAvg):
    """Reference: FedAvg's net, trained on all data of all clients and tasks so far (in simulation only)."""

    card: ClassVar = MethodCard("all data (centralised)", trains="as FedAvg, on pooled data", uploads="all data")


@dataclass(kw_only=True)
class JointLSCL(_Pool, Collaborative):
    """Reference: Fed-LSCL's net, trained by Stage 1 on all data of all clients and tasks so far."""

    card: ClassVar = MethodCard("all data (centralised)", trains="as Fed-LSCL, on pooled data", uploads="all data")

    @override
    def build_net(self, client: int, stream: StreamShape) -> Net:
        return Collaborator(self.collaborator, stream.num_classes)

    @override
    def objective(self, client: Client) -> Learner:
        if client.round == 0:
            client.net.head.imprint(*class_means(client, self.pool["ids"], pick="tokens"))
        return CollaborativeModule(client.net, self.pool["classes"], **self.rates, freeze_norm=True)
