"""Whether statistics can be what they claim to be: a lie of the right form and of a usual size may break the solver."""

import torch
from torch import Tensor

from fedlscl.analytic import MomentSums
from fedlscl.noise import MOMENT_BOUND

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


def moment_flaw(moment: Tensor, noisy: bool = False) -> str:
    """What shows that a matrix (p, p) is no second moment of unit features; nothing if nothing does.

    With noise it may have any size.

    Example:
        >>> moment_flaw(torch.eye(3) / 2)
        ''
        >>> moment_flaw(torch.eye(3))
        'moments are larger than those of unit features'
    """
    # In bf16 a unit norm is one up to 2^-8.
    if moment.trace() > 1.02 * MOMENT_BOUND and not noisy:
        return "moments are larger than those of unit features"
    return "" if is_semidefinite(moment) else "moments are no second moment: not positive semidefinite"


def sums_flaw(sums: MomentSums, counts: Tensor) -> str:
    """What shows that sums are not of as many samples of each class as counted (num_classes,); nothing if nothing does.

    Unit features bound every sum: the Gram's trace by twice the number of samples, products by sqrt(2) times it.

    Example:
        >>> from fedlscl.analytic import moment_sums
        >>> sums = moment_sums(torch.ones(3, 2), torch.tensor([0, 1, 1]), 2)
        >>> sums_flaw(sums, torch.tensor([1, 2]))
        ''
        >>> sums_flaw(sums, torch.tensor([2, 1]))
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
