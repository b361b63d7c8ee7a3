"""Decode image files once, into a .npy file that later runs map into memory."""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor

CACHE_DIR = "~/.cache/fedlscl"


def decode(files: list[Path], root: Path, image_size: int, cache_dir: str | None) -> Tensor:
    """Images (N, 3, image_size, image_size) uint8, mapped from the cache; decoded on first use.

    Args:
        files: the images, in order.
        root: folder that all files are in; names below it, sizes, times and image_size identify the cached file.
        image_size: shorter side after resizing (bicubic) and side of the centre crop, in pixels.
        cache_dir: folder of the cached files.

    Raises:
        ValueError: if an image cannot be read, or the cache has no room.
    """
    if image_size < 1:
        raise ValueError(f"image_size={image_size}: use 1 or more pixels")
    folder = Path(cache_dir or CACHE_DIR).expanduser()
    cached = folder / f"{_key(files, root, image_size)}.npy"
    if not cached.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(files, image_size, cached)
    # Copy on write: nothing that happens to the tensor reaches the file.
    return torch.from_numpy(np.load(cached, mmap_mode="c"))


def _key(files: list[Path], root: Path, image_size: int) -> str:
    stats = [(file, file.stat()) for file in files]
    described = [(file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return hashlib.sha256(json.dumps([image_size, described]).encode()).hexdigest()[:32]


def _write(files: list[Path], image_size: int, cached: Path) -> None:
    shape = (len(files), 3, image_size, image_size)
    needed, free = int(np.prod(shape)), shutil.disk_usage(cached.parent).free
    # Writing a mapped file on a full disk kills the process.
    if needed > free:
        raise ValueError(
            f"cache_dir {cached.parent} has {free / 1e9:.1f} GB free, but {len(files)} images need "
            f"{needed / 1e9:.1f} GB: set another cache_dir or a smaller image_size"
        )
    rank_zero_info(f"Decoding {len(files)} images once, into {cached}")
    temporary = cached.with_name(f"{cached.stem}.{os.getpid()}.tmp")
    try:
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)

        def store(index: int) -> None:
            images[index] = decode_one(files[index], image_size)

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(store, range(len(files))):
                pass
        images.flush()
        temporary.replace(cached)
    finally:
        temporary.unlink(missing_ok=True)


def decode_one(file: Path, image_size: int) -> np.ndarray:
    """One image as (3, image_size, image_size) uint8: shorter side resized (bicubic), centre cropped.

    Raises:
        ValueError: if it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # A decoder raises whatever it likes.
        raise ValueError(f"image {file} cannot be read ({type(error).__name__}): replace or remove it") from None
    scale = image_size / min(image.size)
    width, height = (max(image_size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image).transpose(2, 0, 1)
