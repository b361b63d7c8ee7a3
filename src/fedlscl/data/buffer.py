"""The replay buffer B^n: the samples of lowest loss of each class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlscl.data.split import check_integers


@dataclass(frozen=True, eq=False)
class Buffer:
    """Which samples a client keeps; never changed, so B^{n-1} stays usable beside B^n.

    Example:
        >>> ids, labels, losses = torch.tensor([5, 6, 7]), torch.tensor([0, 0, 1]), torch.tensor([0.9, 0.1, 0.5])
        >>> Buffer.empty().updated(ids, labels, losses, per_class=1).ids
        tensor([6, 7])
    """

    ids: Tensor
    """(n,) int64 positions in the data set, ordered by class, loss and id."""
    labels: Tensor
    """(n,) int64."""
    losses: Tensor
    """(n,) float32, when the sample was chosen."""

    @staticmethod
    def empty() -> "Buffer":
        """The buffer before the first task."""
        return Buffer(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> Tensor:
        """Sorted classes of the samples, int64."""
        return self.labels.unique()

    def updated(self, ids: Tensor, labels: Tensor, losses: Tensor, per_class: int) -> "Buffer":
        """Replace the samples of each class in ``labels`` by its new samples of lowest loss.

        Args:
            ids: (m,) without repetition.
            labels: (m,).
            losses: (m,).
            per_class: the most samples of a class.
        """
        ids, labels, losses = ids.cpu().long(), labels.cpu().long(), losses.detach().cpu().float()
        chosen = _lowest_loss(ids, labels, losses, per_class)
        kept = ~torch.isin(self.labels, labels)
        parts = [
            torch.cat([old[kept], new[chosen]])
            for old, new in ((self.ids, ids), (self.labels, labels), (self.losses, losses))
        ]
        by_class = torch.argsort(parts[1], stable=True)
        return Buffer(*(part[by_class] for part in parts))

    def state_dict(self) -> dict[str, Tensor]:
        """The three tensors by field name."""
        return {"ids": self.ids, "labels": self.labels, "losses": self.losses}

    @staticmethod
    def from_state_dict(state: dict[str, Tensor]) -> "Buffer":
        """Restore from `state_dict`."""
        return Buffer(state["ids"], state["labels"], state["losses"])


def lowest_loss(ids: Tensor, labels: Tensor, losses: Tensor, per_class: int) -> Tensor:
    """Ids of the ``per_class`` samples of lowest loss of each class, ordered by class, loss and id.

    The order of the samples does not matter; NaN counts as the largest loss.

    Args:
        ids: (m,).
        labels: (m,).
        losses: (m,).
        per_class: the most samples of a class.
    """
    return ids[_lowest_loss(ids, labels, losses, per_class)]


def _lowest_loss(ids: Tensor, labels: Tensor, losses: Tensor, per_class: int) -> Tensor:
    check_integers(0, per_class=per_class)
    order = torch.argsort(ids, stable=True)
    order = order[torch.argsort(losses[order], stable=True)]
    order = order[torch.argsort(labels[order], stable=True)]
    _, counts = labels[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[torch.arange(len(order), device=order.device) - starts < per_class]
