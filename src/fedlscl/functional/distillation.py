"""One-by-One Distillation (Eq. 5) in closed form.

The generator is linear, so with e = [E; 1], C_j = mean of e e^T over FS_j and weights w_j, Eq. 5 has one solution:

    Phi_bar_i = (S_i + lambda I)^-1 (G_i + lambda Phi_i),   S_i = sum_{j != i} w_j C_j,   G_i = sum w_j C_j Phi_j.

A client enters only through C_j and C_j Phi_j: no server optimizer, no raw features, and sums over clients suffice.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 2**25
"""Of all clients' products at once: columns are independent, and in blocks Eq. 5 takes three quarters of the time."""


class Sums(NamedTuple):
    """What the server has to know: sums over clients, in float64."""

    moments: Tensor
    """S = sum w_j C_j, (p, p) with p = feature_dim + 1."""
    products: Tensor
    """G = sum w_j C_j Phi_j, (p, lora_dim)."""


def second_moment(features: Tensor) -> Tensor:
    """C = mean of e e^T with e = [E; 1], over a feature set (n, feature_dim): (p, p), float64.

    Example:
        >>> second_moment(torch.tensor([[2.0]]))
        tensor([[4., 2.],
                [2., 1.]], dtype=torch.float64)
    """
    if not len(features):
        raise ValueError("the feature set is empty: a client without buffered samples has nothing to distil.")
    e = torch.cat([features.double(), features.new_ones(len(features), 1, dtype=torch.float64)], 1)
    return e.mT @ e / len(features)


def upper_triangle(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (p, p), row by row: (p (p + 1) / 2,)."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def symmetric(upper: Tensor, size: int) -> Tensor:
    """The symmetric matrix (size, size) whose upper triangle is given row by row.

    Example:
        >>> symmetric(torch.tensor([1, 2, 3]), 2)
        tensor([[1, 2],
                [2, 3]])
    """
    matrix = upper.new_zeros(size, size)
    rows, columns = torch.triu_indices(size, size)
    matrix[rows, columns] = upper
    matrix[columns, rows] = upper
    return matrix


def one_by_one_distill(
    generators: Sequence[Tensor],
    moments: Sequence[Tensor],
    lambda_proximal: float,
    weights: Sequence[float] | None = None,
    data_anchor: float = 0.0,
) -> list[Tensor]:
    """Answer every client with its own fused generator (Eq. 5), in the order of the clients.

    Args:
        generators: Phi_i of each client, (p, lora_dim), bias as last row.
        moments: C_i of each client, (p, p).
        lambda_proximal: weight of ``||Phi - Phi_i||^2`` relative to the mean eigenvalue of S_i (ours: scale-free).
        weights: w_j of each client; one each where not given.
        data_anchor: weight of staying where Phi_i is on the client's own features (ours; not in the paper).

    Example:
        >>> phi = torch.ones(2, 3)
        >>> one_by_one_distill([phi], [torch.eye(2)], 1.0)[0].equal(phi)   # alone, a client keeps its own
        True
    """
    if len(generators) == 1:
        return [generators[0].clone()]
    weights = [1.0] * len(generators) if weights is None else weights
    scaled = [weight * moment.double() for weight, moment in zip(weights, moments, strict=True)]
    anchors = [data_anchor * moment.double() if data_anchor else None for moment in moments]
    total = in_order(scaled)
    systems = [system_of(total - own, lambda_proximal, anchor) for own, anchor in zip(scaled, anchors, strict=True)]
    answers = [generator.clone() for generator in generators]
    rows, columns = generators[0].shape
    width = max(64, BLOCK_BYTES // (8 * rows * len(generators)))
    for start in range(0, columns, width):
        part = slice(start, start + width)
        phis = [generator[:, part].double() for generator in generators]
        products = [moment @ phi for moment, phi in zip(scaled, phis, strict=True)]
        summed = in_order(products)
        for answer, system, phi, own in zip(answers, systems, phis, products, strict=True):
            if system is not None:
                answer[:, part] = system.answer(phi, summed - own)
    return answers


def client_terms(generator: Tensor, moment: Tensor, weight: float = 1.0) -> Sums:
    """One client's share of the sums: w C and w C Phi."""
    scaled = weight * moment.double()
    return Sums(scaled, scaled @ generator.double())


def add_terms(terms: Sequence[Sums]) -> Sums:
    """The sums over clients."""
    return Sums(in_order([term.moments for term in terms]), in_order([term.products for term in terms]))


def in_order(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum in the given order, so that results do not depend on who answered first."""
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total += tensor
    return total


def subtract_terms(total: Sums, own: Sums) -> Sums:
    """The sums over all other clients (j != i in Eq. 5)."""
    return Sums(total.moments - own.moments, total.products - own.products)


def solve(
    generator: Tensor, others: Sums, lambda_proximal: float, data_anchor: float = 0.0, own_moment: Tensor | None = None
) -> Tensor:
    """Minimise Eq. 5 for one client from the sums over the others; (p, lora_dim) in the generator's dtype.

    Where nobody else has a feature set, or sums are none of second moments so that there is no minimum, the generator
    stays as it is.
    """
    anchor = data_anchor * own_moment.double() if data_anchor and own_moment is not None else None
    system = system_of(others.moments, lambda_proximal, anchor)
    if system is None:
        return generator.clone()
    return system.answer(generator.double(), others.products).to(generator.dtype)


class System(NamedTuple):
    """What Eq. 5 is for one client: everything but the others' products, which may come column by column."""

    inverse: Tensor
    """(S + lambda I)^-1, (p, p): one product with it takes half the time of two triangular solves."""
    scale: float
    """lambda itself: the relative weight times the mean eigenvalue of S."""
    anchor: Tensor | None
    """The client's own moment by its weight, (p, p); none in the paper."""

    def answer(self, phi: Tensor, products: Tensor) -> Tensor:
        """Columns of the minimum from the same columns of Phi_i and of G_i, float64."""
        right = products.add(phi, alpha=self.scale)
        if self.anchor is not None:
            right.addmm_(self.anchor, phi)
        return self.inverse @ right


def system_of(moments: Tensor, lambda_proximal: float, anchor: Tensor | None = None) -> System | None:
    """Eq. 5 for a client from the others' summed moments S, (p, p); none where it has no unique minimum."""
    if not lambda_proximal > 0:
        raise ValueError(f"lambda_proximal {lambda_proximal} leaves Eq. 5 without a unique solution: choose above 0.")
    if not moments.any():
        return None
    scale = float(lambda_proximal * moments.diagonal().mean())
    matrix = moments + scale * torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    if anchor is not None:
        matrix += anchor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if failed else System(torch.cholesky_inverse(factor), scale, anchor)
