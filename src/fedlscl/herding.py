"""Herding (Welling, ICML 2009; iCaRL, arXiv 1611.07725): an order of samples whose every beginning has the mean."""

import torch
from torch import Tensor


def herding(features: Tensor, count: int) -> Tensor:
    """Positions of up to ``count`` rows of (n, width), best first; no row is chosen twice (ours).

    Step j takes the row that brings the mean of the j chosen ones nearest to the mean of all. A shorter order is the
    beginning of a longer one.

    Example:
        >>> herding(torch.tensor([[0.0], [4.0], [2.5], [2.0]]), 2)
        tensor([3, 2])
    """
    features = features.double()
    mean, total = features.mean(0), torch.zeros_like(features[0])
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen = []
    for step in range(1, min(count, len(features)) + 1):
        distance = (mean - (total + features) / step).norm(dim=1)
        best = int(distance.masked_fill(~free, torch.inf).argmin())
        total, free[best] = total + features[best], False
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64)
