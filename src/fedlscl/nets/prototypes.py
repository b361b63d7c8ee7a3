"""A classifier by distance to one prototype per class."""

import torch
from torch import Tensor, nn


class PrototypeHead(nn.Module):
    """Logits (B, num_classes) = -distance / temperature, where d_c(x) = sqrt(||f(x) - mu_c||^2 / width).

    Prototypes start as 0.1 N(0, 1).
    """

    def __init__(self, width: int, num_classes: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(0.1 * torch.randn(num_classes, width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) to (B, num_classes)."""
        return -prototype_distances(features, self.weight) / self.temperature


def prototype_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Root mean squared differences (B, num_classes) of features (B, width) and prototypes, in float32 at least.

    Example:
        >>> prototype_distances(torch.zeros(1, 4), torch.ones(2, 4) * torch.tensor([[1.0], [2.0]]))
        tensor([[1., 2.]])
    """
    with torch.autocast(features.device.type, enabled=False):
        x, y = features.to(prototypes.dtype), prototypes
        squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT
        # The root has an infinite slope at zero, and rounding can bring the sum below it.
        return (squared / x.shape[1]).clamp(min=1e-12).sqrt()
