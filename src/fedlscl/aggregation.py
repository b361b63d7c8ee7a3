"""Weighted averages of clients' tensors, as every averaging server needs them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def weighted_average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Average states of equal names and shapes with weights that need not sum to one.

    Sums run in float64 in the given order and return in each tensor's own dtype; integer tensors (BatchNorm's
    counters) take the maximum.

    Example:
        >>> weighted_average([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [1, 3])
        {'w': tensor([3.])}
    """
    total = float(sum(weights))
    if not total > 0:
        raise ValueError(f"weights {list(weights)} sum to {total}: at least one client must count.")
    return {name: _average([state[name] for state in states], [w / total for w in weights]) for name in states[0]}


def classwise_average(rows: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    """Average head rows (num_classes, ...) class by class, with each client's sample counts (num_classes,) as weights.

    A plain average shrinks the update of a class that one of k clients has to 1/k; here its row is that client's own.
    Rows of classes that nobody has are averaged uniformly.
    """
    weights = torch.stack([count.double() for count in counts])  # (clients, num_classes)
    weights[:, weights.sum(0) == 0] = 1
    weights = weights / weights.sum(0)
    shape = [len(rows), -1] + [1] * (rows[0].dim() - 1)
    return (torch.stack([row.double() for row in rows]) * weights.view(shape)).sum(0).to(rows[0].dtype)


def masked_average(rows: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Plain mean of every row among those who sent it, and which rows somebody sent (FedWeIT's server).

    ``rows[i]`` (n_i, ...) are the rows that mask i (n,) names, in its order; the answer has the same form.

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


def _average(values: list[Tensor], shares: list[float]) -> Tensor:
    if not values[0].is_floating_point():
        return torch.stack(values).amax(0)
    if len(values) == 1:
        return values[0].clone()
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, share in zip(values, shares, strict=True):
        total.add_(value.double(), alpha=share)
    return total.to(values[0].dtype)
