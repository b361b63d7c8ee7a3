"""Random augmentation of training images: a shifted crop and a flip."""

from typing import Literal

import torch
from torch import Tensor

Augment = Literal["none", "standard"]
SHIFT = 8
"""A crop moves by up to 1 / SHIFT of the side: 4 pixels of 32."""


def standard(images: Tensor, seed: int) -> Tensor:
    """Each image (B, 3, height, width) moved by up to an eighth of its side, edges repeated, and flipped half the time.

    Example:
        >>> images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
        >>> standard(images, 0).equal(standard(images, 0)), standard(images, 0).shape
        (True, torch.Size([2, 3, 8, 8]))
    """
    generator = torch.Generator().manual_seed(seed)
    size, (height, width) = len(images), images.shape[-2:]
    rows, columns = (_places(size, side, generator) for side in (height, width))
    flipped = torch.rand(size, generator=generator) < 0.5
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    which, channels = torch.arange(size).view(-1, 1, 1, 1), torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return images[which, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _places(size: int, side: int, generator: torch.Generator) -> Tensor:
    reach = side // SHIFT
    shifts = torch.randint(-reach, reach + 1, (size, 1), generator=generator)
    return (torch.arange(side) + shifts).clamp(0, side - 1)
