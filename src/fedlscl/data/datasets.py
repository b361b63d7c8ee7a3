"""The data sets by name."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlscl.data.folder import imagenet_r_folder, load_folder
from fedlscl.data.images import ImageData
from fedlscl.data.npz import load_npz
from fedlscl.data.per_class import split_per_class

NAMES = "'cifar100', 'imagenet-r', 'folder', 'digits', 'fake' or a file name that ends in .npz"
CROPPED = ("folder", "imagenet-r")
"""Data sets made from image files of any size, by `centre_crop`."""
DIGITS_TRAIN_FRACTION = 0.75
FAKE_SIZE, FAKE_TRAIN, FAKE_TEST = 32, 20, 10


def load_images(
    dataset: str,
    root: str | None = None,
    image_size: int | None = None,
    *,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    download: bool = False,
    cache_dir: str | None = None,
    fake_classes: int = 12,
    seed: int = 0,
) -> ImageData:
    """Load a data set as uint8 images.

    Args:
        dataset: 'cifar100', 'imagenet-r', 'folder', 'digits', 'fake' or a file name that ends in .npz.
        root: folder that holds the data set.
        image_size: side in pixels of 'folder', 'imagenet-r' (224) and 'fake' (32) images; the others stay as stored.
        train_per_class: keep at most so many train samples of each class; for 'fake' how many are made.
        test_per_class: the same for test samples.
        download: fetch 'cifar100' if it is not under root.
        cache_dir: where decoded image folders are kept, by default ~/.cache/fedlscl.
        fake_classes: number of classes of 'fake'.
        seed: of the choice of samples; not the seed of a run, so that all runs have the same test set.

    Raises:
        ValueError: if the data set is unknown, missing or broken.
    """
    if dataset in CROPPED:
        folder = _needed(root, dataset)
        folder = imagenet_r_folder(folder) if dataset == "imagenet-r" else folder
        return load_folder(dataset, folder, image_size, cache_dir, train_per_class, test_per_class, seed)
    if dataset == "fake":
        num_train = FAKE_TRAIN if train_per_class is None else train_per_class
        num_test = FAKE_TEST if test_per_class is None else test_per_class
        return make_fake(fake_classes, num_train, num_test, image_size or FAKE_SIZE, seed)
    if image_size is not None:
        raise ValueError(
            f"image_size={image_size}: {dataset!r} is kept as stored and every net resizes for itself: leave it out"
        )
    if dataset == "cifar100":
        data = load_cifar100(_needed(root, dataset), download)
    elif dataset == "digits":
        data = load_digits(seed)
    elif dataset.endswith(".npz"):
        data = load_npz(Path(root or "").expanduser() / dataset)
    else:
        raise ValueError(f"dataset={dataset!r} is unknown: use {NAMES}")
    return data.capped(train_per_class, test_per_class, seed)


def load_cifar100(root: Path, download: bool) -> ImageData:
    """CIFAR-100 (Krizhevsky, 2009), 32 x 32, from torchvision's copy under root."""
    from torchvision.datasets import CIFAR100

    try:
        train = CIFAR100(str(root), train=True, download=download)
        test = CIFAR100(str(root), train=False)
    except RuntimeError:
        raise ValueError(
            f"cifar100 is not in root={str(root)!r}, or damaged: set download=true, or unpack "
            "cifar-100-python.tar.gz there"
        ) from None
    except OSError as error:
        raise ValueError(
            f"cifar100 could not be downloaded to root={str(root)!r} ({error}): unpack cifar-100-python.tar.gz there"
        ) from None
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    labels = [torch.tensor(part.targets, dtype=torch.int64) for part in (train, test)]
    return ImageData("cifar100", images[0], labels[0], images[1], labels[1], tuple(train.classes))


def load_digits(seed: int) -> ImageData:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8, three quarters of each class for training."""
    try:
        from sklearn import datasets
    except ImportError:
        raise ValueError("dataset='digits' needs scikit-learn: pip install fedlscl[digits]") from None
    pixels, digits = datasets.load_digits(return_X_y=True)  # (1797, 64) in 0..16
    grey = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8))
    images = grey.view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.astype(np.int64))
    train, test = split_per_class(labels.numpy(), DIGITS_TRAIN_FRACTION, seed)
    names = tuple(str(digit) for digit in range(10))
    return ImageData("digits", images[train], labels[train], images[test], labels[test], names)


def make_fake(num_classes: int, train_per_class: int, test_per_class: int, size: int, seed: int) -> ImageData:
    """Noise over a colour and a grating that depend on the class: learnable, and made in no time."""
    if num_classes < 1:
        raise ValueError(f"fake_classes={num_classes}: use 1 or more")
    random = np.random.default_rng(seed)
    colour = random.uniform(60, 195, (num_classes, 3, 1, 1))
    waves = random.uniform(-3, 3, (num_classes, 2, 1, 1))
    row, column = np.mgrid[:size, :size] / size * 2 * np.pi
    pattern = colour + 40 * np.sin(waves[:, :1] * row + waves[:, 1:] * column)  # (num_classes, 3, size, size)

    def draw(per_class: int) -> tuple[Tensor, Tensor]:
        labels = np.repeat(np.arange(num_classes), per_class)
        noise = random.standard_normal((len(labels), 3, size, size), dtype=np.float32) * 20
        images = np.clip(pattern[labels] + noise, 0, 255).astype(np.uint8)
        return torch.from_numpy(images), torch.from_numpy(labels)

    names = tuple(f"fake{label}" for label in range(num_classes))
    return ImageData("fake", *draw(train_per_class), *draw(test_per_class), names)


def _needed(root: str | None, dataset: str) -> Path:
    if root is None:
        raise ValueError(f"dataset={dataset!r} is read from a folder: set root to it")
    return Path(root).expanduser()
