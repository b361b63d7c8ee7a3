"""Images in memory: batches, data sets, and image files decoded once."""

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

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


def decode(files: list[Path], image_size: int, cache_dir: str | None) -> Tensor:
    """Images (N, 3, image_size, image_size) uint8, mapped from the cache; decoded on first use.

    Args:
        files: the images, in order; their contents and image_size identify the cached file.
        image_size: shorter side after resizing (bicubic) and side of the centre crop, in pixels.
        cache_dir: folder of the cached files.

    Raises:
        ValueError: if an image cannot be read, or the cache has no room.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be >= 1 pixel, got {image_size}.")
    folder = Path(cache_dir or CACHE_DIR).expanduser()
    shape = (len(files), 3, image_size, image_size)
    cached = folder / f"{_key(files, image_size)}.npy"
    images = _mapped(cached, shape)
    if images is None:
        folder.mkdir(parents=True, exist_ok=True)
        _write(files, shape, cached)
        images = np.load(cached, mmap_mode="c")
    return torch.from_numpy(images)


def _key(files: list[Path], image_size: int) -> str:
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(lambda file: hashlib.sha256(file.read_bytes()).hexdigest(), files))
    return hashlib.sha256(json.dumps([VERSION, image_size, contents]).encode()).hexdigest()[:32]


def _mapped(cached: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached images; None if the file is absent, truncated or has another shape."""
    try:
        # Copy on write: changes to the tensor do not reach the file.
        images = np.lib.format.open_memmap(cached, mode="c")
    except Exception:  # A damaged header raises more than numpy documents.
        return None
    return images if images.dtype == np.uint8 and images.shape == shape and images.flags.c_contiguous else None


def _write(files: list[Path], shape: tuple[int, ...], cached: Path) -> None:
    needed, free = int(np.prod(shape)), shutil.disk_usage(cached.parent).free
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
            images[index] = decode_one(files[index], shape[-1])

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(store, range(len(files))):
                pass
        images.flush()
        temporary.replace(cached)
    finally:
        temporary.unlink(missing_ok=True)


def decode_one(file: Path, height: int, width: int | None = None) -> np.ndarray:
    """One image as (3, height, width) uint8, see `read_image` and `centre_crop`.

    Raises:
        ValueError: if it cannot be read.
    """
    return centre_crop(read_image(file), height, width or height)


def centre_crop(image: "Image", height: int, width: int) -> np.ndarray:
    """An RGB image resized (bicubic) until it covers height x width, then cropped: (3, height, width) uint8.

    An image of that size stays as it is.
    """
    from PIL.Image import Resampling

    size = covering(image, height, width)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = image.resize(size, Resampling.BICUBIC).crop((left, top, left + width, top + height))
    return np.asarray(image).transpose(2, 0, 1)


def covering(image: "Image", height: int, width: int) -> tuple[int, int]:
    """The smallest (width, height) of the image's aspect ratio that covers height x width; the rest is cropped."""
    scale = max(width / image.width, height / image.height)
    return max(width, round(image.width * scale)), max(height, round(image.height * scale))


def read_image(file: Path) -> "Image":
    """An image file as 8-bit RGB, its first frame or page, turned upright as its EXIF orientation says.

    Transparent parts become white. 16-bit grey levels are divided by 257, 12-bit levels of TIFF by 4095 / 255. Colour
    profiles are not applied. All of this is our choice.

    Raises:
        ValueError: if the file cannot be read, is too large for Pillow, has signed, 32-bit or floating-point pixels, or
            has alpha 0 everywhere over varying colours.
    """
    from PIL import Image

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


def _error(image: "Image", rule: str) -> str | None:
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


def _upright(image: "Image") -> "Image":
    """Transposed by its EXIF orientation; Pillow's exif_transpose also rewrites the EXIF data, which may fail."""
    from PIL.Image import Transpose

    turns = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # Damaged EXIF data: viewers show the pixels as stored, too.
        return image
    if isinstance(orientation, int) and 2 <= orientation <= 8:
        return image.transpose(Transpose[turns[orientation - 2]])
    return image


def _rgb(image: "Image", rule: str, raw: Any) -> "Image":
    """Convert to RGB; ``raw`` is Pillow's name of the pixels as stored, which tells the range of PNG's tRNS value."""
    from PIL import Image

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
