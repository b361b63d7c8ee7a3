"""The closed-form family: a fixed map of a feature, sums over samples, and a linear solve.

FedRidge, FedNCM, FrozenLDA, AFCL, STSA, STSA-E, FedRAN and all readouts are combinations of these functions: random
features, sums, their packed form, low-rank and group summaries, solutions, validity checks.
"""

from functools import lru_cache
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


@lru_cache(maxsize=4)
def _projection(inputs: int, width: int, seed: int) -> Tensor:
    # On the CPU, so that all clients agree.
    return torch.randn(inputs, width, generator=torch.Generator().manual_seed(seed)) * inputs**-0.5


def random_features(features: Tensor, width: int, seed: int = 0) -> Tensor:
    """Random features relu(f W) of RanPAC (arXiv 2307.02251), (B, width), in float32 and of unit norm (ours).

    Entries of W are from N(0, 1 / inputs) for features (B, inputs). All clients must have one public ``seed``, or their
    sums do not add up to anything. A ``width`` of 0 returns the features as they are.

    Example:
        >>> random_features(torch.ones(2, 3), 4).norm(dim=1)
        tensor([1., 1.])
    """
    if not width:
        return features
    weight = _projection(features.shape[1], width, seed).to(features.device)
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(F.relu(features.float() @ weight))


class MomentSums(NamedTuple):
    """Sums over samples, in float64; those of disjoint samples add up."""

    gram: Tensor
    """sum x x^T over x = [unit feature; 1], (width + 1, width + 1)."""
    products: Tensor
    """sum x onehot(y)^T, (width + 1, num_classes); its last row counts the samples of each class."""


def moment_sums(features: Tensor, labels: Tensor, num_classes: int, unit: bool = True, bias: bool = True) -> MomentSums:
    """Sums over a batch of features (B, width) with labels (B,).

    Without ``unit`` features keep their norm; without ``bias`` x has no constant, and the sums one row and column less.

    Example:
        >>> moment_sums(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), 2).products.tolist()
        [[0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    x = F.normalize(features.double()) if unit else features.double()
    x = F.pad(x, (0, int(bias)), value=1.0)
    return MomentSums(x.mT @ x, x.mT @ F.one_hot(labels, num_classes).double())


def added(total: MomentSums | None, part: MomentSums) -> MomentSums:
    """Sums over the samples of both; ``total`` is None before the first part."""
    return part if total is None else MomentSums(total.gram + part.gram, total.products + part.products)


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (d, d), row by row: (d (d + 1) / 2,); a diagonal (d,) is unchanged."""
    return matrix if matrix.dim() == 1 else matrix[tuple(torch.triu_indices(*matrix.shape))]


def packed_size(size: int) -> int:
    """Length of a packed symmetric matrix (size, size)."""
    return size * (size + 1) // 2


def unpack_symmetric(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix (size, size), or the diagonal (size,), that ``pack_symmetric`` packed.

    Example:
        >>> unpack_symmetric(torch.tensor([1, 2, 3]), 2).tolist()
        [[1, 2], [2, 3]]
    """
    if len(packed) == size > 1:
        return packed
    matrix = packed.new_zeros(size, size)
    rows, columns = torch.triu_indices(size, size)
    matrix[rows, columns] = matrix[columns, rows] = packed
    return matrix


def pack_sums(sums: MomentSums, counts: Tensor) -> MomentSums:
    """The message form of sums over samples with these ``counts`` by class (num_classes,), in float32.

    It has the packed scatter within classes, G - sum_c P_c P_c^T / n_c, since rounding G itself may be larger than the
    differences of similar features, and the products of classes with samples.
    """
    products = sums.products[:, counts > 0]
    return MomentSums(pack_symmetric(sums.gram - _between(products, counts)).float(), products.float())


def unpack_sums(packed: MomentSums, counts: Tensor) -> MomentSums:
    """Sums over all classes, in float64, from their message form."""
    products = packed.products.new_zeros(len(packed.products), len(counts), dtype=torch.float64)
    products[:, counts > 0] = packed.products.double()
    within = unpack_symmetric(packed.gram.double(), len(products))
    return MomentSums(within + _between(packed.products, counts), products)


def _between(products: Tensor, counts: Tensor) -> Tensor:
    """Sum of P_c P_c^T / n_c over the classes with samples, (size, size) in float64."""
    return (products.double() / counts[counts > 0]) @ products.double().mT


def low_rank(factor: Tensor, rank: int) -> Tensor:
    """The best F (width, at most ``rank``) with F F^T near the product of ``factor`` (width, n) with itself.

    Its columns are orthogonal, each an eigenvector times the root of its eigenvalue (FedRAN, arXiv 2606.11480). The
    difference is positive semidefinite, and its norm the first dropped eigenvalue.
    """
    q, r = torch.linalg.qr(factor.double())
    u, values, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ u[:, :rank] * values[:rank]


def gram_of_groups(sums: Tensor, counts: Tensor, labels: Tensor) -> Tensor:
    """An unbiased estimate of a Gram matrix (width, width) from sums over groups of samples (STSA-E, arXiv 2506.01327).

    ``sums`` (groups, width) are over ``counts`` (groups,) samples of classes ``labels`` (groups,). For a class with N
    samples in k groups: r sum_g s_g s_g^T / n_g - (r - 1) / N P P^T with P = sum_g s_g and r = (N - 1) / (k - 1). Its
    mean over all partitions into groups of these sizes is the Gram matrix. With one group only P P^T / N is known:
    r = 1. Empty groups do not count (ours: the released code counts them, which shrinks the covariance).
    """
    kept = counts > 0
    sums, counts, labels = sums[kept].double(), counts[kept].double(), labels[kept]
    member = F.one_hot(labels).double()  # (groups, classes)
    totals, sizes, groups = member.mT @ sums, member.mT @ counts, member.sum(0)
    ratio = torch.where(groups > 1, (sizes - 1) / (groups - 1), 1.0)
    between = (ratio - 1) / sizes.clamp(min=1)
    return (sums.mT * (ratio[labels] / counts)) @ sums - (totals.mT * between) @ totals


def ridge_solution(sums: MomentSums, ridge: float, relative: bool = True, bias: bool = True) -> tuple[Tensor, Tensor]:
    """Weight (num_classes, width) and bias (num_classes,) of the regression on one-hot labels, float32.

    ``ridge`` is relative to the mean eigenvalue of the Gram matrix, or absolute. Sums without a constant give no bias.
    """
    system = _lifted(sums.gram, ridge * sums.gram.diagonal().mean() if relative else ridge)
    solution = torch.cholesky_solve(sums.products, torch.linalg.cholesky(system)).float()
    if not bias:
        return solution.mT.contiguous(), torch.zeros(solution.shape[1])
    return solution[:-1].mT.contiguous(), solution[-1].contiguous()


def _lifted(matrix: Tensor, amount: float | Tensor) -> Tensor:
    return matrix + amount * torch.eye(len(matrix), dtype=matrix.dtype)


def low_rank_ridge(factor: Tensor, products: Tensor, ridge: float) -> Tensor:
    """(F F^T + ridge I)^-1 products, (width, num_classes), for F (width, rank) with orthogonal columns.

    No width x width matrix is formed: it is (products - F diag(1 / (s + ridge)) F^T products) / ridge with the
    eigenvalues s of F F^T, the squared norms of the columns.
    """
    damped = (factor.mT @ products) / (factor.square().sum(0) + ridge)[:, None]
    return (products - factor @ damped) / ridge


def ncm_solution(sums: MomentSums) -> tuple[Tensor, Tensor]:
    """Weight and bias of the nearest class mean by cosine: unit directions of the classes' mean unit features."""
    weight = F.normalize(sums.products[:-1].mT)
    return weight.float().contiguous(), torch.where(sums.products[-1] > 0, 0.0, ABSENT)


def discriminant_solution(sums: MomentSums, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of linear discriminant analysis with equal priors, of the shapes of ``ridge_solution``.

    score_c = mu_c^T A^-1 x - mu_c^T A^-1 mu_c / 2 with class means mu_c and the covariance S within classes, shrunk to
    A = (1 - shrinkage) S + shrinkage tr(S) / width I. With shrinkage 1 it is the nearest class mean.
    """
    counts = sums.products[-1]
    means = sums.products[:-1] / counts.clamp(min=1)  # (width, num_classes)
    within = (sums.gram[:-1, :-1] - (means * counts) @ means.mT) / counts.sum().clamp(min=1)
    scale = within.diagonal().mean().clamp(min=torch.finfo(within.dtype).eps)
    system = _lifted((1 - shrinkage) * within, shrinkage * scale)
    weight = torch.cholesky_solve(means, torch.linalg.cholesky(system))
    bias = torch.where(counts > 0, -(means * weight).sum(0) / 2, ABSENT)
    return weight.mT.float().contiguous(), bias.float()


def is_semidefinite(matrix: Tensor) -> bool:
    """Whether a matrix (d, d), or a diagonal (d,) alone, is a sum of outer products x x^T, up to rounding.

    Example:
        >>> is_semidefinite(torch.tensor([[1.0, 1.0], [1.0, 1.0]])), is_semidefinite(torch.tensor([[1.0, 2], [2, 1]]))
        (True, False)
    """
    if matrix.dim() == 1:
        return bool((matrix >= 0).all())
    double = matrix.double()
    allowed = float(TOLERANCE * double.trace())
    if not double.any():
        return True
    if not 0 < allowed < float("inf") or float((double - double.mT).abs().max()) > allowed:
        return False
    return int(torch.linalg.cholesky_ex(_lifted(double, allowed)).info) == 0


def moment_error(moment: Tensor, unbounded: bool = False) -> str:
    """Why a matrix (p, p) cannot be a second moment of unit features, or ''; ``unbounded``: of any size.

    Example:
        >>> moment_error(torch.eye(3) / 2), moment_error(torch.eye(3))
        ('', 'moments are larger than those of unit features')
    """
    # In bf16 a unit norm is one up to 2^-8.
    if moment.trace() > 1.02 * MOMENT_BOUND and not unbounded:
        return "moments are larger than those of unit features"
    return "" if is_semidefinite(moment) else "moments are not positive semidefinite"


def sums_error(sums: MomentSums, counts: Tensor, unit: bool = True, bias: bool = True) -> str:
    """Why sums cannot be of as many samples of each class as counted (num_classes,), or ''.

    Unit features bound the Gram's trace by the number of samples (twice it with ``bias``), and products by the number
    of samples of the class (sqrt(2) times it).

    Example:
        >>> sums_error(moment_sums(torch.ones(3, 2), torch.tensor([0, 1, 1]), 2), torch.tensor([2, 1]))
        'products count other samples than were announced'
    """
    if bias and not sums.products[-1].equal(counts.to(sums.products.dtype)):
        return "products count other samples than were announced"
    size, slack = 1 + bias, 1 + 1e-6
    if unit and (sums.products.norm(dim=0) > slack * size**0.5 * counts).any():
        return "products are larger than those of unit features"
    if unit and sums.gram.trace() > slack * size * counts.sum():
        return "gram is larger than that of unit features"
    within = _lifted(sums.gram - _between(sums.products[:, counts > 0], counts), TOLERANCE * sums.gram.trace())
    return "" if is_semidefinite(within) else "gram is not symmetric, or smaller than that of the class means"
