"""Was an image in the client's set? Scores of candidates, higher for members, and the AUC of telling them apart."""

from collections.abc import Callable

import torch
from torch import Tensor

SHARES = (1e-5, 1e-4, 1e-3, 1e-2)
"""What is added to the diagonal of a moment before it is inverted, relative to its mean eigenvalue."""
CANDIDATES = 256
"""Of members and of others, at most."""
Score = Callable[[Tensor], Tensor]
"""(n, p) rows e = [E; 1] to (n,)."""
Scores = Callable[[Tensor, "Population"], dict[str, Score]]
"""Scores by name, from the rows of a set and the population."""


def with_one(features: Tensor) -> Tensor:
    """Rows e = [E; 1], (n, p), float64."""
    return torch.nn.functional.pad(features.double(), (0, 1), value=1.0)


def auc(members: Tensor, others: Tensor) -> float:
    """Probability that a member has a higher score than another, ties counting half.

    Example:
        >>> auc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0]))
        0.625
    """
    gap = members[:, None] - others[None]
    return ((gap > 0).double() + 0.5 * (gap == 0).double()).mean().item()


def inverse(moment: Tensor, share: float) -> Tensor:
    """(C + share tr(C) / p I)^-1, float64."""
    size = len(moment)
    eye = torch.eye(size, dtype=torch.float64)
    return torch.cholesky_inverse(torch.linalg.cholesky(moment.double() + share * moment.diagonal().mean() * eye))


class Population:
    """What the attacker's own rows e (m, p) say about everybody."""

    def __init__(self, rows: Tensor) -> None:
        self.moment = rows.mT @ rows / len(rows)
        self.mean = self.moment[:-1, -1]
        values, self.vectors = torch.linalg.eigh(self.moment)
        self.values = values.clamp(min=0)


def leverage(moment: Tensor, share: float) -> Score:
    """- e^T C^-1 e: of n members at most n in absolute value, of others without limit where they leave the span."""
    inverted = inverse(moment, share)
    return lambda rows: -((rows @ inverted) * rows).sum(1)


def likelihood(
    moment: Tensor, population: Population, share: float, n: int, noise: float = 0.0, expected: Tensor | None = None
) -> Score:
    """The log likelihood ratio of C with and without e among its n samples, up to constants.

    For Gaussian e with the population's moment P: in its eigenbasis the entries of C are nearly independent and
    Gaussian, with variance lambda_i lambda_j / n and that of the noise; e moves their mean by e e^T / n.

    Args:
        moment: C, (p, p).
        population: of the attacker.
        share: added to lambda, relative to its mean.
        n: samples.
        noise: standard deviation of what was added to every entry.
        expected: mean of C; the population's moment where not given.
    """
    spread = population.values + share * population.values.mean()
    weight = 1 / (torch.outer(spread, spread) / n + noise**2)
    gap = moment.double() - (population.moment if expected is None else expected)
    turned = population.vectors.mT @ gap @ population.vectors * weight / n

    def score(rows: Tensor) -> Tensor:
        u = rows @ population.vectors
        return ((u @ turned) * u).sum(1) - ((u.square() @ weight) * u.square()).sum(1) / (2 * n**2)

    return score


def nearest(features: Tensor) -> Score:
    """Largest cosine with any of the features that were sent, (n, feature_dim)."""
    sent = torch.nn.functional.normalize(with_one(features)[:, :-1])
    return lambda rows: (torch.nn.functional.normalize(rows[:, :-1]) @ sent.mT).max(1).values


def mean_shift(mean: Tensor, population: Population, share: float) -> Score:
    """(e - mu)^T S^-1 (mean - mu) for the mean of a set, with the population's mean mu and covariance S."""
    covariance = population.moment[:-1, :-1] - torch.outer(population.mean, population.mean)
    direction = inverse(covariance, share) @ (mean - population.mean)
    return lambda rows: (rows[:, :-1] - population.mean) @ direction


def of_moment(rows: Tensor, population: Population) -> dict[str, Score]:
    """All scores that are tried on the moment of rows (n, p)."""
    moment, n = rows.mT @ rows / len(rows), len(rows)
    scores = {f"leverage {share:g}": leverage(moment, share) for share in SHARES}
    return scores | {f"likelihood {share:g}": likelihood(moment, population, share, n) for share in SHARES}


def of_mean(rows: Tensor, population: Population) -> dict[str, Score]:
    """All scores that are tried on a class sum, which with its count is a mean."""
    return {f"mean shift {share:g}": mean_shift(rows[:, :-1].mean(0), population, share) for share in SHARES}


def of_features(rows: Tensor, population: Population) -> dict[str, Score]:
    """The score for features that are sent as they are."""
    return {"nearest": nearest(rows[:, :-1])}


def attack(
    sent: Tensor,
    seen: Tensor,
    others: Tensor,
    population: Population,
    n: int,
    repeats: int,
    scores: Scores,
    seed: int = 0,
) -> dict[str, float | str]:
    """AUC over random sets of ``n``; the score is the one that was best on a third of the sets, which do not count.

    Args:
        sent: rows of the client's samples as the client computes them, (m, p).
        seen: of the same images as the attacker computes them.
        others: of images that are in no set, as the attacker computes them.
        population: what the attacker's own images say.
        n: samples of a set.
        repeats: sets.
        scores: scores by name, from the rows of a set and the population.
        seed: of the sets.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(repeats):
        chosen = torch.randperm(len(sent), generator=generator)[:n]
        tried = scores(sent[chosen], population)
        candidates = seen[chosen[:CANDIDATES]]
        found.append({name: auc(score(candidates), score(others[:CANDIDATES])) for name, score in tried.items()})
    first = max(1, repeats // 3)
    best = max(found[0], key=lambda name: sum(each[name] for each in found[:first]))
    values = torch.tensor([each[best] for each in found[first:]])
    return {"auc": values.mean().item(), "deviation": values.std(correction=0).item(), "score": best}
