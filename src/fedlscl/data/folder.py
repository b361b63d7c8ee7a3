"""Image folders with one folder per class."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlscl.data.decode import decode
from fedlscl.data.images import ImageData
from fedlscl.data.per_class import first_per_class, split_per_class

IMAGE_SIZE = 224
TRAIN_FRACTION = 0.8
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
IMAGENET_R_CLASSES = 200

Files = list[tuple[Path, int]]
"""Images with their labels."""


def load_folder(
    name: str,
    root: Path,
    image_size: int | None,
    cache_dir: str | None,
    train_per_class: int | None,
    test_per_class: int | None,
    seed: int,
) -> ImageData:
    """Load ``root/train/<class>/*`` with ``root/test`` or ``root/val``, else ``root/<class>/*`` split 80/20.

    Classes are numbered by their sorted folder names. Images are resized (shorter side) and centre-cropped.

    Raises:
        ValueError: if a folder is missing or empty, or an image cannot be read.
    """
    classes, train, test = _list_parts(root) if (root / "train").is_dir() else _list_split(root, seed)

    def load(files: Files, limit: int | None) -> tuple[Tensor, Tensor]:
        # Chosen before they are decoded.
        chosen = _choose(files, first_per_class(_labels(files), limit, seed))
        images = decode([path for path, _ in chosen], image_size or IMAGE_SIZE, cache_dir)
        return images, torch.from_numpy(_labels(chosen))

    return ImageData(name, *load(train, train_per_class), *load(test, test_per_class), tuple(classes))


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
    test = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    if test is None:
        raise ValueError(f"{root} has train but neither test nor val: add one, or set root to {train}")
    classes = _class_folders(train)
    unknown = sorted(set(_class_folders(test)) - set(classes))
    if unknown:
        raise ValueError(f"{test / unknown[0]} has no counterpart in {train}: add it or remove the class")
    return classes, _list_images(train, classes, at_least=1), _list_images(test, classes, at_least=1)


def _list_split(root: Path, seed: int) -> tuple[list[str], Files, Files]:
    classes = _class_folders(root)
    files = _list_images(root, classes, at_least=2)
    train, test = split_per_class(_labels(files), TRAIN_FRACTION, seed)
    return classes, _choose(files, train), _choose(files, test)


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"image folder {folder} is missing: set root to a folder with one folder of images per class")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"image folder {folder} is empty: put one folder of images per class into it")
    return names


def _list_images(folder: Path, classes: list[str], at_least: int) -> Files:
    files = []
    for label, name in enumerate(classes):
        found = (folder / name).glob("*")
        images = [path for path in found if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
        if len(images) < at_least:
            raise ValueError(
                f"image folder {folder / name} is missing or has {len(images)} images: add at least {at_least}, "
                "or remove the class"
            )
        files += [(path, label) for path in sorted(images)]
    return files


def _labels(files: Files) -> np.ndarray:
    return np.array([label for _, label in files], dtype=np.int64)


def _choose(files: Files, positions: np.ndarray) -> Files:
    return [files[position] for position in positions]
