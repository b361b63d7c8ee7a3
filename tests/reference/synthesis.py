"""Statistics that images are judged by as they are written, channel by channel in Python's floats."""

import math


def norm_distance(layers):
    """Sum over layers (mean, var, running mean, running var) of ||running var - var|| + ||running mean - mean||."""
    return sum(_norm(r, v) + _norm(m0, m) for m, v, m0, r in layers)


def norm_divergence(layers):
    """Mean over layers and channels of KL(N(m0, r) || N(m, v)) = log(s_v / s_r) + (r + (m0 - m)^2) / 2v - 1/2."""
    means = []
    for layer in layers:
        terms = [
            math.log(math.sqrt(v / r)) + (r + (m0 - m) ** 2) / (2 * v) - 0.5 for m, v, m0, r in zip(*layer, strict=True)
        ]
        means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


def blurred(image, row, column):
    """A pixel of the 5 x 5 Gaussian blur (sigma 1) of a plane, reflected at its edges."""
    height, width = len(image), len(image[0])
    total = weight = 0.0
    for i in range(-2, 3):
        for j in range(-2, 3):
            share = math.exp(-(i * i + j * j) / 2)
            total += share * image[_reflected(row + i, height)][_reflected(column + j, width)]
            weight += share
    return total / weight


def _reflected(place, size):
    return -place if place < 0 else 2 * (size - 1) - place if place >= size else place


def _norm(left, right):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(left, right, strict=True)))
