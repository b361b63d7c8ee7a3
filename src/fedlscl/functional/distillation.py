"""One-by-One Distillation (Eq. 5) in closed form.

The generator is linear, so with e = [E; 1] and C_j = mean of e e^T over FS_j, Eq. 5 has one solution:

    Phi_bar_i = (S_i + lambda I)^-1 (G_i + lambda Phi_i),   S_i = sum_{j != i} C_j,   G_i = sum_{j != i} C_j Phi_j.

A client enters through C_j and C_j Phi_j alone: no server optimizer, no raw features, and sums over clients suffice.

Factor form (ours). With C_j near F_j F_j^T for F_j (p, r) and H_j = F_j^T Phi_j, a client sends r (p + lora_dim)
numbers instead of p lora_dim + p (p + 1) / 2. With the others' F = [F_1 ..] and H = [H_1; ..] joined, client i solves

    Phi_bar_i = Phi_i + F (F^T F + lambda I)^-1 (H - F^T Phi_i)

by itself in R = sum of ranks dimensions (push-through identity); no matrix (p, lora_dim) is sent. lambda stays that of
the exact moments, whose traces are sent. Let E_j = C_j - F_j F_j^T with largest eigenvalue e_j, the first one dropped.
Subtracting the two systems of equations gives (F F^T + lambda I) (Phi_hat - Phi_bar) = -sum_j E_j (Phi_j - Phi_bar), so

    ||Phi_hat_i - Phi_bar_i|| <= sum_{j != i} e_j ||Phi_j - Phi_bar_i|| / lambda.

The server's answer is F V and V^T H for r right singular vectors V of F with singular values s_1 >= s_2 >= ... . Along
left singular vector k > r Phi_i then does not move by s_k / (s_k^2 + lambda) times row k of V^T (H - F^T Phi_i): the
truncation adds at most min(s_{r+1} / lambda, 1 / (2 sqrt(lambda))) ||H - F^T Phi_i||.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 2**25
"""Size of all clients' products at once: columns are independent, and blocks of them take 3/4 of the time."""


def one_by_one_distill(generators: Sequence[Tensor], moments: Sequence[Tensor], lambda_proximal: float) -> list[Tensor]:
    """Every client's own fused generator (Eq. 5), in the order of the clients.

    Args:
        generators: Phi_i of each client, (p, lora_dim) with p = feature_dim + 1, bias as last row.
        moments: C_i of each client, (p, p); a factor on it is the client's weight as a teacher.
        lambda_proximal: weight of ``||Phi - Phi_i||^2`` relative to the mean eigenvalue of S_i (ours: scale-free).

    Example:
        >>> phi = torch.ones(2, 3)
        >>> one_by_one_distill([phi], [torch.eye(2)], 1.0)[0].equal(phi)   # without teachers nothing changes
        True
    """
    doubles = [moment.double() for moment in moments]
    total = reduce(torch.add, doubles)
    solvers = [_solver(total - own, lambda_proximal) for own in doubles]
    fused = [torch.empty_like(generator) for generator in generators]
    rows, columns = generators[0].shape
    width = max(64, BLOCK_BYTES // (8 * rows * len(generators)))
    for start in range(0, columns, width):
        block = slice(start, start + width)
        phis = [generator[:, block].double() for generator in generators]
        products = [moment @ phi for moment, phi in zip(doubles, phis, strict=True)]
        summed = reduce(torch.add, products)
        for target, solver, phi, own in zip(fused, solvers, phis, products, strict=True):
            target[:, block] = solver(phi, summed - own)
    return fused


def second_moment(features: Tensor) -> Tensor:
    """C = mean of e e^T with e = [E; 1], over a feature set (n, feature_dim): (p, p), float64.

    Example:
        >>> second_moment(torch.tensor([[2.0]])).tolist()
        [[4.0, 2.0], [2.0, 1.0]]
    """
    if not len(features):
        raise ValueError("the feature set must not be empty: a client without samples has nothing to distil.")
    e = F.pad(features.double(), (0, 1), value=1.0)
    return e.mT @ e / len(features)


class Sums(NamedTuple):
    """Sums over clients from which each client can solve Eq. 5 itself, float64."""

    moments: Tensor
    """S = sum C_j, (p, p)."""
    products: Tensor
    """G = sum C_j Phi_j, (p, lora_dim)."""


def client_terms(generator: Tensor, moment: Tensor) -> Sums:
    """One client's summands: C and C Phi."""
    return Sums(moment.double(), moment.double() @ generator.double())


def solve(generator: Tensor, others: Sums, lambda_proximal: float) -> Tensor:
    """Minimise Eq. 5 for one client from the sums over the others; (p, lora_dim) in the generator's dtype.

    The generator is returned unchanged if the others have no features, or if their sums do not define a minimum.
    """
    return _solver(others.moments, lambda_proximal)(generator.double(), others.products).to(generator.dtype)


def _solver(moments: Tensor, lambda_proximal: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Phi_bar from Phi and G, any columns of both: (S + lambda I)^-1 (G + lambda Phi)."""
    if not lambda_proximal > 0:
        raise ValueError(f"lambda_proximal must be > 0 for Eq. 5 to have one solution, got {lambda_proximal}.")
    scale = float(lambda_proximal * moments.diagonal().mean())
    matrix = moments + scale * torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return lambda phi, products: phi
    inverse = torch.cholesky_inverse(factor)  # takes half the time of two triangular solves
    return lambda phi, products: inverse @ products.add(phi, alpha=scale)


class Factors(NamedTuple):
    """A client, or several together, in Eq. 5: C near F F^T, and C Phi near F H."""

    factor: Tensor
    """F, (p, r), with orthogonal columns, largest first."""
    projected: Tensor
    """H = F^T Phi, (r, lora_dim)."""
    trace: Tensor
    """Exact trace of C, ()."""

    @classmethod
    def of(cls, generator: Tensor, moment: Tensor, rank: float) -> Self:
        """Of one client's Phi (p, lora_dim) and C (p, p), truncated; see ``kept_rank``."""
        values, vectors = torch.linalg.eigh(moment.double())
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        r = kept_rank(values, rank)
        factor = vectors[:, :r] * values[:r].sqrt()
        return cls(factor, factor.mT @ generator.double(), moment.double().trace())

    @classmethod
    def merged(cls, parts: Sequence[Self], rank: float) -> Self:
        """Of several clients together, truncated: F V and V^T H for the right singular vectors V of all F."""
        factor = torch.cat([part.factor.double() for part in parts], 1)
        projected = torch.cat([part.projected.double() for part in parts])
        trace = reduce(torch.add, [part.trace.double() for part in parts])
        q, small = torch.linalg.qr(factor)
        u, values, v = torch.linalg.svd(small, full_matrices=False)
        r = kept_rank(values.square(), rank)
        return cls(q @ u[:, :r] * values[:r], v[:r] @ projected, trace)

    def solve(self, generator: Tensor, lambda_proximal: float) -> Tensor:
        """Minimise Eq. 5 for a client with Phi (p, lora_dim), given the other clients; in the dtype of Phi."""
        phi, factor = generator.double(), self.factor.double()
        scale = float(lambda_proximal * self.trace) / len(phi)
        if not scale > 0:
            return generator.clone()
        inner = factor.mT @ factor + scale * torch.eye(factor.shape[1], dtype=torch.float64, device=factor.device)
        step = torch.linalg.solve(inner, self.projected.double() - factor.mT @ phi)
        return (phi + factor @ step).to(generator.dtype)


def kept_rank(values: Tensor, rank: float) -> int:
    """How many eigenvalues (n,), largest first, are kept: at most ``rank``, or a share of their sum if it is below 1.

    Example:
        >>> kept_rank(torch.tensor([6.0, 3.0, 1.0]), 2), kept_rank(torch.tensor([6.0, 3.0, 1.0]), 0.95)
        (2, 3)
    """
    if rank >= 1:
        return min(int(rank), len(values))
    reached = int(torch.searchsorted(values.cumsum(0), rank * values.sum()))
    return min(reached + 1, len(values))
