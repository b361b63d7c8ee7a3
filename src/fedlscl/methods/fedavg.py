"""FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629), from scratch or on a frozen ViT; and none at all."""

from dataclasses import dataclass
from typing import ClassVar

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Progress
from fedlscl.federated.payload import Payload, Upload
from fedlscl.nets.classifier import FoundationClassifier
from fedlscl.nets.net import Net
from fedlscl.nets.small import SmallClassifier
from fedlscl.nets.vit import FoundationConfig


@dataclass(kw_only=True)
class FedAvg(Method):
    """Average everything: a small CNN trained from scratch, or the head of a frozen ViT (the paper's FedAvg+ViT)."""

    card: ClassVar = MethodCard(
        "AISTATS 2017",
        "1602.05629",
        trains="small CNN and head, or the head of a frozen ViT",
        uploads="all that is trained",
    )

    small_model: str = "resnet18"
    """The CNN, any timm name with feature maps."""
    small_image_size: int = 224
    """Its input size in pixels."""
    pretrained: bool = False
    """Start the CNN from timm's weights."""
    foundation: FoundationConfig | None = None
    """A frozen ViT in place of the CNN; only the linear head is then trained and sent."""

    def build_net(self, client: int, num_classes: int) -> Net:
        """A CNN with a head, or a frozen ViT with a head."""
        if self.foundation is not None:
            return FoundationClassifier(self.foundation, num_classes)
        return SmallClassifier(self.small_model, num_classes, self.small_image_size, self.pretrained)


@dataclass(kw_only=True)
class Local(FedAvg):
    """Control: every client trains alone and nothing is sent."""

    card: ClassVar = MethodCard("control", trains="as FedAvg", uploads="nothing")

    def upload(self, client: Client) -> Payload:
        """Nothing."""
        return {}

    def expects(self, upload: Upload, net: Net) -> Payload | None:
        """Nothing."""
        return {}

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Nothing."""
        return [{} for _ in uploads]

    def download(self, client: Client, payload: Payload) -> None:
        """Nothing."""
