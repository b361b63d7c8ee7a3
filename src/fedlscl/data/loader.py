"""Mini-batches of even sizes, shuffling and augmentation, and the replay buffer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fedlscl.data.images import Batch, ImageData
from fedlscl.data.split import check_integers

Augment = Literal["none", "standard"]
SHIFT = 8
"""A crop moves by up to 1 / SHIFT of the side: 4 pixels of 32."""


def batches(
    data: ImageData,
    ids: Tensor,
    batch_size: int,
    shuffle: bool,
    generator: torch.Generator | None = None,
    num_workers: int = 0,
    augment: Augment = "none",
) -> DataLoader:
    """Loader of `Batch` over ids (n,).

    Args:
        data: the data set.
        ids: (n,) positions in the data set; an empty tensor gives a loader without batches.
        batch_size: the most samples in a batch.
        shuffle: whether every pass has a new order, drawn from the generator.
        generator: of the order; torch's global one if left out.
        num_workers: processes that load batches; 0 loads in this one.
        augment: random changes of the images; they do not change the order.
    """
    order = EvenBatches(len(ids), batch_size, shuffle, generator)
    return DataLoader(
        _BatchDataset(data, ids),
        batch_size=None,
        sampler=order if augment == "none" else _Seeded(order, generator),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_initialized(),  # in use here: copies from pinned memory do not stop the host
        # A DataLoader draws a seed at every pass: not from the generator of the order, nor from the global one.
        generator=torch.Generator(),
    )


class EvenBatches(Sampler[Tensor]):
    """Positions 0..n-1 in ceil(n / batch_size) batches whose sizes differ by at most one.

    So the last batch has a single sample only if batch_size is 2 or less, or if there is only one sample.

    Example:
        >>> [batch.tolist() for batch in EvenBatches(5, batch_size=4, shuffle=False)]
        [[0, 1, 2], [3, 4]]
    """

    def __init__(
        self, num_samples: int, batch_size: int, shuffle: bool, generator: torch.Generator | None = None
    ) -> None:
        check_integers(1, batch_size=batch_size)
        self.num_samples, self.shuffle, self.generator = num_samples, shuffle, generator
        self.num_batches = -(-num_samples // batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Tensor]:
        # Drawn at the first batch, not before: with workers a DataLoader asks for an iterator twice and drops one.
        if self.num_batches:
            n = self.num_samples
            order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
            yield from order.tensor_split(self.num_batches)


class _Seeded(Sampler[tuple[Tensor, int]]):
    """Positions of every batch with the seed of its augmentation, whichever process will load it."""

    def __init__(self, order: EvenBatches, generator: torch.Generator | None) -> None:
        self.order = order
        start = torch.initial_seed() if generator is None else generator.initial_seed()
        self.seeds = torch.Generator().manual_seed(start ^ 1)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for positions in self.order:
            yield positions, int(torch.randint(2**62, (), generator=self.seeds))


class _BatchDataset(Dataset[Batch]):
    """An item is a whole batch: positions, or positions with the seed of their augmentation."""

    def __init__(self, data: ImageData, ids: Tensor) -> None:
        self.data, self.ids = data, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: Tensor | tuple[Tensor, int]) -> Batch:
        if isinstance(item, Tensor):
            return self.data.fetch(self.ids[item])
        batch = self.data.fetch(self.ids[item[0]])
        return batch._replace(images=standard(batch.images, item[1]), augmented=True)


def standard(images: Tensor, seed: int) -> Tensor:
    """Shift each image (B, 3, height, width) by up to an eighth of its side, repeating edges, and flip half of them.

    Example:
        >>> images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
        >>> standard(images, 0).equal(standard(images, 0)), standard(images, 0).shape
        (True, torch.Size([2, 3, 8, 8]))
    """
    generator = torch.Generator().manual_seed(seed)
    size, (height, width) = len(images), images.shape[-2:]
    rows, columns = (_shifted(size, side, generator) for side in (height, width))
    flipped = torch.rand(size, generator=generator) < 0.5
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    which, channels = torch.arange(size).view(-1, 1, 1, 1), torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return images[which, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _shifted(size: int, side: int, generator: torch.Generator) -> Tensor:
    reach = side // SHIFT
    shifts = torch.randint(-reach, reach + 1, (size, 1), generator=generator)
    return (torch.arange(side) + shifts).clamp(0, side - 1)


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
