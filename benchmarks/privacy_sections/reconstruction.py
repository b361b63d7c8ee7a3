"""Decoders from features to images, trained on the attacker's pairs, and how close they come."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

RIDGES = tuple(10.0**power for power in range(-6, 2))
Decoder = Callable[[Tensor], Tensor]
"""(n, feature_dim) to (n, 3, height, width) in 0..1."""


class Scale(NamedTuple):
    """Centre and spread of the attacker's features."""

    mean: Tensor
    deviation: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features of mean 0 and deviation 1 in every dimension."""
        return (features - self.mean) / self.deviation


def aligned(received: Tensor, own: Tensor) -> Tensor:
    """Received features (n, d), brought to mean and deviation of the attacker's own in every dimension."""
    target = scale_of(own)
    return scale_of(received)(received) * target.deviation + target.mean


def scale_of(features: Tensor) -> Scale:
    """The scale of (n, feature_dim)."""
    return Scale(features.mean(0), features.std(0).clamp(min=1e-6))


def ridge_decoder(features: Tensor, images: Tensor) -> Decoder:
    """Linear regression of pixels (n, 3, height, width) in 0..1; its strength is chosen on an eighth of the pairs."""
    scale, held_out = scale_of(features), max(1, len(features) // 8)
    x, y = scale(features), images.flatten(1)
    tried = ridge_weights(x[held_out:], y[held_out:] - y[held_out:].mean(0), RIDGES)
    errors = [F.mse_loss(x[:held_out] @ weight + y[held_out:].mean(0), y[:held_out]).item() for weight in tried]
    (weight,) = ridge_weights(x, y - y.mean(0), [RIDGES[errors.index(min(errors))]])
    return lambda e: (scale(e) @ weight + y.mean(0)).clamp(0, 1).unflatten(1, images.shape[1:])


def ridge_weights(x: Tensor, y: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """Minimisers of ``||x w - y||^2 / n + ridge ||w||^2`` over w (p, q), one for each ridge.

    Example:
        >>> ridge_weights(torch.eye(2), torch.eye(2), [0.5])[0]
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    values, vectors = torch.linalg.eigh((x.mT @ x / len(x)).double())
    turned = vectors.mT.float() @ (x.mT @ y / len(x))
    return [vectors.float() @ (turned / (values.float().clamp(min=0) + ridge)[:, None]) for ridge in ridges]


class ConvDecoder(nn.Module):
    """A linear layer to an eighth of the size, and three times twice the size."""

    def __init__(self, feature_dim: int, size: int, width: int = 64) -> None:
        super().__init__()
        self.start, self.width = size // 8, width
        self.spread = nn.Linear(feature_dim, width * self.start**2)
        steps: list[nn.Module] = []
        for _ in range(3):
            steps += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width // 2, 3, padding=1), nn.ReLU()]
            width //= 2
        self.paint = nn.Sequential(*steps, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """(n, feature_dim) to (n, 3, size, size) in 0..1."""
        x = self.spread(features).relu().unflatten(1, (self.width, self.start, self.start))
        return self.paint(x).sigmoid()


def conv_decoder(features: Tensor, images: Tensor, steps: int, seed: int = 0) -> Decoder:
    """A `ConvDecoder` that minimises the squared error, as it was when it did best on an eighth of the pairs."""
    torch.manual_seed(seed)
    scale, held_out = scale_of(features), max(1, len(features) // 8)
    x = scale(features)
    net = ConvDecoder(x.shape[1], images.shape[-1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    best, kept = float("inf"), net.state_dict()
    for step in range(steps):
        chosen = torch.randint(held_out, len(x), (64,))
        optimizer.zero_grad()
        F.mse_loss(net(x[chosen]), images[chosen]).backward()
        optimizer.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            with torch.no_grad():
                error = F.mse_loss(net(x[:held_out]), images[:held_out]).item()
            if error < best:
                best, kept = error, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(kept)
    return torch.no_grad()(lambda e: net(scale(e)))


class Quality(NamedTuple):
    """Of reconstructions, (n,) each."""

    psnr: Tensor
    """Decibels; 1 is the largest value."""
    ssim: Tensor


def quality(found: Tensor, images: Tensor) -> Quality:
    """How close (n, 3, height, width) come to the images, values in 0..1."""
    psnr = peak_signal_noise_ratio(found, images, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(found, images, data_range=1.0, reduction="none")
    return Quality(psnr, ssim)
