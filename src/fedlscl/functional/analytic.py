"""Second moments of features, the linear classifiers that follow from them in closed form, and validity checks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = -1e4
"""Score of a class without samples."""
MOMENT_BOUND = 2.0
"""Largest trace, and norm, of a second moment C: the mean of e e^T over e = [E; 1] with E of unit norm."""
TOLERANCE = 1e-6
"""Share of the trace by which rounding to float32 may move an eigenvalue."""


class MomentSums(NamedTuple):
    """Sums over samples, in float64; those of disjoint samples add up."""

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


def added(total: MomentSums | None, part: MomentSums) -> MomentSums:
    """Sums over the samples of both; ``total`` is None before the first part."""
    return part if total is None else MomentSums(total.gram + part.gram, total.products + part.products)


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
    shrinkage 1 it is the nearest class mean. The number of samples of a class does not weigh.
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage must be in (0, 1], got {shrinkage}.")
    counts = sums.products[-1]
    means = sums.products[:-1] / counts.clamp(min=1)  # (width, num_classes)
    within = (sums.gram[:-1, :-1] - (means * counts) @ means.mT) / counts.sum().clamp(min=1)
    scale = within.diagonal().mean().clamp(min=torch.finfo(within.dtype).eps)
    system = (1 - shrinkage) * within + shrinkage * scale * torch.eye(len(within), dtype=within.dtype)
    weight = torch.cholesky_solve(means, torch.linalg.cholesky(system))
    bias = torch.where(counts > 0, -(means * weight).sum(0) / 2, ABSENT)
    return weight.mT.float().contiguous(), bias.float()


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (d, d), row by row: (d (d + 1) / 2,); a diagonal (d,) is unchanged."""
    return matrix if matrix.dim() == 1 else matrix[tuple(torch.triu_indices(*matrix.shape))]


def packed_size(size: int) -> int:
    """Length of a packed symmetric matrix (size, size)."""
    return size * (size + 1) // 2


def unpack_symmetric(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix (size, size), or the diagonal (size,), that ``pack_symmetric`` packed.

    Example:
        >>> unpack_symmetric(torch.tensor([1, 2, 3]), 2)
        tensor([[1, 2],
                [2, 3]])
    """
    if len(packed) == size:
        return packed
    matrix = packed.new_zeros(size, size)
    rows, columns = torch.triu_indices(size, size)
    matrix[rows, columns] = packed
    matrix[columns, rows] = packed
    return matrix


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


def moment_error(moment: Tensor, unbounded: bool = False) -> str:
    """Why a matrix (p, p) cannot be a second moment of unit features, or ''; ``unbounded``: of any size.

    Example:
        >>> moment_error(torch.eye(3) / 2)
        ''
        >>> moment_error(torch.eye(3))
        'moments are larger than those of unit features'
    """
    # In bf16 a unit norm is one up to 2^-8.
    if moment.trace() > 1.02 * MOMENT_BOUND and not unbounded:
        return "moments are larger than those of unit features"
    return "" if is_semidefinite(moment) else "moments are not positive semidefinite"


def sums_error(sums: MomentSums, counts: Tensor) -> str:
    """Why sums cannot be of as many samples of each class as counted (num_classes,), or ''.

    Unit features bound every sum: the Gram's trace by twice the number of samples, products by sqrt(2) times it.

    Example:
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
    return "" if is_semidefinite(sums.gram) else "gram is not symmetric and positive semidefinite"


def ncm_solution(sums):
    weight = F.normalize(sums.products[:-1].mT).float()
    return weight, torch.where(sums.products[-1] > 0, 0.0, ABSENT).float()


def pack_sums(sums, classes):
    return MomentSums(pack_symmetric(sums.gram).float(), sums.products[:, classes].float())


def unpack_sums(packed, classes, num_classes):
    size = packed.products.shape[0]
    products = torch.zeros(size, num_classes, dtype=torch.float64)
    products[:, classes] = packed.products.double()
    return MomentSums(unpack_symmetric(packed.gram.double(), size), products)


def random_features(features, width, seed=0):
    if not width:
        return features
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(features.shape[1], width, generator=g)
    return F.normalize(features.float().cpu()) @ w
