"""Image folders with one folder per class."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from fedlscl.data.decode import decode
from fedlscl.data.images import ImageData
from fedlscl.data.per_class import first_per_class, split_per_class

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
        chosen = _choose(files, first_per_class(_labels(files), limit, seed))
        images = decode([path for path, _ in chosen], image_size or IMAGE_SIZE, cache_dir)
        return images, torch.from_numpy(_labels(chosen))

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
    train, test = split_per_class(_labels(files), TRAIN_FRACTION, seed)
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


def _labels(files: Files) -> np.ndarray:
    return np.array([label for _, label in files], dtype=np.int64)


def _choose(files: Files, positions: np.ndarray) -> Files:
    return [files[position] for position in positions]
