"""Slow, literal versions of the closed-form family."""

import itertools

import torch


def group_estimate(groups):
    """STSA-E's Gram of one class from its groups of rows, written as in the card's equation."""
    groups = [rows for rows in groups if len(rows)]
    total = sum(rows.sum(0) for rows in groups)
    samples, k = sum(map(len, groups)), len(groups)
    if k == 1:
        return torch.outer(total, total) / samples
    first = sum(torch.outer(rows.sum(0), rows.sum(0)) / len(rows) for rows in groups)
    return (samples - 1) / (k - 1) * first - (samples - k) / ((k - 1) * samples) * torch.outer(total, total)


def partitions(ids, sizes):
    """All ways to divide ids into groups of the given sizes, in order."""
    if not sizes:
        yield []
        return
    for head in itertools.combinations(ids, sizes[0]):
        for rest in partitions([i for i in ids if i not in head], sizes[1:]):
            yield [list(head), *rest]


def ridge(features, targets, strength):
    """The dense solve of a regression, in float64."""
    return torch.linalg.solve(
        features.mT @ features + strength * torch.eye(features.shape[1], dtype=torch.float64), features.mT @ targets
    )


def merged_solutions(parts, gamma):
    """AFL's pairwise merging of local ridge solutions (arXiv 2405.16240); every part brings its own gamma."""
    weight = total = None
    for features, targets in parts:
        system = features.mT @ features + gamma * torch.eye(features.shape[1], dtype=torch.float64)
        own = torch.linalg.solve(system, features.mT @ targets)
        if total is None:
            weight, total = own, system
        else:
            weight = torch.linalg.solve(total + system, total @ weight + system @ own)
            total = total + system
    return weight, total


def recursive_least_squares(parts, gamma, width):
    """AFCL's recursive update (arXiv 2505.12245), which needs the rows themselves."""
    inverse = torch.eye(width, dtype=torch.float64) / gamma
    weight = None
    for features, targets in parts:
        weight = torch.zeros(width, targets.shape[1], dtype=torch.float64) if weight is None else weight
        inner = torch.eye(len(features), dtype=torch.float64) + features @ inverse @ features.mT
        inverse = inverse - inverse @ features.mT @ torch.linalg.solve(inner, features @ inverse)
        weight = weight + inverse @ features.mT @ (targets - features @ weight)
    return weight


def low_rank_merge(parts, rank):
    """FedRAN's factor over clients, then tasks; with the sum of first dropped eigenvalues and the dropped trace."""
    spectral = dropped = 0.0

    def cut(factor):
        nonlocal spectral, dropped
        vectors, values, _ = torch.linalg.svd(factor, full_matrices=False)
        squares = values.square()
        spectral += squares[rank].item() if len(squares) > rank else 0.0
        dropped += squares[rank:].sum().item()
        return vectors[:, :rank] * values[:rank]

    past = None
    for task in parts:
        merged = cut(torch.cat([cut(rows.mT) for rows in task], 1))
        past = cut(merged if past is None else torch.cat([past, merged], 1))
    return past, spectral, dropped
