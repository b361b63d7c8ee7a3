"""The small model theta_i: a timm CNN with a private projection to the common feature space."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl.nets.classifier import LinearHead
from fedlscl.nets.net import Classification, Net, prepare
from fedlscl.nets.vit import check_timm_name

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SmallModel(nn.Module):
    """A CNN of timm by name, pooled: stored uint8 images (B, 3, h, w) to (B, width)."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, image_size: int, pretrained: bool = False) -> None:
        super().__init__()
        import timm

        check_timm_name(name, "small_model")
        self.image_size = image_size
        self.cnn: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
        try:
            self.width = drop_unused(self.cnn, image_size)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"small_model {name!r} cannot take images of {image_size} pixels ({reason}): choose another "
                "small_image_size or a CNN."
            ) from error
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps averaged over the image; timm's own head layers are not used."""
        x = prepare(images, self.image_size, self.mean, self.std)
        x = self.cnn.forward_features(x.contiguous(memory_format=torch.channels_last))
        return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


class UnitFeatures(nn.Module):
    """E: pooled features projected to feature_dim and scaled to unit norm (ours; not in the paper).

    Without this scale one Adam step moves every generated weight by about 0.4 and wrecks the frozen ViT; with it the
    trace of every client's second moment is one, so that lambda of Eq. 5 means the same for every small model.
    """

    def __init__(self, width: int, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.project = nn.Identity() if width == feature_dim else nn.Linear(width, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) to (B, feature_dim), zero mean and unit norm."""
        x = self.project(x)
        return F.layer_norm(x.float(), (self.feature_dim,)) * self.feature_dim**-0.5


class SmallClassifier(Net):
    """A small model with a linear head: what FedAvg and its kin train from scratch."""

    def __init__(self, name: str, num_classes: int, image_size: int, pretrained: bool = False) -> None:
        super().__init__()
        self.small = SmallModel(name, image_size, pretrained)
        self.head = LinearHead(self.small.width, num_classes)

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Classification:
        """Classify stored images (B, 3, h, w)."""
        features = self.small(images)
        return Classification(features, self.head(features))


def drop_unused(cnn: Any, image_size: int) -> int:
    """Drop the parts that ``forward_features`` never touches (vgg16 keeps 120 M such weights); return its width."""
    cnn.eval()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        maps = cnn.forward_features(torch.randn(1, 3, image_size, image_size))
        maps.sum().backward()
    for name, child in list(cnn.named_children()):
        parameters = list(child.parameters())
        if parameters and all(p.grad is None for p in parameters):
            setattr(cnn, name, nn.Identity())
    cnn.zero_grad(set_to_none=True)
    cnn.train()
    return maps.shape[1] if maps.dim() == 4 else maps.shape[-1]
