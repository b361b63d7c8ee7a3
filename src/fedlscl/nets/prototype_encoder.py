"""The tiny fixed net whose gradients GLFC's clients send and its proxy server inverts (arXiv 2203.11473, Sec. 3.4)."""

import torch
from torch import Tensor, nn

SEED = 0
"""Of the weights, which clients and proxy have in common."""


class PrototypeEncoder(nn.Module):
    """LeNet with sigmoids, random and never trained: images (n, 3, size, size) in 0..1 to logits (n, num_classes)."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        if size % 4 or size < 4:
            raise ValueError(f"prototype_size {size} cannot be halved twice: choose a multiple of 4.")
        self.num_classes, self.size, self.width = num_classes, size, 12 * (size // 4) ** 2
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 12, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2),
            nn.Sigmoid(),
        )
        self.classifier = nn.Linear(self.width, num_classes)
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.5, 0.5, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in 0..1, which are not normalised."""
        return self.classifier(self.convolutions(images).flatten(1))
