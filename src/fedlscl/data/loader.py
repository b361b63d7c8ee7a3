"""A data set in memory, its mini-batches of even sizes, shuffling and augmentation, and the replay buffer."""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Augment = Literal["none", "standard"]
SHIFT = 8
"""A crop moves by up to 1 / SHIFT of the side: 4 pixels of 32."""


class Batch(NamedTuple):
    """A mini-batch."""

    images: Tensor
    """(B, 3, height, width) uint8 in 0..255, as stored: each net resizes and normalises for itself."""
    labels: Tensor
    """(B,) int64."""
    ids: Tensor
    """(B,) int64 positions in the data set: train samples are 0..N-1, test samples continue from N."""
    prefix: Tensor | None = None
    """Cached output of the net's frozen part."""
    augmented: bool = False
    """True if randomly augmented; cached features must not be used."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in memory, or mapped from disk; an id is a position in train, or ``len(train)`` + one in test."""

    name: str
    train_images: Tensor
    """(N, 3, height, width) uint8."""
    train_labels: Tensor
    """(N,) int64."""
    test_images: Tensor
    """(M, 3, height, width) uint8."""
    test_labels: Tensor
    """(M,) int64."""
    class_names: tuple[str, ...]
    is_cropped: bool = False
    """Whether the images were cropped from files by `centre_crop`; `predict` then crops as well."""

    def __post_init__(self) -> None:
        self._check("train", self.train_images, self.train_labels)
        self._check("test", self.test_images, self.test_labels)
        # As they read: é has two encodings, and spaces around a name do not show.
        names = [plain_name(str(name)) for name in self.class_names]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"class_names of {self.name!r} must be different, got {twice[0]!r} twice: rename one.")

    def _check(self, part: str, images: Any, labels: Any) -> None:
        what = f"{part}_images of data set {self.name!r} must"
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            raise ValueError(f"{what} be a uint8 tensor in 0..255, got {_kind(images)}: scale and convert it.")
        shape, size = tuple(images.shape), tuple(self.train_images.shape[2:])
        if len(shape) != 4 or shape[1] != 3 or 0 in shape[2:]:
            is_last = len(shape) == 4 and shape[3] == 3
            fix = "use images.permute(0, 3, 1, 2)" if is_last else "repeat a single channel three times"
            raise ValueError(f"{what} have shape (N, 3, height, width), got {shape}: {fix}.")
        if shape[2:] != size:
            raise ValueError(f"{what} be {size} like train_images, got {shape[2:]}: resize them.")
        what = f"{part}_labels of data set {self.name!r} must"
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise ValueError(f"{what} be an int64 tensor, got {_kind(labels)}: convert it.")
        if labels.shape != (len(images),):
            raise ValueError(f"{what} have shape ({len(images)},), got {tuple(labels.shape)}: one label per image.")
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise ValueError(
                f"{what} be 0 to {self.num_classes - 1}, one for each class name, got {outside[0]}: give every class a "
                "name and train images, or renumber the labels with numpy.unique(labels, return_inverse=True)."
            )
        counts = torch.bincount(labels, minlength=self.num_classes)
        if not counts.all():
            empty = self.class_names[int(counts.argmin())]
            raise ValueError(f"{self.name!r} has no {part} image of class {empty!r}: add one or remove the class.")

    @property
    def num_classes(self) -> int:
        """Classes of the whole data set."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every pixel, shape and label, in order, and over `names_hash`.

        The name of the data set does not count. It takes half a second for each GB of pixels, once for each object.
        """
        digest = hashlib.sha256(names_hash(self.class_names).encode())
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            digest.update(repr(tuple(images.shape)).encode())
            digest.update(labels.numpy().astype("<i8").tobytes())
            for chunk in images.split(256):  # made contiguous together
                digest.update(chunk.contiguous().numpy().data)
        return digest.hexdigest()

    def labels(self, ids: Tensor) -> Tensor:
        """Labels (B,) of ids (B,)."""
        return _take(self.train_labels, self.test_labels, ids)

    def fetch(self, ids: Tensor) -> Batch:
        """The samples of ids (B,), in that order."""
        return Batch(_take(self.train_images, self.test_images, ids), self.labels(ids), ids)

    def capped(self, train_per_class: int | None, test_per_class: int | None, seed: int) -> "ImageData":
        """Keep at most so many samples of each class; ``None`` keeps all."""
        train = choose_per_class(self.train_labels.numpy(), train_per_class, seed)
        test = choose_per_class(self.test_labels.numpy(), test_per_class, seed)
        if len(train) == len(self.train_labels) and len(test) == len(self.test_labels):
            return self
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )


def _take(train: Tensor, test: Tensor, ids: Tensor) -> Tensor:
    is_train = ids < len(train)
    if is_train.all():
        return train[ids]
    taken = test[(ids - len(train)).clamp(min=0)]
    taken[is_train] = train[ids[is_train]]
    return taken


def _kind(value: Any) -> str:
    return str(value.dtype if isinstance(value, Tensor) else type(value).__name__)


def plain_name(name: str) -> str:
    """A class name as it is compared: in Unicode's NFC form, without surrounding white space (ours).

    macOS stores the e with an acute accent as two code points and Linux as one; case counts.
    """
    return unicodedata.normalize("NFC", name).strip()


def names_hash(class_names: Sequence[str]) -> str:
    """SHA-256 of class names in label order, compared as `plain_name` gives them: what a label means, without a name.

    Example:
        >>> names_hash(["cat", "dog"]) == names_hash(["cat ", "dog"]) != names_hash(["dog", "cat"])
        True
    """
    return hashlib.sha256(json.dumps([plain_name(name) for name in class_names]).encode()).hexdigest()


def choose_per_class(labels: np.ndarray, size: float | None, *seeds: int) -> np.ndarray:
    """Sorted positions of ``size`` samples of each class: the first ones of a seeded permutation.

    A size between 0 and 1 is a share of the class, of which it takes and leaves a sample if there are two; None is all.
    A larger size keeps what a smaller one chose.

    Example:
        >>> labels = np.array([0, 0, 0, 0, 1])
        >>> [choose_per_class(labels, size, 42).size for size in (1, 0.75, None)]
        [2, 4, 5]
    """
    chosen = []
    for label in np.unique(labels).tolist():
        ids = np.random.default_rng((*seeds, label)).permutation(np.flatnonzero(labels == label))
        count = len(ids) if size is None else int(size)
        if size is not None and 0 < size < 1:
            count = min(max(round(size * len(ids)), 1), max(len(ids) - 1, 1))
        chosen.append(ids[:count])
    return np.sort(np.concatenate(chosen))


def batches(
    data: ImageData,
    ids: Tensor,
    batch_size: int,
    shuffle: bool,
    generator: torch.Generator | None = None,
    num_workers: int = 0,
    augment: Augment = "none",
) -> DataLoader:
    """Loader of `EvenBatches` of ids (n,), which may be empty, as `Batch`.

    If shuffled, every pass has a new order, drawn from the generator (torch's global one if left out), and ``augment``
    changes the images, not their order.
    """
    sampler = _Seeded if shuffle and augment == "standard" else EvenBatches
    return DataLoader(
        _BatchDataset(data, ids),
        batch_size=None,
        sampler=sampler(len(ids), batch_size, shuffle, generator),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_initialized(),  # in use here: copies from pinned memory do not stop the host
        # A DataLoader draws a seed at every pass: not from the generator of the order, nor from the global one.
        generator=torch.Generator(),
    )


@dataclass(eq=False)
class EvenBatches(Sampler[Tensor]):
    """Positions 0..n-1 in ceil(n / batch_size) batches whose sizes differ by at most one.

    So the last batch has a single sample only if batch_size is 2 or less, or if there is only one sample.

    Example:
        >>> [batch.tolist() for batch in EvenBatches(5, batch_size=4, shuffle=False)]
        [[0, 1, 2], [3, 4]]
    """

    num_samples: int
    batch_size: int
    shuffle: bool
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_integers(1, batch_size=self.batch_size)

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        # Drawn at the first batch, not before: with workers a DataLoader asks for an iterator twice and drops one.
        if n := self.num_samples:
            order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
            yield from order.tensor_split(len(self))


class _Seeded(EvenBatches):
    """Every batch with the seed of its augmentation, whichever process will load it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        start = torch.initial_seed() if self.generator is None else self.generator.initial_seed()
        self.seeds = torch.Generator().manual_seed(start ^ 1)

    def __iter__(self) -> Iterator[Any]:
        for positions in super().__iter__():
            yield positions, int(torch.randint(2**62, (), generator=self.seeds))


@dataclass(eq=False)
class _BatchDataset(Dataset[Batch]):
    """An item is a whole batch: positions, or positions with the seed of their augmentation."""

    data: ImageData
    ids: Tensor

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
        """Replace the samples of each class in ``labels`` by its new samples of `lowest_loss`; all (m,), ids unique."""
        ids, labels, losses = ids.cpu().long(), labels.cpu().long(), losses.detach().cpu().float()
        chosen, kept = lowest_loss(ids, labels, losses, per_class), ~torch.isin(self.labels, labels)
        by_class = torch.cat([self.labels[kept], labels[chosen]]).argsort(stable=True)
        pairs = (self.ids, ids), (self.labels, labels), (self.losses, losses)
        return Buffer(*(torch.cat([old[kept], new[chosen]])[by_class] for old, new in pairs))

    def state_dict(self) -> dict[str, Tensor]:
        """The three tensors by field name; ``Buffer(**state)`` restores them."""
        return dict(vars(self))


def lowest_loss(ids: Tensor, labels: Tensor, losses: Tensor, per_class: int) -> Tensor:
    """Positions of at most ``per_class`` samples of lowest loss of each class, ordered by class, loss and id; all (m,).

    The order of the samples does not matter; NaN counts as the largest loss.
    """
    check_integers(0, per_class=per_class)
    order = torch.from_numpy(np.lexsort((ids, losses, labels)))
    _, counts = labels[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[torch.arange(len(order)) - starts < per_class]


def check_integers(low: int, high: int | None = None, /, **values: int | None) -> None:
    """Raise a ValueError that names the first value that is not an integer in range; None is an option left out."""
    for name, value in values.items():
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (is_whole and low <= value <= (value if high is None else high)):
            bounds = f">= {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name} must be {'' if is_whole else 'an integer '}{bounds}, got {value}.")
