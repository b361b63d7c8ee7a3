"""Data sets by name: torchvision, digits, fake, .npz files and image folders."""

import re
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from fedlscl.data.images import ImageData, decode, first_per_class, split_per_class
from fedlscl.data.split import check_integers

# MedMNIST's file layout: one .npz with train_images, train_labels, test_images and test_labels.

KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def load_npz(path: Path) -> ImageData:
    """Load uint8 images (N, H, W), (N, H, W, 1) or (N, H, W, 3) and labels (N,) or (N, 1); never unpickles.

    An optional ``class_names`` gives the names in label order; ``val_images`` and ``val_labels`` are not used.

    Raises:
        ValueError: if the file is missing or broken, or an array has another name, shape or type.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: set root to its folder and dataset to its name")
    try:
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with stored:
            arrays = {key: stored[key] for key in (*KEYS, "class_names") if key in stored.files}
            found = ", ".join(stored.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable .npz ({reason}): save it with numpy.savez, no objects") from None
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} (it has {found}): use MedMNIST's array names")

    train_images, test_images = (_images(arrays[key], f"{key} of {path}") for key in ("train_images", "test_images"))
    if train_images.shape[1:] != test_images.shape[1:]:
        shapes = f"{tuple(train_images.shape[1:])} and {tuple(test_images.shape[1:])}"
        raise ValueError(f"train and test images of {path} are {shapes}: save them in one size")
    train_labels = _npz_labels(arrays["train_labels"], len(train_images), f"train_labels of {path}")
    test_labels = _npz_labels(arrays["test_labels"], len(test_images), f"test_labels of {path}")
    found = np.unique(train_labels)
    names = arrays.get("class_names", np.arange(len(found)))
    if names.ndim != 1 or names.dtype.kind not in "Uiu":
        raise ValueError(f"class_names of {path} is {names.dtype} {names.shape}: save one string per class")
    if len(found) == len(names) and found[-1] >= len(found):
        shown = ", ".join(map(str, found[:6])) + ", ..." * (len(found) > 6)
        raise ValueError(
            f"train_labels of {path} must be 0 to {len(found) - 1} without gaps, got {shown}: renumber them and "
            "test_labels, such as with numpy.unique(labels, return_inverse=True)"
        )
    for part, labels in (("train", train_labels), ("test", test_labels)):
        if (largest := int(labels.max())) >= len(names):
            remedy = "name every class" if "class_names" in arrays else "add train images of that class"
            raise ValueError(
                f"{part}_labels of {path} must be below {len(names)}, got {largest}: {remedy} or correct the labels"
            )
    class_names = tuple(str(name) for name in names)
    return ImageData(
        path.name, train_images, torch.from_numpy(train_labels), test_images, torch.from_numpy(test_labels), class_names
    )


def _images(array: np.ndarray, what: str) -> Tensor:
    """Turn (N, H, W[, 1 or 3]) into (N, 3, H, W)."""
    if array.dtype != np.uint8:
        raise ValueError(f"{what} is {array.dtype}: save uint8 in 0..255")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"{what} has shape {array.shape}: save (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
    return torch.from_numpy(array).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


def _npz_labels(array: np.ndarray, num_images: int, what: str) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} is {array.dtype}: save integers")
    if array.shape not in ((num_images,), (num_images, 1)):
        raise ValueError(f"{what} has shape {array.shape} for {num_images} images: save one label per image, (N,)")
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        worst = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"{what} must be numbered from 0, got {worst}: correct the labels")
    return array.reshape(-1).astype(np.int64)


# Image folders with one folder per class.

IMAGE_SIZE = 224
TRAIN_FRACTION = 0.8
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
ENDINGS = ", ".join(sorted(SUFFIXES))
SYSTEM_NAMES = {
    *("__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information"),
    *("lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
"""What operating systems and network storage put beside images, in lower case; hidden names begin with a dot."""
TEST_PARTS = ("test", "val", "valid", "validation")
"""Names of the folder of test images; the first that exists is used."""
PART = re.compile(r"(train|test|val)(s|ing|id|idation)?([-_ ]?(set|data|images))?[-_ ]?\d*")
IMAGENET_R_CLASSES = 200

Files = list[tuple[Path, int]]
"""Images with their labels."""


class Contents(NamedTuple):
    """What is directly in a folder, each sorted, without hidden names and `SYSTEM_NAMES`."""

    images: list[Path]
    folders: list[Path]
    others: list[Path]


def contents(folder: Path) -> Contents:
    """List a folder; an image is a file that ends in one of `SUFFIXES`, in any case."""
    found = Contents([], [], [])
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.casefold() in SYSTEM_NAMES:
            continue
        if path.is_dir():
            found.folders.append(path)
        else:
            (found.images if path.suffix.lower() in SUFFIXES else found.others).append(path)
    return found


def find_images(root: Path) -> list[Path]:
    """All images below a folder, sorted; each folder is read once, also where symbolic links lead to it again."""
    images, others, pending, seen = [], [], [root], set()
    while pending:
        folder = pending.pop()
        if (real := folder.resolve()) not in seen:
            seen.add(real)
            found = contents(folder)
            images += found.images
            others += found.others
            pending += reversed(found.folders)
    _warn_left_out(root, others, "")
    return sorted(images)


def load_folder(
    name: str,
    root: Path,
    image_size: int | None,
    cache_dir: str | None,
    train_per_class: int | None,
    test_per_class: int | None,
    seed: int,
) -> ImageData:
    """Load ``root/train/<class>/*`` with one of `TEST_PARTS` beside it, else ``root/<class>/*`` split 80/20.

    Classes are numbered by their sorted folder names. Hidden files and `SYSTEM_NAMES` are skipped. Images are resized
    (shorter side) and centre-cropped.

    Raises:
        ValueError: if a folder is missing or empty, or an image cannot be read.
    """
    classes, train, test = list_folder(root, seed)

    def load(files: Files, limit: int | None) -> tuple[Tensor, Tensor]:
        # Chosen before they are decoded.
        chosen = _choose(files, first_per_class(_folder_labels(files), limit, seed))
        images = decode([path for path, _ in chosen], image_size or IMAGE_SIZE, cache_dir)
        return images, torch.from_numpy(_folder_labels(chosen))

    return ImageData(name, *load(train, train_per_class), *load(test, test_per_class), tuple(classes))


def list_folder(root: Path, seed: int) -> tuple[list[str], Files, Files]:
    """Class names, train images and test images as `load_folder` takes them, before anything is decoded.

    Warns in one line of what is left out: other files and folders beside the images.

    Raises:
        ValueError: if a folder is missing or has too few images.
    """
    if not (root / "train").is_dir():
        return _list_split(root, seed)
    # Images directly in it, and no other part beside it: a class of that name, as CIFAR-100 has one.
    images, folders, _ = contents(root / "train")
    is_class = images and not folders and not any(part_meant(path.name, "test", "val") for path in root.iterdir())
    return _list_split(root, seed) if is_class else _list_parts(root)


def imagenet_r_folder(root: Path) -> Path:
    """ImageNet-R (Hendrycks et al., ICCV 2021) as unpacked: root, or root/imagenet-r, with 200 class folders."""
    root = root / "imagenet-r" if (root / "imagenet-r").is_dir() else root
    found = len(_class_folders(root))
    if found != IMAGENET_R_CLASSES:
        raise ValueError(
            f"{root} has {found} class folders, but ImageNet-R has {IMAGENET_R_CLASSES}: unpack imagenet-r.tar there, "
            "or use dataset 'folder' for a part of it"
        )
    return root


def _list_parts(root: Path) -> tuple[list[str], Files, Files]:
    train = root / "train"
    test = next((root / part for part in TEST_PARTS if (root / part).is_dir()), None)
    images, folders, _ = contents(root)
    beside = [*images, *(path for path in folders if path not in (train, test))]
    if test is None:
        meant = [(path.name, part) for path in folders if (part := part_meant(path.name, "test", "val"))]
        hint = f"did you mean {meant[0][1]}? rename {meant[0][0]}" if meant else f"add one, or set root to {train}"
        raise ValueError(f"{root} has train but neither test nor val: {hint}")
    classes = _class_folders(train)
    unknown = sorted(set(_class_folders(test)) - set(classes))
    if unknown:
        raise ValueError(f"{test / unknown[0]} has no counterpart in {train}: add it or remove the class")
    parts = [_list_images(part, classes, at_least=1) for part in (train, test)]
    _warn_left_out(root, [*beside, *parts[0][1], *parts[1][1]])
    return classes, parts[0][0], parts[1][0]


def _list_split(root: Path, seed: int) -> tuple[list[str], Files, Files]:
    classes = _class_folders(root)
    files, left_out = _list_images(root, classes, at_least=2)
    if len(classes) > 1 and all(map(part_meant, classes)):
        raise ValueError(
            f"{root} must hold one folder of images per class, got {', '.join(classes)}: name these folders train and "
            "test, and put one folder of images per class into each"
        )
    _warn_left_out(root, left_out)
    train, test = split_per_class(_folder_labels(files), TRAIN_FRACTION, seed)
    return classes, _choose(files, train), _choose(files, test)


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "is missing"
        raise ValueError(f"image folder {folder} {state}: set root to a folder with one folder of images per class")
    found = contents(folder)
    if not found.folders:
        state = f"has {len(found.images)} images but no folder" if found.images else "is empty"
        raise ValueError(f"image folder {folder} {state}: put one folder of images per class into it")
    return [path.name for path in found.folders]


def _list_images(folder: Path, classes: list[str], at_least: int) -> tuple[Files, list[Path]]:
    """Images of all classes with their labels, and what is left out."""
    files, left_out = [], contents(folder).images
    for label, name in enumerate(classes):
        place = folder / name
        if not place.is_dir():
            raise ValueError(f"image folder {place} is missing: add it, or remove the class from train")
        images, folders, others = contents(place)
        if len(images) < at_least:
            beside = f" beside {_named(place, [*folders, *others])}" if folders or others else ""
            meant = part_meant(name) if folders and not images else None
            remedy = f"did you mean {meant}? rename it" if meant else "add images, or remove the class"
            raise ValueError(
                f"image folder {place} must hold {at_least} or more images ({ENDINGS}), got {len(images)}{beside}: "
                f"{remedy}"
            )
        files += [(path, label) for path in images]
        left_out += [*folders, *others]
    return files, left_out


def part_meant(name: str, *parts: str) -> str | None:
    """The part that a folder called Train, testing or val_images was meant to be, if it is one of ``parts`` (all)."""
    found = PART.fullmatch(name.casefold())
    return found[1] if found and (not parts or found[1] in parts) else None


def _warn_left_out(
    root: Path, left_out: list[Path], where: str = " and lie directly in the folder of their class"
) -> None:
    if left_out:
        rank_zero_warn(f"{root}: left out {_named(root, left_out)}; images end in {ENDINGS}{where}")


def _named(root: Path, paths: list[Path]) -> str:
    """How many files and folders, and the first three by name."""
    folders = sum(path.is_dir() for path in paths)
    counts = [(len(paths) - folders, "file"), (folders, "folder")]
    total = " and ".join(f"{count:,} {word}{'s' * (count > 1)}" for count, word in counts if count)
    names = ", ".join(f"{path.relative_to(root)}{'/' * path.is_dir()}" for path in paths[:3])
    return f"{total} ({names}{', ...' * (len(paths) > 3)})"


def _folder_labels(files: Files) -> np.ndarray:
    return np.array([label for _, label in files], dtype=np.int64)


def _choose(files: Files, positions: np.ndarray) -> Files:
    return [files[position] for position in positions]


# The data sets by name.

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
