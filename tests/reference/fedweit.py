"""FedWeIT's weights and objective entry by entry, in Python's floats."""

import math


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def weight(base, mask, adaptive, attention, knowledge):
    """theta of a layer as {index: value}: B sigmoid(m) + A + sum_j alpha_j A'_j."""
    values = {}
    for o, i, y, x in [
        (o, i, y, x) for o in range(len(base)) for i in range(len(base[0])) for y in (0, 1) for x in (0, 1)
    ]:
        others = sum(a * other[o][i][y][x] for a, other in zip(attention, knowledge, strict=True))
        values[o, i, y, x] = base[o][i][y][x] * sigmoid(mask[o]) + adaptive[o][i][y][x] + others
    return values


def flat(nested):
    return [v for part in nested for v in flat(part)] if isinstance(nested, list) else [nested]


def retention(base, anchor, masks, adaptives):
    """sum_s ||B sigmoid(m_s) + A_s - theta*_s||^2 / 2, theta*_s = B* sigmoid(m_s) + A_s."""
    total = 0.0
    for mask, adaptive in zip(masks, adaptives, strict=True):
        for o, m in enumerate(mask):
            for b, start, a in zip(flat(base[o]), flat(anchor[o]), flat(adaptive[o]), strict=True):
                total += (b * sigmoid(m) + a - (start * sigmoid(m) + a)) ** 2 / 2
    return total
