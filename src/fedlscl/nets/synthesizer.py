"""Image synthesizers that learn from a classifier alone, without data (TARGET, arXiv 2303.06937; MFCL, 2311.07784)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl.nets.net import Frozen, Net
from fedlscl.nets.small import MEAN, STD


class Synthesizer(nn.Module):
    """Noise (B, noise_dim) to images (B, 3, size, size) in 0..1: a linear layer, then doublings with a convolution.

    ``channels`` are those of the feature maps from the smallest, of size / 2^(len - 1) pixels, to the largest. Three
    of them give the nets of both papers for small images; at 224 pixels TARGET's first layer would have 103 M
    weights, and MFCL takes (64,) * 6.
    """

    def __init__(
        self, noise_dim: int, channels: Sequence[int], size: int, standardise: bool = False,
        mean: Sequence[float] = MEAN, std: Sequence[float] = STD,
    ) -> None:  # fmt: skip
        """``standardise`` ends in tanh and a BatchNorm without weights (MFCL), else a sigmoid does (TARGET).

        Standardised images are turned into pixels with the classifier's ``mean`` and ``std``.
        """
        super().__init__()
        self.start = start_size(channels, size)
        self.noise_dim, self.width = noise_dim, channels[0]
        self.project = nn.Linear(noise_dim, channels[0] * self.start**2)
        layers: list[nn.Module] = [nn.BatchNorm2d(channels[0])]
        for before, after in pairwise(channels):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1)]
            layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(channels[-1], 3, 3, padding=1))
        layers += [nn.Tanh(), nn.BatchNorm2d(3, affine=False), Shown(mean, std)] if standardise else [nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)

    def forward(self, noise: Tensor) -> Tensor:
        """(B, noise_dim) to (B, 3, size, size)."""
        return self.layers(self.project(noise).view(-1, self.width, self.start, self.start))


class Shown(nn.Module):
    """Standardised images as pixels in 0..1: the classifier's own normalisation gives back what came in."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) to the same shape."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


class Statistics(NamedTuple):
    """Of a batch at the entrance of one BatchNorm layer, and what the layer remembers; (channels,) each."""

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


class Dream(NamedTuple):
    """Images out of noise and what the teacher makes of them."""

    images: Tensor
    """(B, 3, size, size) in 0..1."""
    shown: Tensor
    """What the teacher saw of them."""
    logits: Tensor
    """(B, num_classes)."""
    statistics: list[Statistics]
    """By BatchNorm layer."""

    @property
    def trained(self) -> Tensor:
        """The teacher's head is the only one."""
        return self.logits


class Dreamer(Net):
    """A synthesizer and the frozen classifier that judges its images; noise takes the place of stored images.

    With ``batch_size`` the noise is learned, too: as a shift, which starts at zero.
    """

    def __init__(self, synthesizer: Synthesizer, teacher: Net, batch_size: int = 0, padding: int | None = None) -> None:
        """Where ``padding`` is given, the teacher sees images at random shifts of so many pixels, or mirrored."""
        super().__init__()
        self.synthesizer, self.teacher, self.padding = synthesizer, Frozen(teacher), padding
        self.shift = nn.Parameter(torch.zeros(batch_size or 1, synthesizer.noise_dim), requires_grad=batch_size > 0)

    @property
    def head(self) -> nn.Module:
        """The teacher's."""
        return self.teacher.net.head

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Dream:
        """Noise (B, noise_dim) to images, logits and statistics, with gradient to noise and synthesizer."""
        made = self.synthesizer(images + self.shift)
        shown = made if self.padding is None else jitter(made, self.padding)
        with norm_statistics(self.teacher) as statistics:
            logits = self.teacher.net(shown).trained
        return Dream(made, shown, logits, statistics)


@contextmanager
def norm_statistics(net: nn.Module) -> Iterator[list[Statistics]]:
    """Fills a list with what enters each BatchNorm layer while the net runs."""
    found: list[Statistics] = []

    def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        found.append(Statistics(mean, variance, layer.running_mean, layer.running_var))

    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def jitter(images: Tensor, padding: int) -> Tensor:
    """Every image (B, 3, s, s) shifted by up to ``padding`` pixels with black moving in, and mirrored half the time."""
    count, size, device = len(images), images.shape[-1], images.device
    steps = torch.arange(size, device=device)
    rows, columns = (torch.randint(2 * padding + 1, (count, 1), device=device) + steps for _ in range(2))
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    taken = padded.gather(2, rows[:, None, :, None].expand(-1, 3, -1, padded.shape[3]))
    return taken.gather(3, columns[:, None, None, :].expand(-1, 3, size, -1))


def start_size(channels: Sequence[int], size: int) -> int:
    """Pixels of the smallest feature map."""
    factor = 2 ** (len(channels) - 1)
    if not channels or size % factor or size < factor:
        raise ValueError(
            f"synthesis_size {size} is no multiple of {factor}, which synthesis_channels {list(channels)} doubles up "
            "to: change one of them."
        )
    return size // factor
