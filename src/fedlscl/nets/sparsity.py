"""Tensors that are mostly zero, and rows that are not sent: thresholds, choices and the form in which they travel."""

import numpy as np
import torch
from torch import Tensor


def hard_threshold(values: Tensor, threshold: float) -> Tensor:
    """Values with 0 in place of all whose size is ``threshold`` or less.

    Example:
        >>> hard_threshold(torch.tensor([-2.0, 1.0, 0.5]), 1.0)
        tensor([-2.,  0.,  0.])
    """
    return torch.where(values.abs() > threshold, values, 0)


def largest(values: Tensor, sparsity: float) -> Tensor:
    """Mask (n,) of the values (n,) of largest size; the fraction ``sparsity`` of them, rounded down, is left out.

    Example:
        >>> largest(torch.tensor([1.0, -3.0, 2.0]), 0.4)
        tensor([False,  True,  True])
    """
    kept = values.abs().argsort(descending=True, stable=True)[: len(values) - int(sparsity * len(values))]
    return torch.zeros(len(values), dtype=torch.bool, device=values.device).index_fill_(0, kept, True)


def pack(values: Tensor) -> tuple[Tensor, Tensor]:
    """The values that are not zero, and a bit for each value, eight to a byte.

    Example:
        >>> pack(torch.tensor([[0.0, 5.0], [0.0, 7.0]]))
        (tensor([5., 7.]), tensor([80], dtype=torch.uint8))
    """
    values = values.detach().cpu()
    return values[values != 0], torch.from_numpy(np.packbits((values != 0).numpy()))


def num_ones(bits: Tensor, size: int) -> int:
    """How many values the first ``size`` bits of ``pack`` stand for.

    Example:
        >>> num_ones(torch.tensor([80], dtype=torch.uint8), 4)
        2
    """
    return int(np.unpackbits(bits.numpy(), count=size).sum())


def unpack(values: Tensor, bits: Tensor, shape: torch.Size) -> Tensor:
    """The tensor of a shape that ``pack`` described.

    Example:
        >>> unpack(torch.tensor([5.0, 7.0]), torch.tensor([80], dtype=torch.uint8), torch.Size([2, 2]))
        tensor([[0., 5.],
                [0., 7.]])
    """
    where = torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).astype(bool))
    return torch.zeros(shape.numel(), dtype=values.dtype).masked_scatter_(where, values).view(shape)
