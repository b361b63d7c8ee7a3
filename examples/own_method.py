"""Your own method from Python: FedAvg whose new classes start at their mean features, compared with FedAvg.

Run it with ``python examples/own_method.py``; it takes seconds and needs no download. Starting a class's row at its
mean feature is imprinting (Qi et al., CVPR 2018, arXiv 1712.07136).
"""

from dataclasses import dataclass

from fedlscl import FederatedTrainer, FoundationConfig, Method, SpatialTemporalDataModule
from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import StreamShape
from fedlscl.federated.metrics import summary
from fedlscl.methods import FedAvg
from fedlscl.nets.vit import FoundationClassifier
from fedlscl.testing import check_method


@dataclass(kw_only=True)
class Imprinted(FedAvg):
    """Two hooks of FedAvg change; everything else is inherited."""

    def build_net(self, client: int, stream: StreamShape) -> FoundationClassifier:
        """A frozen ViT with a head whose rows are directions."""
        return FoundationClassifier(self.foundation or FoundationConfig(), stream.num_classes, head="cosine")

    def begin_task(self, client: Client) -> None:
        """The rows of the task's classes point to the mean features of the client's own samples."""
        client.net.head.imprint(*class_means(client, client.train_ids))


def accuracy(method: Method) -> float:
    """Class-incremental accuracy on digits, mean over three clients and three tasks."""
    data = SpatialTemporalDataModule(dataset="digits", num_clients=3, train_per_class=20, test_per_class=15)
    trainer = FederatedTrainer(rounds_per_task=1, accelerator="cpu")
    return summary(trainer.fit(method, data, seed=42), task=2)["class_il/average"]


def main() -> dict[str, float]:
    """Run the checks of every method, then compare."""
    tiny = FoundationConfig(name="test_vit", weights="random", image_size=32)
    check_method(lambda: Imprinted(foundation=tiny, local_epochs=1, batch_size=8))
    glyphs = FoundationConfig(name="vit_glyph_patch4_32", weights="bundled")
    return {kind.__name__: accuracy(kind(foundation=glyphs, local_epochs=2)) for kind in (FedAvg, Imprinted)}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:9} {100 * value:.1f} %")
