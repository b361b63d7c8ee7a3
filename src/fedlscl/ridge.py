"""Ridge regression from features to classes, from sums that any number of clients and tasks can add up."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RidgeSums(NamedTuple):
    """All that the solution depends on, in float64; sums over disjoint samples simply add."""

    gram: Tensor
    """sum x x^T over x = [unit feature; 1], (width + 1, width + 1)."""
    products: Tensor
    """sum x onehot(y)^T, (width + 1, num_classes)."""


def ridge_sums(features: Tensor, labels: Tensor, num_classes: int) -> RidgeSums:
    """Sums over a batch of features (B, width) with labels (B,).

    Example:
        >>> ridge_sums(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), 2).products
        tensor([[0., 0.],
                [0., 1.],
                [0., 1.]], dtype=torch.float64)
    """
    x = F.pad(F.normalize(features.double()), (0, 1), value=1.0)
    return RidgeSums(x.mT @ x, x.mT @ F.one_hot(labels, num_classes).double())


def ridge_solution(sums: RidgeSums, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight (num_classes, width) and bias (num_classes,) of the regression on one-hot labels, float32.

    ``ridge`` is relative to the mean eigenvalue of the Gram matrix.
    """
    scale = ridge * sums.gram.diagonal().mean()
    system = sums.gram + scale * torch.eye(len(sums.gram), dtype=sums.gram.dtype)
    solution = torch.cholesky_solve(sums.products, torch.linalg.cholesky(system)).float()
    return solution[:-1].mT.contiguous(), solution[-1].contiguous()
