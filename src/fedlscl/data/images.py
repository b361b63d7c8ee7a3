"""Image files: which images of a folder are of which class, and their pixels, decoded once."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor

from fedlscl.data.loader import choose_per_class

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ENDINGS = ", ".join(SUFFIXES)
SYSTEM_NAMES = {
    *("__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information"),
    *("lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
"""What operating systems and network storage put beside images, in lower case; hidden names begin with a dot."""
TEST_PARTS = ("test", "val", "valid", "validation")
"""Names of the folder of test images; the first that exists is used."""
PART = re.compile(r"(train|test|val)(s|ing|id|idation)?([-_ ]?(set|data|images))?[-_ ]?\d*")
CACHE_DIR = "~/.cache/fedlscl"
VERSION = 2
"""Part of every cached file's name: raise it whenever the pixels of any file change."""
OPAQUE, ALPHA, GREY16, REFUSED = "opaque", "alpha", "16-bit grey", "refused"
MODES: dict[str, str] = {
    **dict.fromkeys(("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"), OPAQUE),
    **dict.fromkeys(("LA", "La", "PA", "RGBA", "RGBa"), ALPHA),
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), GREY16),
    **dict.fromkeys(("I", "F"), REFUSED),
}
"""How each of Pillow's modes becomes RGB; a mode that is not listed is refused."""
Files = list[tuple[Path, int]]
"""Images with their labels."""


def list_folder(root: Path, seed: int) -> tuple[list[str], Files, Files]:
    """Class names, train images and test images of `Folder`; a warning counts what lies beside them and is left out."""
    train = root / "train"
    if train.is_dir():
        images, folders, _ = contents(train)
        # Images directly in it, and no other part beside it: a class of that name, as CIFAR-100 has one.
        if folders or not images or any(part_meant(path.name) in ("test", "val") for path in root.iterdir()):
            return _list_parts(root, train)
    classes, files, left_out = _list_images(root, at_least=2)
    if len(classes) > 1 and all(map(part_meant, classes)):
        raise ValueError(
            f"{root} must hold one folder of images per class, got {', '.join(classes)}: name these folders train and "
            "test, and put one folder of images per class into each."
        )
    _warn_left_out(root, left_out)
    chosen = choose_per_class(np.array([label for _, label in files]), 0.8, seed)
    rest = np.delete(np.arange(len(files)), chosen)
    return classes, [files[n] for n in chosen], [files[n] for n in rest]


def _list_parts(root: Path, train: Path) -> tuple[list[str], Files, Files]:
    test = next((root / part for part in TEST_PARTS if (root / part).is_dir()), None)
    images, folders, _ = contents(root)
    if test is None:
        meant = [(path.name, part) for path in folders if (part := part_meant(path.name)) in ("test", "val")]
        hint = f"did you mean {meant[0][1]}? rename {meant[0][0]}" if meant else f"add one, or set root to {train}"
        raise ValueError(f"{root} has train but neither test nor val: {hint}.")
    classes, train_files, left_out = _list_images(train)
    _, test_files, others = _list_images(test, classes)
    beside = [path for path in folders if path not in (train, test)]
    _warn_left_out(root, [*images, *beside, *left_out, *others])
    return classes, train_files, test_files


def _list_images(folder: Path, classes: Sequence[str] = (), at_least: int = 1) -> tuple[list[str], Files, list[Path]]:
    """Class names, images with their labels and what is left out; ``classes`` are those of the train images."""
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "is missing"
        raise ValueError(f"image folder {folder} {state}: set root to a folder with one folder of images per class.")
    left_out, folders, _ = contents(folder)
    if not folders:
        state = f"has {len(left_out)} images but no folder" if left_out else "is empty"
        raise ValueError(f"image folder {folder} {state}: put one folder of images per class into it.")
    names = [path.name for path in folders]
    if classes and (unknown := sorted(set(names) - set(classes))):
        raise ValueError(f"{folder / unknown[0]} has no counterpart in train: add it or remove the class.")
    files = []
    for label, name in enumerate(classes or names):
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
    return names, files, left_out


def imagenet_r_folder(root: Path) -> Path:
    """The folder of the 200 classes of ImageNet-R: root, or root/imagenet-r."""
    root = root / "imagenet-r" if (root / "imagenet-r").is_dir() else root
    if (found := len(contents(root).folders) if root.is_dir() else 0) != 200:
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


def part_meant(name: str) -> str | None:
    """The part, train, test or val, that a folder called Train, testing or val_images was meant to be."""
    found = PART.fullmatch(name.casefold())
    return found[1] if found else None


def _warn_left_out(
    root: Path, left_out: list[Path], where: str = " and lie directly in the folder of their class"
) -> None:
    if left_out:
        rank_zero_warn(f"{root}: left out {_named(root, left_out)}; images end in {ENDINGS}{where}")


def _named(root: Path, paths: list[Path]) -> str:
    """How many files and folders, and the first three by name."""
    folders = sum(path.is_dir() for path in paths)
    counts = (len(paths) - folders, "file"), (folders, "folder")
    total = " and ".join(f"{count:,} {word}{'s' * (count > 1)}" for count, word in counts if count)
    names = ", ".join(f"{path.relative_to(root)}{'/' * path.is_dir()}" for path in paths[:3])
    return f"{total} ({names}{', ...' * (len(paths) > 3)})"


def decode(files: list[Path], image_size: int, cache_dir: str | None) -> Tensor:
    """Images (N, 3, image_size, image_size) uint8 of `centre_crop`, mapped from the cache; decoded on first use.

    The contents and the order of the files, and image_size, identify the cached file.
    """
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(lambda file: hashlib.sha256(file.read_bytes()).hexdigest(), files))
    key = hashlib.sha256(json.dumps([VERSION, image_size, hashes]).encode()).hexdigest()[:32]
    cached = Path(cache_dir or CACHE_DIR).expanduser() / f"{key}.npy"
    shape = (len(files), 3, image_size, image_size)
    images = _mapped(cached, shape)
    if images is None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        _write(files, shape, cached)
        images = np.load(cached, mmap_mode="c")
    return torch.from_numpy(images)


def _mapped(cached: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached images; None if the file is absent, truncated or has another shape."""
    try:
        # Copy on write: changes to the tensor do not reach the file.
        images = np.lib.format.open_memmap(cached, mode="c")
    except Exception:  # A damaged header raises more than numpy documents.
        return None
    return images if images.dtype == np.uint8 and images.shape == shape and images.flags.c_contiguous else None


def _write(files: list[Path], shape: tuple[int, ...], cached: Path) -> None:
    needed, free = math.prod(shape), shutil.disk_usage(cached.parent).free
    # Writing a mapped file on a full disk kills the process.
    if needed > free:
        raise ValueError(
            f"cache_dir {cached.parent} has {free / 1e9:.1f} GB free, but {len(files)} images need "
            f"{needed / 1e9:.1f} GB: set another cache_dir or a smaller image_size."
        )
    rank_zero_info(f"Decoding {len(files)} images once, into {cached}")
    temporary = cached.with_name(f"{cached.stem}.{os.getpid()}.tmp")
    try:
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)

        def store(index: int) -> None:
            images[index] = centre_crop(read_image(files[index]), *shape[2:])

        with ThreadPoolExecutor() as pool:
            list(pool.map(store, range(len(files))))  # raises what a thread raised
        images.flush()
        temporary.replace(cached)
    finally:
        temporary.unlink(missing_ok=True)


def centre_crop(image: Image.Image, height: int, width: int) -> np.ndarray:
    """An RGB image resized (bicubic) until it covers height x width, then cropped: (3, height, width) uint8.

    An image of that size stays as it is.
    """
    size = covering(image, height, width)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    return np.asarray(image).transpose(2, 0, 1)


def covering(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """The smallest (width, height) of the image's aspect ratio that covers height x width; the rest is cropped."""
    scale = max(width / image.width, height / image.height)
    return max(width, round(image.width * scale)), max(height, round(image.height * scale))


def read_image(file: Path) -> Image.Image:
    """An image file as 8-bit RGB, its first frame or page, turned upright as its EXIF orientation says.

    Transparent parts become white. 16-bit grey levels are divided by 257, 12-bit levels of TIFF by 4095 / 255. Colour
    profiles are not applied. Signed, 32-bit and floating-point pixels are refused, and alpha 0 everywhere over varying
    colours. All of this is our choice.
    """
    try:
        # Given a path, Pillow maps uncompressed TIFF files into memory, and scrambles those with an orientation.
        with file.open("rb") as stream, Image.open(stream) as opened:
            tiles = getattr(opened, "tile", None)
            raw = tiles[0].args if tiles else None
            opened.load()
            rule = MODES.get(opened.mode, REFUSED)
            flaw = _error(opened, rule)
            image = opened if flaw else _rgb(_upright(opened), rule, raw)
    except Image.DecompressionBombError as error:
        pixels, limit, *_ = map(int, re.findall(r"\d+", str(error)))
        raise ValueError(f"image {file} must have at most {limit:,} pixels, got {pixels:,}: reduce its size.") from None
    except Exception as error:  # A decoder may raise anything.
        raise ValueError(f"image {file} cannot be read ({type(error).__name__}): replace or remove it.") from None
    if flaw:
        raise ValueError(f"image {file} {flaw}")
    return image


def _error(image: Image.Image, rule: str) -> str | None:
    """Why an image cannot become RGB, and the fix."""
    if rule == REFUSED:
        return (
            f"must have 8-bit channels or 16-bit unsigned grey levels, got Pillow's mode {image.mode!r} "
            "(signed, 32-bit or floating-point pixels): scale it to 0..255 and save it as 8-bit PNG."
        )
    if rule == ALPHA:
        *colours, (_, opacity) = cast(tuple[tuple[int, int], ...], image.getextrema())
        if opacity == 0 and any(low != high for low, high in colours):
            return "must have visible pixels, got alpha 0 everywhere over varying colours: save it without alpha."
    return None


def _upright(image: Image.Image) -> Image.Image:
    """Transposed by its EXIF orientation; Pillow's exif_transpose also rewrites the EXIF data, which may fail."""
    turns = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # Damaged EXIF data: viewers show the pixels as stored, too.
        return image
    if isinstance(orientation, int) and 2 <= orientation <= 8:
        return image.transpose(Image.Transpose[turns[orientation - 2]])
    return image


def _rgb(image: Image.Image, rule: str, raw: Any) -> Image.Image:
    """Convert to RGB; ``raw`` is Pillow's name of the pixels as stored, which tells the range of PNG's tRNS value."""
    transparent: Any = image.info.get("transparency")
    if rule == GREY16:
        # Pillow clips 16-bit levels to 255 and takes TIFF's WhiteIsZero for BlackIsZero.
        levels, tags = np.asarray(image).astype(np.uint32), getattr(image, "tag_v2", {})
        bits = tags.get(258, (16,))[0]
        eight = (levels * 510 + 2**bits - 1) // (2 * (2**bits - 1))
        eight = 255 - eight if tags.get(262) == 0 else eight
        eight = eight if transparent is None else np.where(levels == transparent, 255, eight)
        return Image.fromarray(eight.astype(np.uint8)).convert("RGB")
    if rule == OPAQUE and transparent is None:
        return image.convert("RGB")
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[raw]
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in transparent)
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
