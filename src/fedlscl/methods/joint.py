"""Joint training: a reference with all data in one place, not a federated method.

It breaks federation and continual learning on purpose: the server pools the training samples of all clients and of all
tasks so far, one net learns them at once, and everybody gets it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import Method, MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.analytic import discriminant_solution
from fedlscl.methods.fedavg import FedAvg
from fedlscl.methods.training_free import moments_of
from fedlscl.modules.collaborative import GENERATOR_LR, HEAD_LR, CollaborativeModule
from fedlscl.modules.learner import ClassificationModule, Learner
from fedlscl.nets.collaborator import HEADS, Collaborator, CollaboratorConfig
from fedlscl.nets.net import Net

TRAINER = 0
"""The client whose net learns the pool."""


@dataclass(kw_only=True)
class _Pool(Method):
    """The server's pool of all samples so far, and one net for everybody."""

    simulation_only: ClassVar = True

    from_scratch: bool = True
    """Begin every task with fresh weights, so that earlier tasks have no head start."""
    pool: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def begin_task(self, client: Client) -> None:
        """Add the client's samples to the pool."""
        for name, values in {"ids": client.train_ids, "classes": client.classes}.items():
            self.pool[name] = torch.cat([self.pool.get(name, values[:0]), values]).unique()
        if client.id == TRAINER and self.from_scratch:
            fresh = self.build_net(client.id, StreamShape(len(client.net.head.weight)))
            client.net.load_state_dict(fresh.state_dict())

    def stages(self, client: Client) -> Iterator[Stage]:
        """One client learns the pool; the others wait."""
        if client.id == TRAINER:
            batches = client.loader(self.pool["ids"], self.batch_size)
            yield Stage("train", self.objective(client), batches, self.local_epochs)

    def objective(self, client: Client) -> Learner:
        """What that client minimises."""
        return ClassificationModule(client.net, self.pool["classes"], lr=self.lr)

    def upload(self, client: Client) -> Payload:
        """The net that learned."""
        return outgoing(client.net.state_dict()) if client.id == TRAINER else {}

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """A net from one client alone."""
        return dict(net.state_dict()) if upload.client == TRAINER else {}

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Hand out the one net."""
        (answer,) = [upload.payload for upload in uploads if upload.client == TRAINER]
        return [answer] * len(uploads)


@dataclass(kw_only=True)
class Joint(_Pool, FedAvg):
    """Oracle: all data of all clients and tasks so far, trained at once.

    It runs in simulation only, and its traffic is that of handing out one net.
    """

    card: ClassVar = MethodCard("all data (centralised)", trains="as FedAvg, on pooled data", uploads="all data")


@dataclass(kw_only=True)
class JointLSCL(_Pool):
    """Oracle: Fed-LSCL's net learns all data of all clients and tasks so far at once (Stage 1; nothing is fused)."""

    card: ClassVar = MethodCard("all data (centralised)", trains="as Fed-LSCL, on pooled data", uploads="all data")

    collaborator: CollaboratorConfig = field(default_factory=CollaboratorConfig)
    """The net."""
    generator_lr: float = GENERATOR_LR
    """Learning rate of the generator."""
    head_lr: float = HEAD_LR
    """Learning rate of the head."""
    shrinkage: float = 0.2
    """Of the analytic heads' covariance."""

    def build_net(self, client: int, stream: StreamShape) -> Net:
        """A collaborator."""
        return Collaborator(self.collaborator, stream.num_classes)

    def objective(self, client: Client) -> Learner:
        """Stage 1, from class means; BatchNorm is at rest."""
        if client.round == 0:
            client.net.head.imprint(*class_means(client, self.pool["ids"], pick="tokens"))
        rates = {"lr": self.lr, "generator_lr": self.generator_lr, "head_lr": self.head_lr, "freeze_norm": True}
        return CollaborativeModule(client.net, self.pool["classes"], **rates)

    def upload(self, client: Client) -> Payload:
        """The net that learned, with the analytic heads of the pool."""
        if client.id != TRAINER:
            return {}
        for head, reads in HEADS.items():
            if hasattr(client.net, head):
                sums = moments_of(client, self.pool["ids"], reads)
                assert sums is not None
                getattr(client.net, head).set(*discriminant_solution(sums, self.shrinkage))
        return outgoing(client.net.state_dict())
