"""Closed-form classifiers from sums over samples, and validity checks for uploaded sums and second moments."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.functional.privacy import MOMENT_BOUND

# Linear classifiers in closed form, from sums that any number of clients and tasks can add up.

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


# Whether statistics can be what they claim to be: a lie of the right form and of a usual size may break the solver.

TOLERANCE = 1e-6
"""Of the trace: what rounding to float32 may move an eigenvalue."""


def is_semidefinite(matrix: Tensor) -> bool:
    """Whether a matrix (d, d) is a sum of outer products x x^T, up to rounding.

    Example:
        >>> is_semidefinite(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        True
        >>> is_semidefinite(torch.tensor([[1.0, 1.1], [1.1, 1.0]]))
        False
    """
    double = matrix.double()
    allowed = float(TOLERANCE * double.diagonal().sum())
    if not double.any():
        return True
    if not 0 < allowed < float("inf") or float((double - double.mT).abs().max()) > allowed:
        return False
    lifted = double + allowed * torch.eye(len(double), dtype=torch.float64)
    return int(torch.linalg.cholesky_ex(lifted).info) == 0


def is_gram(gram: Tensor) -> bool:
    """Whether a matrix or a diagonal can be a Gram: symmetric and without negative eigenvalues, up to rounding."""
    return bool((gram >= 0).all()) if gram.dim() == 1 else is_semidefinite(gram)


def moment_error(moment: Tensor, noisy: bool = False) -> str:
    """What shows that a matrix (p, p) is no second moment of unit features; nothing if nothing does.

    With noise it may have any size.

    Example:
        >>> moment_error(torch.eye(3) / 2)
        ''
        >>> moment_error(torch.eye(3))
        'moments are larger than those of unit features'
    """
    # In bf16 a unit norm is one up to 2^-8.
    if moment.trace() > 1.02 * MOMENT_BOUND and not noisy:
        return "moments are larger than those of unit features"
    return "" if is_semidefinite(moment) else "moments are no second moment: not positive semidefinite"


def sums_error(sums: MomentSums, counts: Tensor) -> str:
    """What shows that sums are not of as many samples of each class as counted (num_classes,); nothing if nothing does.

    Unit features bound every sum: the Gram's trace by twice the number of samples, products by sqrt(2) times it.

    Example:
        >>> from fedlscl.functional.analytic import moment_sums
        >>> sums = moment_sums(torch.ones(3, 2), torch.tensor([0, 1, 1]), 2)
        >>> sums_error(sums, torch.tensor([1, 2]))
        ''
        >>> sums_error(sums, torch.tensor([2, 1]))
        'products count other samples than were announced'
    """
    if not sums.products[-1].equal(counts.to(sums.products.dtype)):
        return "products count other samples than were announced"
    slack = 1 + 1e-6
    if (sums.products.norm(dim=0) > slack * 2**0.5 * counts).any():
        return "products are larger than those of unit features"
    if sums.gram.trace() > slack * 2 * counts.sum():
        return "gram is larger than that of unit features"
    return "" if is_semidefinite(sums.gram) else "gram is no Gram matrix: not symmetric and positive semidefinite"
