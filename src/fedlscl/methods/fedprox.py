"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127): FedAvg with a pull towards the round's global weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Stage
from fedlscl.methods.fedavg import FedAvg
from fedlscl.modules.classification import ProximalModule


@dataclass(kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose clients minimise cross-entropy + mu / 2 ||w - w_g||^2."""

    card: ClassVar = MethodCard(
        "MLSys 2020", "1812.06127", trains="as FedAvg, pulled towards the global weights", uploads="all that is trained"
    )

    mu: float = 0.01
    """Strength of the pull; under Adam it is not comparable with the paper's SGD values."""

    def stages(self, client: Client) -> Iterator[Stage]:
        """One stage, anchored at the weights just received."""
        module = ProximalModule(client.net, self.mu, client.classes, lr=self.lr)
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)
