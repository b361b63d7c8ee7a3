"""Heads on features, and a frozen foundation model with a head on top."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.nets.net import Classification
from fedlscl.nets.vit import FoundationConfig, FrozenViTNet, foundation


class LinearHead(nn.Linear):
    """The paper's head: features (B, width) to logits (B, num_classes)."""

    def imprint(self, classes: Tensor, means: Tensor) -> None:
        """Does nothing: a linear head starts from random rows."""


class UnitLinearHead(nn.Linear):
    """A linear head on features scaled to unit norm, as ridge regression solves it."""

    @override
    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features.float()), self.weight, self.bias)


class CosineHead(nn.Module):
    """Scaled cosine between features and one unit row per class (ours; not in the paper).

    A class whose row is imprinted with its mean feature begins at nearest-class-mean accuracy
    (Qi et al., CVPR 2018, arXiv 1712.07136), and no row can win by norm alone.
    """

    def __init__(self, width: int, num_classes: int, scale: float = 20.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(num_classes, width) * width**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) to (B, num_classes)."""
        return self.scale * F.linear(F.normalize(features.float()), F.normalize(self.weight))

    @torch.no_grad()
    def imprint(self, classes: Tensor, means: Tensor) -> None:
        """Set the rows of ``classes`` (C,) to the directions of ``means`` (C, width)."""
        self.weight[classes] = F.normalize(means.to(self.weight))


def make_head(kind: str, width: int, num_classes: int) -> nn.Module:
    """A head by its name in the configuration: linear, cosine or unit."""
    heads = {"linear": LinearHead, "cosine": CosineHead, "unit": UnitLinearHead}
    if kind not in heads:
        raise ValueError(f"head must be one of {', '.join(heads)}, got {kind!r}.")
    return heads[kind](width, num_classes)


class FoundationClassifier(FrozenViTNet):
    """A frozen ViT with a trainable head (the paper's FedAvg+ViT)."""

    def __init__(self, config: FoundationConfig, num_classes: int, head: str = "linear") -> None:
        super().__init__(foundation(config))
        self.head = make_head(head, self.foundation.width, num_classes)

    @override
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Classification:
        features = self.frozen_prefix(images) if prefix is None else prefix.float()
        return Classification(features, self.head(features))
