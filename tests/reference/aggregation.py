"""Robust averages, coordinate by coordinate."""

import math
import statistics

import torch


def each(values, rule):
    """A rule for lists of numbers, applied to every coordinate of values (k, ...)."""
    flat = values.double().reshape(len(values), -1).mT.tolist()
    return torch.tensor([rule(numbers) for numbers in flat], dtype=torch.float64).view(values.shape[1:])


def median(values):
    return each(values, statistics.median)


def trimmed_mean(values, trim):
    k = len(values)
    cut = min(math.ceil(trim * k), (k - 1) // 2)
    return each(values, lambda numbers: math.fsum(sorted(numbers)[cut : k - cut]) / (k - 2 * cut))


def norm_clipped_mean(states):
    names = list(states[0])
    centre = {name: median(torch.stack([state[name] for state in states])) for name in names}
    moves = [{name: state[name].double() - centre[name] for name in names} for state in states]
    norms = [math.sqrt(sum(x * x for move in moves_.values() for x in move.flatten().tolist())) for moves_ in moves]
    radius = statistics.median_low(norms)
    total = {name: torch.zeros_like(centre[name]) for name in names}
    for move, norm in zip(moves, norms, strict=True):
        for name in names:
            total[name] += centre[name] + move[name] * (1.0 if norm <= radius else radius / norm)
    return {name: total[name] / len(states) for name in names}
