"""Data sets: `ImageSource` and one class per built-in data set, with the short names of ``data.dataset``."""

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from fedlscl.data.images import Files, centre_crop, decode, imagenet_r_folder, list_folder
from fedlscl.data.loader import ImageData, check_integers, choose_per_class
from fedlscl.options import Count, Interval, Whole, check_options

MAX_SIDE = 4096
Side = Annotated[int, Interval(f"[1, {MAX_SIDE}]")]
"""Side of an image in pixels; the limit is ours."""
SEED = 0
"""Of the choice of samples: not the seed of a run, so that all runs have the same test set (ours)."""


class ImageSource(ABC):
    """Where images and labels come from. Subclass it to add a data set; nothing has to be registered.

    Example:
        >>> class Grey(ImageSource):
        ...     def load(self):
        ...         images, labels = torch.full((4, 3, 8, 8), 128, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
        ...         return ImageData("grey", images, labels, images, labels, ("cat", "dog"))
        >>> load_images(Grey(), train_per_class=1).train_labels
        tensor([0, 1])
    """

    @property
    def name(self) -> str:
        """What results and manifests call the data set: the name of the class."""
        return type(self).__name__

    @abstractmethod
    def load(self) -> ImageData:
        """Read all images and labels, once for each datamodule; a ValueError says what is missing or damaged."""


def load_images(
    dataset: str | ImageSource,
    root: str | None = None,
    image_size: int | None = None,
    *,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    download: bool = False,
    cache_dir: str | None = None,
    fake_classes: int = 12,
    seed: int = SEED,
) -> ImageData:
    """Load a data set as uint8 images; the options are those of `SpatialTemporalDataModule`.

    The seed is that of the choice of samples. ``image_size`` left out is 224 for image folders and 32 for 'fake', which
    makes as many images of each class as ``train_per_class`` and ``test_per_class`` say, or 20 and 10.
    """
    check_integers(1, MAX_SIDE, image_size=image_size)
    check_integers(1, train_per_class=train_per_class, test_per_class=test_per_class, fake_classes=fake_classes)
    check_integers(0, seed=seed)
    if not root and dataset in ("cifar100", "imagenet-r", "folder"):
        raise ValueError(f"root must be the folder of data set {dataset!r}, got {root!r}: set root.")
    if image_size and dataset not in ("imagenet-r", "folder", "fake"):
        raise ValueError(
            f"image_size must be left out for {dataset!r}, got {image_size}: its images are kept as stored, and every "
            "net resizes them."
        )
    place, limits = root or "", (train_per_class, test_per_class)
    named: dict[str, Callable[[], ImageSource]] = {
        "cifar100": lambda: CIFAR100(place, download),
        "imagenet-r": lambda: ImageNetR(place, image_size or IMAGE_SIZE, cache_dir, *limits, seed),
        "folder": lambda: Folder(place, image_size or IMAGE_SIZE, cache_dir, *limits, seed),
        "digits": lambda: Digits(seed),
        "fake": lambda: Fake(fake_classes, image_size or FAKE_SIZE, *limits, seed),
    }
    if isinstance(dataset, ImageSource):
        source = dataset
    elif dataset in named:
        source = named[dataset]()
    elif dataset.endswith(".npz"):
        source = NpzFile(str(Path(place) / dataset))
    else:
        choices = ", ".join(map(repr, named))
        raise ValueError(f"dataset must be {choices}, the name of an .npz file or a class_path, got {dataset!r}.")
    data = source.load()
    if not isinstance(data, ImageData):
        raise ValueError(f"{type(source).__name__}.load must return ImageData, got {type(data).__name__}.")
    data = data.capped(*limits, seed)
    for part, images in (("train", data.train_images), ("test", data.test_images)):
        # A few suffice to see that they are not dark; all are read only if these are.
        if images[:: max(1, len(images) // 64)].max() <= 1 and images.max() <= 1:
            rank_zero_warn(
                f"data set {data.name!r}: {part} images must be in 0..255, got no value above 1: multiply them by 255 "
                "if they are in 0..1"
            )
    return data


@dataclass
class CIFAR100(ImageSource):
    """CIFAR-100 (Krizhevsky, 2009), 32 x 32, from torchvision's copy."""

    root: str
    """Folder that holds cifar-100-python."""
    download: bool = False
    """Fetch it if it is not there."""

    @override
    def load(self) -> ImageData:
        from torchvision.datasets import CIFAR100

        try:
            parts = CIFAR100(self.root, train=True, download=self.download), CIFAR100(self.root, train=False)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"root must hold cifar100, undamaged, got {self.root!r} ({error}): set download=true, or unpack "
                "cifar-100-python.tar.gz there."
            ) from None
        images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
        train, test = zip(images, [torch.tensor(part.targets) for part in parts], strict=True)
        return ImageData("cifar100", *train, *test, tuple(parts[0].classes))


@dataclass
class Digits(ImageSource):
    """Scikit-learn's 1,797 handwritten digits, 8 x 8, three quarters of each class for training."""

    seed: int = SEED
    """Of the choice of train images."""

    @override
    def load(self) -> ImageData:
        try:
            from sklearn import datasets
        except ImportError:
            raise ValueError("dataset 'digits' needs scikit-learn: pip install fedlscl[digits].") from None
        pixels, digits = datasets.load_digits(return_X_y=True)  # (1797, 64) in 0..16
        grey = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8))
        images, labels = grey.view(-1, 1, 8, 8).repeat(1, 3, 1, 1), torch.from_numpy(digits.astype(np.int64))
        train = choose_per_class(digits, 0.75, self.seed)
        test = np.delete(np.arange(len(digits)), train)
        return ImageData("digits", images[train], labels[train], images[test], labels[test], tuple("0123456789"))


FAKE_SIZE, MAX_FAKE_BYTES = 32, 2**31


@dataclass
class Fake(ImageSource):
    """Noise over a colour and a grating that depend on the class: learnable, and made in no time."""

    num_classes: Count = 12
    image_size: Side = FAKE_SIZE
    train_per_class: Count | None = None
    """Train images of each class, 20 if left out."""
    test_per_class: Count | None = None
    """Test images of each class, 10 if left out."""
    seed: Whole = SEED

    @override
    def load(self) -> ImageData:
        check_options(self)
        num_classes, size = self.num_classes, self.image_size
        num_train, num_test = self.train_per_class or 20, self.test_per_class or 10
        if (needed := num_classes * (num_train + num_test) * 3 * size**2) > MAX_FAKE_BYTES:
            raise ValueError(
                f"fake images must take at most {MAX_FAKE_BYTES:,} bytes, got {needed:,}: lower image_size, "
                "train_per_class, test_per_class or fake_classes."
            )
        random = np.random.default_rng(self.seed)
        colour = random.uniform(60, 195, (num_classes, 3, 1, 1))
        waves = random.uniform(-3, 3, (num_classes, 2, 1, 1))
        row, column = np.mgrid[:size, :size] / size * 2 * np.pi
        pattern = colour + 40 * np.sin(waves[:, :1] * row + waves[:, 1:] * column)  # (num_classes, 3, size, size)

        def draw(per_class: int) -> tuple[Tensor, Tensor]:
            labels = np.repeat(np.arange(num_classes), per_class)
            noise = random.standard_normal((len(labels), 3, size, size), dtype=np.float32) * 20
            images = np.clip(pattern[labels] + noise, 0, 255).astype(np.uint8)
            return torch.from_numpy(images), torch.from_numpy(labels)

        return ImageData("fake", *draw(num_train), *draw(num_test), tuple(f"fake{n}" for n in range(num_classes)))


@dataclass
class TorchDatasets(ImageSource):
    """Two datasets of torchvision, or any two ``torch.utils.data.Dataset`` with items (image, label).

    Images are PIL images or uint8 tensors (1 or 3, height, width), so leave out transforms such as ``ToTensor``.
    Labels are integers from 0.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
        >>> pairs = TensorDataset(images, labels)
        >>> TorchDatasets(pairs, pairs, class_names=("cat", "dog")).load().train_images.shape
        torch.Size([4, 3, 8, 8])
    """

    train: Dataset
    test: Dataset
    class_names: Sequence[str] | None = None
    """In label order; left out, ``train.classes`` if it has them, else the numbers of the classes."""
    image_size: Side | None = None
    """Side in pixels to which PIL images are resized (shorter side) and cropped; left out, all have one size."""
    title: str = ""
    """What results and manifests call the data set; left out, the name of the class of ``train``."""

    @property
    @override
    def name(self) -> str:
        return self.title or type(self.train).__name__

    @override
    def load(self) -> ImageData:
        check_options(self)
        train, test = self._read(self.train, "train"), self._read(self.test, "test")
        names = self.class_names or getattr(self.train, "classes", None) or range(int(train[1].max()) + 1)
        return ImageData(self.name, *train, *test, tuple(map(str, names)), is_cropped=self.image_size is not None)

    def _read(self, dataset: Any, part: str) -> tuple[Tensor, Tensor]:
        pairs = [dataset[index] for index in range(len(dataset))]
        images = [self._image(image, f"image {n} of {part}") for n, (image, _) in enumerate(pairs)]
        shapes = sorted({tuple(image.shape[1:]) for image in images})
        if len(shapes) != 1:
            found = " and ".join(map(str, shapes[:2])) or "none"
            raise ValueError(f"{part} images of {self.name!r} must have one size, got {found}: set image_size.")
        return torch.stack(images), torch.tensor([int(label) for _, label in pairs])

    def _image(self, image: Any, what: str) -> Tensor:
        if isinstance(image, Image.Image):
            image = image.convert("RGB")
            height, width = (self.image_size,) * 2 if self.image_size else (image.height, image.width)
            return torch.from_numpy(centre_crop(image, height, width).copy())  # Pillow's own memory is read-only
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) in (1, 3):
            return image.expand(3, -1, -1)
        kind = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"{what} must be a PIL image or a uint8 tensor (1 or 3, height, width), got {kind}: leave out transforms "
            "such as ToTensor."
        )


IMAGE_SIZE = 224


@dataclass
class Folder(ImageSource):
    """``root/train/<class>/*`` with test, val, valid or validation beside it, else ``root/<class>/*`` split 80/20.

    Classes are numbered by their sorted folder names. Images are resized (shorter side) and centre-cropped.
    """

    root: str
    image_size: Side = IMAGE_SIZE
    cache_dir: str | None = None
    """Folder of decoded images, ~/.cache/fedlscl if left out."""
    train_per_class: Count | None = None
    """At most so many train images of each class, chosen before they are decoded."""
    test_per_class: Count | None = None
    seed: Whole = SEED
    """Of the choice of images."""

    @override
    def load(self) -> ImageData:
        return self._load(Path(self.root).expanduser(), "folder")

    def _load(self, root: Path, name: str) -> ImageData:
        check_options(self)
        class_names, train, test = list_folder(root, self.seed)

        def decoded(files: Files, limit: int | None) -> tuple[Tensor, Tensor]:
            labels = np.array([label for _, label in files], dtype=np.int64)
            chosen = choose_per_class(labels, limit, self.seed)
            images = decode([files[n][0] for n in chosen], self.image_size, self.cache_dir)
            return images, torch.from_numpy(labels[chosen])

        parts = *decoded(train, self.train_per_class), *decoded(test, self.test_per_class)
        return ImageData(name, *parts, tuple(class_names), is_cropped=True)


class ImageNetR(Folder):
    """ImageNet-R (Hendrycks et al., ICCV 2021) as unpacked: root, or root/imagenet-r, with 200 class folders."""

    @override
    def load(self) -> ImageData:
        return self._load(imagenet_r_folder(Path(self.root).expanduser()), "imagenet-r")


KEYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass
class NpzFile(ImageSource):
    """An .npz file with uint8 images (N, H, W[, 1 or 3]) and labels (N,) or (N, 1); never unpickles.

    Its arrays are those of MedMNIST: train_images, train_labels, test_images and test_labels; an optional class_names
    gives the names in label order.
    """

    path: str

    @override
    def load(self) -> ImageData:
        path = Path(self.path).expanduser()
        arrays = _read_npz(path)
        train, test = _npz_part(arrays, "train", path), _npz_part(arrays, "test", path)
        names = arrays.get("class_names", np.arange(len(train[1].unique())))
        if names.ndim != 1 or names.dtype.kind not in "Uiu":
            raise ValueError(f"class_names of {path} must be one string per class, got {names.dtype} {names.shape}.")
        return ImageData(path.name, *train, *test, tuple(map(str, names)))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: set root to its folder and dataset to its name.")
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file) as stored:  # refuses pickles
            arrays = {key: stored[key] for key in (*KEYS, "class_names") if key in stored.files}
            found = ", ".join(stored.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable .npz ({reason}): save it with numpy.savez, no objects.") from None
    if missing := [key for key in KEYS if key not in arrays]:
        raise ValueError(f"{path} must have {', '.join(missing)}, got {found}: use MedMNIST's array names.")
    return arrays


def _npz_part(arrays: dict[str, np.ndarray], part: str, path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, H, W[, 1 or 3]) as (N, 3, H, W), labels (N,) or (N, 1) as (N,); `ImageData` checks the rest."""
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    if images.dtype != np.uint8:
        raise ValueError(f"{part}_images of {path} must be uint8 in 0..255, got {images.dtype}.")
    if images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)) or 0 in images.shape:
        shapes = "(N, H, W), (N, H, W, 1) or (N, H, W, 3)"
        raise ValueError(f"{part}_images of {path} must have shape {shapes}, got {images.shape}.")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{part}_labels of {path} must be integers, got {labels.dtype}.")
    if (largest := labels.max(initial=0)) > np.iinfo(np.int64).max:
        raise ValueError(f"{part}_labels of {path} must be numbered from 0, got {largest}: correct the labels.")
    pixels = torch.from_numpy(images).view(*images.shape[:3], -1).permute(0, 3, 1, 2)
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
    return pixels.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels.astype(np.int64))
