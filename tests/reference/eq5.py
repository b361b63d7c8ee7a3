"""Eq. 5 as it is written: a sum over teachers and their samples, and its minimisation by LBFGS."""

import torch


def apply(phi, features):
    """phi(x) = Phi^T [x; 1] for one x (feature_dim,)."""
    return phi.T @ torch.cat([features, features.new_ones(1)])


def eq5(phi, student, generators, feature_sets, lambda_absolute, weights=None):
    """sum_{j != i} w_j mean_{x in FS_j} ||phi(x) - phi_j(x)||^2 + lambda ||phi - phi_i||^2 for i = ``student``."""
    value = lambda_absolute * ((phi - generators[student]) ** 2).sum()
    for j, (teacher, feature_set) in enumerate(zip(generators, feature_sets, strict=True)):
        weight = 0.0 if j == student else 1.0 if weights is None else weights[j]
        for x in feature_set:
            value = value + weight * ((apply(phi, x) - apply(teacher, x)) ** 2).sum() / len(feature_set)
    return value


def gradient(phi, *arguments, **options):
    """d Eq. 5 / d Phi."""
    phi = phi.clone().requires_grad_(True)
    return torch.autograd.grad(eq5(phi, *arguments, **options), phi)[0]


def minimise(student, generators, *arguments, **options):
    """The minimiser of Eq. 5 by LBFGS from the student's own generator."""
    phi = generators[student].clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [phi], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = eq5(phi, student, generators, *arguments, **options)
        value.backward()
        return value

    optimizer.step(closure)
    return phi.detach()


def truncated(moment, rank):
    """The sum of a moment's ``rank`` largest eigenvalues times the outer products of their eigenvectors."""
    values, vectors = torch.linalg.eigh(moment)
    order = values.argsort(descending=True)[:rank]
    return sum(values[k] * torch.outer(vectors[:, k], vectors[:, k]) for k in order.tolist())


def low_rank_solution(student, generators, moments, lambda_absolute, rank, answer_rank):
    """Eq. 5 of truncated moments as a dense system, moved along the leading eigenvectors of their sum only."""
    own, others = generators[student], [j for j in range(len(generators)) if j != student]
    kept = {j: truncated(moments[j], rank) for j in others}
    total = sum(kept.values())
    right = sum(kept[j] @ generators[j] for j in others) + lambda_absolute * own
    solution = torch.linalg.solve(total + lambda_absolute * torch.eye(len(own), dtype=own.dtype), right)
    values, vectors = torch.linalg.eigh(total)
    leading = vectors[:, values.argsort(descending=True)[:answer_rank]]
    return own + leading @ leading.mT @ (solution - own)
