"""Averages of clients' tensors: weighted, class-wise, masked, and robust to a few bad clients."""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def weighted_average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Average states in float64, with weights that need not sum to one; integers (counters) take the maximum.

    Example:
        >>> weighted_average([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [1, 3])
        {'w': tensor([3.])}
    """
    total = float(sum(weights))
    if not total > 0:
        raise ValueError(f"weights must have a positive sum, got {list(weights)}.")
    average = {}
    for name, first in states[0].items():
        values = [state[name] for state in states]
        if not first.is_floating_point():
            average[name] = torch.stack(values).amax(0)
        else:
            mean = torch.zeros_like(first, dtype=torch.float64)
            for value, weight in zip(values, weights, strict=True):
                mean.add_(value.double(), alpha=weight / total)
            average[name] = mean.to(first.dtype)
    return average


def classwise_average(rows: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    """Average head rows (num_classes, ...) class by class, with each client's sample counts (num_classes,) as weights.

    A plain average shrinks the update of a class that one of k clients has to 1/k; here its row is that client's.
    Rows of classes without samples are averaged uniformly.
    """
    weights = torch.stack(list(counts)).double()  # (clients, num_classes)
    weights[:, weights.sum(0) == 0] = 1
    shares = (weights / weights.sum(0)).view(*weights.shape, *[1] * (rows[0].dim() - 1))
    return (torch.stack(list(rows)).double() * shares).sum(0).to(rows[0].dtype)


def masked_average(rows: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Plain mean of every row over the clients that sent it, and the mask of all rows sent (FedWeIT's server).

    ``rows[i]`` (n_i, ...) are the rows selected by mask i (n,), in its order; the result has the same form.

    Example:
        >>> masks = torch.tensor([[False, True, False], [True, True, False]])
        >>> masked_average([torch.tensor([2.0]), torch.tensor([4.0, 5.0])], masks.unbind())
        (tensor([4.0000, 3.5000]), tensor([ True,  True, False]))
    """
    total = rows[0].new_zeros(len(masks[0]), *rows[0].shape[1:], dtype=torch.float64)
    for row, mask in zip(rows, masks, strict=True):
        total[mask] += row.double()
    senders = torch.stack(list(masks)).sum(0)
    sent = senders > 0
    counts = senders[sent].view(-1, *[1] * (total.dim() - 1))
    return (total[sent] / counts).to(rows[0].dtype), sent


def trimmed_mean(values: Tensor, trim: float) -> Tensor:
    """Mean over clients (k, ...) of every coordinate without its smallest and largest values; 0.5 gives the median.

    At either end the share ``trim`` is cut, rounded up (ours), while one value is left, or the middle two of an even k.
    As many clients cannot move the mean beyond the others' range (Yin et al., ICML 2018, arXiv 1803.01498).

    Example:
        >>> trimmed_mean(torch.tensor([[1.0], [2.0], [1e9]]), 0.2)
        tensor([2.], dtype=torch.float64)
    """
    k = len(values)
    cut = min(math.ceil(trim * k), (k - 1) // 2)
    return values.double().sort(0).values[cut : k - cut].mean(0)


def norm_clipped(states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """States clipped around their median to the median distance from it, in float64.

    Distances are over all floating tensors at once; counters are unchanged. A client moves the mean of k by at most
    that distance / k (centred clipping: Karimireddy et al., ICML 2021, arXiv 2012.10333; the medians are ours).

    Example:
        >>> [state["w"].item() for state in norm_clipped([{"w": torch.tensor([x])} for x in (1.0, 2.0, 100.0)])]
        [1.0, 2.0, 3.0]
    """
    names = [name for name, value in states[0].items() if value.is_floating_point()]
    centre = {name: trimmed_mean(torch.stack([state[name] for state in states]), 0.5) for name in names}
    moves = [{name: state[name].double() - centre[name] for name in names} for state in states]
    # hypot does not overflow where a sum of squares would.
    distances = [math.hypot(*(float(value.norm()) for value in move.values())) for move in moves]
    radius = statistics.median_low(distances)
    clipped = []
    for state, move, distance in zip(states, moves, distances, strict=True):
        share = radius / distance if distance > radius else 1.0
        clipped.append({**state, **{name: centre[name] + share * move[name] for name in names}})
    return clipped


def robust_average(states: Sequence[Mapping[str, Tensor]], trim: float) -> dict[str, Tensor]:
    """``trimmed_mean`` of every tensor, in its dtype, and the lower median of integers; all clients weigh the same."""
    average = {}
    for name, first in states[0].items():
        values = torch.stack([state[name] for state in states])
        if first.is_floating_point():
            average[name] = trimmed_mean(values, trim).to(first.dtype)
        else:
            average[name] = values.sort(0).values[(len(values) - 1) // 2]
    return average


def robust_rows(rows: Sequence[Tensor], counts: Sequence[Tensor], trim: float) -> Tensor:
    """``trimmed_mean`` of every head row (num_classes, ...) over the clients with its class; of all if none has it.

    The row of a class that one client has is that client's.
    """
    has = torch.stack([count > 0 for count in counts])  # (clients, num_classes)
    has[:, ~has.any(0)] = True
    values, merged = torch.stack(list(rows)), torch.empty_like(rows[0])
    for holders in has.mT.unique(dim=0):
        classes = (has.mT == holders).all(1)
        merged[classes] = trimmed_mean(values[holders][:, classes], trim).to(merged.dtype)
    return merged
