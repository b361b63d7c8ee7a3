"""The data sets by name."""

from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from fedlscl.data.folder import imagenet_r_folder, load_folder
from fedlscl.data.images import ImageData
from fedlscl.data.npz import load_npz
from fedlscl.data.per_class import split_per_class
from fedlscl.data.split import check_integers

NAMES = "'cifar100', 'imagenet-r', 'folder', 'digits', 'fake' or a file name that ends in .npz"
CROPPED = ("folder", "imagenet-r")
"""Data sets made from image files of any size, by `centre_crop`."""
DIGITS_TRAIN_FRACTION = 0.75
MAX_SIDE, MAX_FAKE_BYTES = 4096, 2**31
"""Largest image_size in pixels, and most bytes of 'fake' images (ours)."""
SAMPLE = 64
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
        image_size: side in pixels, 1 to 4096, of 'folder', 'imagenet-r' (224) and 'fake' (32) images; the others stay
            as stored.
        train_per_class: keep at most so many train samples of each class; for 'fake' how many are made.
        test_per_class: the same for test samples.
        download: fetch 'cifar100' if it is not under root.
        cache_dir: where decoded image folders are kept, by default ~/.cache/fedlscl.
        fake_classes: number of classes of 'fake'.
        seed: of the choice of samples; not the seed of a run, so that all runs have the same test set.

    Raises:
        ValueError: if the data set is unknown, missing or broken, or a number is out of range.
    """
    check_sizes(image_size, train_per_class, test_per_class, fake_classes)
    check_integers(0, seed=seed)
    if dataset in CROPPED:
        folder = _needed(root, dataset)
        folder = imagenet_r_folder(folder) if dataset == "imagenet-r" else folder
        data = load_folder(dataset, folder, image_size, cache_dir, train_per_class, test_per_class, seed)
    elif dataset == "fake":
        num_train = FAKE_TRAIN if train_per_class is None else train_per_class
        num_test = FAKE_TEST if test_per_class is None else test_per_class
        data = make_fake(fake_classes, num_train, num_test, image_size or FAKE_SIZE, seed)
    elif image_size is not None:
        raise ValueError(
            f"image_size={image_size}: {dataset!r} is kept as stored and every net resizes for itself: leave it out"
        )
    elif dataset == "cifar100":
        data = load_cifar100(_needed(root, dataset), download).capped(train_per_class, test_per_class, seed)
    elif dataset == "digits":
        data = load_digits(seed).capped(train_per_class, test_per_class, seed)
    elif dataset.endswith(".npz"):
        data = load_npz(Path(root or "").expanduser() / dataset).capped(train_per_class, test_per_class, seed)
    else:
        raise ValueError(f"dataset={dataset!r} is unknown: use {NAMES}")
    for part, images in (("train", data.train_images), ("test", data.test_images)):
        # A few suffice to see that they are not dark; all are read only where these are.
        if images[:: max(1, len(images) // SAMPLE)].max() <= 1 and images.max() <= 1:
            rank_zero_warn(
                f"data set {dataset!r}: {part} images must be in 0..255, got no value above 1: multiply them by 255 if "
                "they are in 0..1"
            )
    return data


def check_sizes(
    image_size: int | None, train_per_class: int | None, test_per_class: int | None, fake_classes: int
) -> None:
    """Refuse numbers that no data set can have.

    Raises:
        ValueError: naming the first such option.
    """
    check_integers(1, MAX_SIDE, image_size=image_size)
    check_integers(1, train_per_class=train_per_class, test_per_class=test_per_class, fake_classes=fake_classes)


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
    check_integers(1, fake_classes=num_classes)
    needed = num_classes * max(1, train_per_class + test_per_class) * 3 * size**2
    if needed > MAX_FAKE_BYTES:
        raise ValueError(
            f"fake images must take at most {MAX_FAKE_BYTES:,} bytes, got {needed:,}: lower image_size, "
            "train_per_class, test_per_class or fake_classes"
        )
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
    if not root:
        raise ValueError(f"dataset={dataset!r} is read from a folder: set root to it")
    return Path(root).expanduser()
