"""Image folders: one folder per class, listed before anything is decoded."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning.fabric.utilities import rank_zero_warn

from fedlscl.data.loader import split_per_class

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

Files = list[tuple[Path, int]]
"""Images with their labels."""


def list_folder(root: Path, seed: int) -> tuple[list[str], Files, Files]:
    """Class names, train images and test images of `Folder`.

    Warns in one line of other files and folders beside the images, which are left out.

    Raises:
        ValueError: if a folder is missing or has too few images.
    """
    if not (root / "train").is_dir():
        return _list_split(root, seed)
    # Images directly in it, and no other part beside it: a class of that name, as CIFAR-100 has one.
    images, folders, _ = contents(root / "train")
    is_class = images and not folders and not any(part_meant(path.name, "test", "val") for path in root.iterdir())
    return _list_split(root, seed) if is_class else _list_parts(root)


def _list_parts(root: Path) -> tuple[list[str], Files, Files]:
    train = root / "train"
    test = next((root / part for part in TEST_PARTS if (root / part).is_dir()), None)
    images, folders, _ = contents(root)
    if test is None:
        meant = [(path.name, part) for path in folders if (part := part_meant(path.name, "test", "val"))]
        hint = f"did you mean {meant[0][1]}? rename {meant[0][0]}" if meant else f"add one, or set root to {train}"
        raise ValueError(f"{root} has train but neither test nor val: {hint}.")
    classes = _class_folders(train)
    if unknown := sorted(set(_class_folders(test)) - set(classes)):
        raise ValueError(f"{test / unknown[0]} has no counterpart in {train}: add it or remove the class.")
    (train_files, left_out), (test_files, others) = (_list_images(part, classes, at_least=1) for part in (train, test))
    beside = [*images, *(path for path in folders if path not in (train, test))]
    _warn_left_out(root, [*beside, *left_out, *others])
    return classes, train_files, test_files


def _list_split(root: Path, seed: int) -> tuple[list[str], Files, Files]:
    classes = _class_folders(root)
    files, left_out = _list_images(root, classes, at_least=2)
    if len(classes) > 1 and all(map(part_meant, classes)):
        raise ValueError(
            f"{root} must hold one folder of images per class, got {', '.join(classes)}: name these folders train and "
            "test, and put one folder of images per class into each."
        )
    _warn_left_out(root, left_out)
    train, test = split_per_class(np.array([label for _, label in files]), 0.8, seed)
    return classes, [files[n] for n in train], [files[n] for n in test]


def imagenet_r_folder(root: Path) -> Path:
    """The folder of the 200 classes of ImageNet-R: root, or root/imagenet-r."""
    root = root / "imagenet-r" if (root / "imagenet-r").is_dir() else root
    if (found := len(_class_folders(root))) != 200:
        raise ValueError(
            f"{root} must have the 200 class folders of ImageNet-R, got {found}: unpack imagenet-r.tar there, or use "
            "dataset 'folder' for a part of it."
        )
    return root


def find_images(root: Path) -> list[Path]:
    """All images below a folder, sorted; each folder is read once, also if symbolic links lead to it again."""
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


def part_meant(name: str, *parts: str) -> str | None:
    """The part that a folder called Train, testing or val_images was meant to be, if it is one of ``parts`` (all)."""
    found = PART.fullmatch(name.casefold())
    return found[1] if found and (not parts or found[1] in parts) else None


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "is missing"
        raise ValueError(f"image folder {folder} {state}: set root to a folder with one folder of images per class.")
    found = contents(folder)
    if not found.folders:
        state = f"has {len(found.images)} images but no folder" if found.images else "is empty"
        raise ValueError(f"image folder {folder} {state}: put one folder of images per class into it.")
    return [path.name for path in found.folders]


def _list_images(folder: Path, classes: list[str], at_least: int) -> tuple[Files, list[Path]]:
    """Images of all classes with their labels, and what is left out."""
    files, left_out = [], contents(folder).images
    for label, name in enumerate(classes):
        path = folder / name
        if not path.is_dir():
            raise ValueError(f"image folder {path} is missing: add it, or remove the class from train.")
        images, folders, others = contents(path)
        if len(images) < at_least:
            beside = f" beside {_named(path, [*folders, *others])}" if folders or others else ""
            meant = part_meant(name) if folders and not images else None
            fix = f"did you mean {meant}? rename it" if meant else "add images, or remove the class"
            raise ValueError(
                f"image folder {path} must hold {at_least} or more images ({ENDINGS}), got {len(images)}{beside}: "
                f"{fix}."
            )
        files += [(image, label) for image in images]
        left_out += [*folders, *others]
    return files, left_out


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
