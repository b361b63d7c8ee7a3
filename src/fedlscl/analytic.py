"""Linear classifiers in closed form, from sums that any number of clients and tasks can add up."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = -1e4
"""Score of a class that nobody has met."""


class MomentSums(NamedTuple):
    """All that a solution depends on, in float64; sums over disjoint samples simply add."""

    gram: Tensor
    """sum x x^T over x = [unit feature; 1], (width + 1, width + 1)."""
    products: Tensor
    """sum x onehot(y)^T, (width + 1, num_classes); its last row counts the samples of each class."""


def moment_sums(features: Tensor, labels: Tensor, num_classes: int) -> MomentSums:
    """Sums over a batch of features (B, width) with labels (B,).

    Example:
        >>> moment_sums(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), 2).products
        tensor([[0., 0.],
                [0., 1.],
                [0., 1.]], dtype=torch.float64)
    """
    x = F.pad(F.normalize(features.double()), (0, 1), value=1.0)
    return MomentSums(x.mT @ x, x.mT @ F.one_hot(labels, num_classes).double())


def added(one: MomentSums, other: MomentSums) -> MomentSums:
    """Sums over the samples of both."""
    return MomentSums(one.gram + other.gram, one.products + other.products)


def ridge_solution(sums: MomentSums, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight (num_classes, width) and bias (num_classes,) of the regression on one-hot labels, float32.

    ``ridge`` is relative to the mean eigenvalue of the Gram matrix.
    """
    scale = ridge * sums.gram.diagonal().mean()
    system = sums.gram + scale * torch.eye(len(sums.gram), dtype=sums.gram.dtype)
    solution = torch.cholesky_solve(sums.products, torch.linalg.cholesky(system)).float()
    return solution[:-1].mT.contiguous(), solution[-1].contiguous()


def discriminant_solution(sums: MomentSums, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of linear discriminant analysis with equal priors, of the shapes of ``ridge_solution``.

    Class means mu_c, one covariance within classes, shrunk towards a multiple of the identity:
    score_c = mu_c^T A^-1 x - mu_c^T A^-1 mu_c / 2 with A = (1 - shrinkage) S + shrinkage tr(S) / width I. With
    shrinkage 1 it is the nearest class mean. A class counts by its mean alone, however many samples it has.
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage {shrinkage} leaves the covariance without an inverse: choose above 0, up to 1.")
    counts = sums.products[-1]
    means = sums.products[:-1] / counts.clamp(min=1)  # (width, num_classes)
    within = (sums.gram[:-1, :-1] - (means * counts) @ means.mT) / counts.sum().clamp(min=1)
    scale = within.diagonal().mean().clamp(min=torch.finfo(within.dtype).eps)
    system = (1 - shrinkage) * within + shrinkage * scale * torch.eye(len(within), dtype=within.dtype)
    weight = torch.cholesky_solve(means, torch.linalg.cholesky(system))
    bias = torch.where(counts > 0, -(means * weight).sum(0) / 2, ABSENT)
    return weight.mT.float().contiguous(), bias.float()
