"""Per-sample low-rank updates (LoRA; Hu et al., ICLR 2022, arXiv 2106.09685) of a frozen linear layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LowRank(NamedTuple):
    """The update ``scale * up @ down`` of one linear layer, one pair of factors for each sample of a batch."""

    down: Tensor
    """(B, rank, in_features)."""
    up: Tensor
    """(B, out_features, rank)."""
    scale: float
    """alpha / rank."""


class LowRankShape(NamedTuple):
    """Sizes of the factors of one linear layer in a generated vector: A (down-projection), then B (up-projection)."""

    in_features: int
    out_features: int
    rank: int

    @property
    def down_size(self) -> int:
        """Entries of A."""
        return self.rank * self.in_features

    @property
    def size(self) -> int:
        """Entries of both factors."""
        return self.down_size + self.rank * self.out_features


def split_lora(lora: Tensor, shapes: list[LowRankShape], scale: float) -> list[LowRank]:
    """Cut generated weights W (B, lora_dim) into the factors of each adapted layer.

    Example:
        >>> (update,) = split_lora(torch.arange(10.0).view(1, 10), [LowRankShape(2, 3, 2)], 1.0)
        >>> update.down.shape, update.up.shape
        (torch.Size([1, 2, 2]), torch.Size([1, 3, 2]))
    """
    updates, start = [], 0
    for shape in shapes:
        middle, end = start + shape.down_size, start + shape.size
        down = lora[:, start:middle].unflatten(1, (shape.rank, shape.in_features))
        up = lora[:, middle:end].unflatten(1, (shape.out_features, shape.rank))
        updates.append(LowRank(down, up, scale))
        start = end
    return updates


def low_rank_update(x: Tensor, update: LowRank) -> Tensor:
    """Change of a layer's output: ``scale * (x @ down^T) @ up^T``, (B, N, in) to (B, N, out).

    The product of the factors, (B, out, in), is never formed.
    """
    return torch.bmm(torch.bmm(x, update.down.mT) * update.scale, update.up.mT)


def low_rank_hook(update: LowRank) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that adds the update to a linear layer's output; the layer itself is unchanged."""

    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + low_rank_update(inputs[0], update)

    return hook
