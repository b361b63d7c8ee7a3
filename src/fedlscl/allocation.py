"""Who trains which part of a model: blocks for clients by importance and label balance (FedBE)."""

import math
from collections.abc import Sequence


def allocate(
    importance: Sequence[Sequence[float]], counts: Sequence[Sequence[int]], capacities: Sequence[int], beta: float
) -> list[list[int]]:
    """Give every client as many distinct blocks as its capacity says (our reconstruction).

    Slot by slot, clients of large capacity first, each takes a block that nobody has, or else the one of highest
    importance - beta KL(labels of the block's clients || labels of all); ties go to the lowest index.

    Args:
        importance: of each block to each client.
        counts: samples by class of each client; whole numbers, so that equal shares diverge by exactly zero.
        capacities: blocks per client, at most as many as there are.
        beta: weight of the divergence.

    Example:
        >>> allocate([[1.0, 1.0], [1.0, 1.0]], [[5, 0], [0, 5]], [1, 1], beta=0.1)
        [[0], [1]]
    """
    blocks = range(len(importance[0]))
    everybody = [sum(column) for column in zip(*counts, strict=True)]
    pooled = [[0] * len(everybody) for _ in blocks]
    chosen: list[list[int]] = [[] for _ in capacities]

    def rank(client: int, block: int) -> tuple[bool, float, int]:
        is_free = not any(block in taken for taken in chosen)
        divergence = kl_divergence([a + b for a, b in zip(pooled[block], counts[client], strict=True)], everybody)
        return is_free, importance[client][block] - beta * divergence, -block

    for slot in range(max(capacities)):
        for client in sorted(range(len(capacities)), key=lambda i: (-capacities[i], i)):
            if slot < capacities[client]:
                block = max((b for b in blocks if b not in chosen[client]), key=lambda b: rank(client, b))
                chosen[client].append(block)
                pooled[block] = [a + b for a, b in zip(pooled[block], counts[client], strict=True)]
    return [sorted(taken) for taken in chosen]


def kl_divergence(counts: Sequence[int], reference: Sequence[int]) -> float:
    """KL(p || q) of two histograms of whole numbers, the first within the second; 0 for an empty one.

    Example:
        >>> kl_divergence([3, 6], [1, 2]), round(kl_divergence([4, 0], [4, 4]), 4)
        (0.0, 0.6931)
    """
    total, whole = sum(counts), sum(reference)
    return math.fsum(
        n / total * math.log((n * whole) / (q * total)) for n, q in zip(counts, reference, strict=True) if n
    )
