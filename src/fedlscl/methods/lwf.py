"""LwF (Li & Hoiem, TPAMI 2017, arXiv 1606.09282) on FedAvg.

The teacher is the global model at the end of the client's previous task, and only columns of classes that the client
itself has met are distilled (ours: the columns of other clients' private classes were never trained here).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Stage
from fedlscl.methods.fedavg import FedAvg
from fedlscl.modules.classification import ClassificationModule, DistillationModule


@dataclass(kw_only=True)
class LwF(FedAvg):
    """FedAvg whose clients keep the old model's answers about old classes on the new images."""

    card: ClassVar = MethodCard(
        "TPAMI 2017", "1606.09282", trains="as FedAvg, distilling the previous model", uploads="all that is trained"
    )

    alpha: float = 1.0
    """Weight of the distillation, which carries the factor T^2."""
    temperature: float = 2.0
    """T of both softmaxes."""

    def stages(self, client: Client) -> Iterator[Stage]:
        """Plain training on the first task, with distillation from the second on."""
        if client.previous is None:
            module = ClassificationModule(client.net, client.classes, lr=self.lr)
        else:
            module = DistillationModule(
                client.net, client.previous, client.old, self.alpha, self.temperature, client.classes, lr=self.lr
            )
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)

    def end_task(self, client: Client) -> None:
        """The model as the server last sent it becomes the teacher."""
        client.snapshot()
