"""A data set in memory, or mapped from disk, as uint8."""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedlscl.data.batch import Batch
from fedlscl.data.per_class import first_per_class

HASHED_AT_ONCE = 256
"""Images that are made contiguous together for hashing."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images and labels of a data set; an id is a position in train, or ``len(train)`` + a position in test."""

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

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            _check_images(getattr(self, f"{part}_images"), f"{part}_images of data set {self.name!r}")
        size, test_size = (tuple(images.shape[2:]) for images in (self.train_images, self.test_images))
        if size != test_size:
            raise ValueError(
                f"test_images of data set {self.name!r} must be {size} like train_images, got {test_size}: resize them"
            )
        for part, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            _check_labels(labels, len(images), f"{part}_labels of data set {self.name!r}")
            counts = torch.bincount(labels, minlength=self.num_classes)
            if len(counts) > self.num_classes:
                raise ValueError(
                    f"data set {self.name!r} has {part} label {len(counts) - 1}, but {self.num_classes} class names: "
                    "name every class or correct the labels"
                )
            if not counts.all():
                empty = self.class_names[int(counts.argmin())]
                raise ValueError(
                    f"data set {self.name!r} has no {part} image of class {empty!r}: add one or remove the class"
                )
        # As they read: é has two encodings, and spaces around a name do not show.
        names = [plain_name(str(name)) for name in self.class_names]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"class_names of {self.name!r} must be different, got {twice!r} twice: rename one class")

    @property
    def num_classes(self) -> int:
        """Classes of the whole data set, whoever sees them."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every pixel, shape and label, in order, and over `names_hash`.

        Equal values mean equal data; the data set's own name and place do not count. It takes about half a second for
        each GB of pixels, once for each object.
        """
        digest = hashlib.sha256(names_hash(self.class_names).encode())
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            digest.update(repr(tuple(images.shape)).encode())
            digest.update(labels.numpy().astype("<i8").tobytes())
            for chunk in images.split(HASHED_AT_ONCE):
                digest.update(chunk.contiguous().numpy())
        return digest.hexdigest()

    def images(self, ids: Tensor) -> Tensor:
        """Images (B, 3, height, width) uint8 of ids (B,)."""
        return _take(self.train_images, self.test_images, ids)

    def labels(self, ids: Tensor) -> Tensor:
        """Labels (B,) of ids (B,)."""
        return _take(self.train_labels, self.test_labels, ids)

    def fetch(self, ids: Tensor) -> Batch:
        """The samples of ids (B,), in that order."""
        return Batch(self.images(ids), self.labels(ids), ids)

    def capped(self, train_per_class: int | None, test_per_class: int | None, seed: int) -> "ImageData":
        """Keep at most so many samples of each class; ``None`` keeps all."""
        train = first_per_class(self.train_labels.numpy(), train_per_class, seed)
        test = first_per_class(self.test_labels.numpy(), test_per_class, seed)
        if len(train) == len(self.train_labels) and len(test) == len(self.test_labels):
            return self
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )


def _check_images(images: Any, what: str) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise ValueError(f"{what} must be a uint8 tensor in 0..255, got {_kind(images)}: scale and convert it")
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape[2:]:
        is_last = len(shape) == 4 and shape[3] == 3
        fix = "use images.permute(0, 3, 1, 2)" if is_last else "repeat a single channel three times"
        raise ValueError(f"{what} must have shape (N, 3, height, width), got {shape}: {fix}")


def _check_labels(labels: Any, count: int, what: str) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise ValueError(f"{what} must be an int64 tensor, got {_kind(labels)}: convert it")
    if labels.shape != (count,):
        raise ValueError(f"{what} must have shape ({count},), got {tuple(labels.shape)}: give one label per image")
    if count and labels.min() < 0:
        raise ValueError(f"{what} must be >= 0, got {int(labels.min())}: number the classes from 0")


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


def _take(train: Tensor, test: Tensor, ids: Tensor) -> Tensor:
    is_train = ids < len(train)
    if is_train.all():
        return train[ids]
    if not is_train.any():
        return test[ids - len(train)]
    taken = train.new_empty(len(ids), *train.shape[1:])
    taken[is_train] = train[ids[is_train]]
    taken[~is_train] = test[ids[~is_train] - len(train)]
    return taken
