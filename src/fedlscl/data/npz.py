"""MedMNIST's file layout: one .npz with train_images, train_labels, test_images and test_labels."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlscl.data.images import ImageData

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
    train_labels = _labels(arrays["train_labels"], len(train_images), f"train_labels of {path}")
    test_labels = _labels(arrays["test_labels"], len(test_images), f"test_labels of {path}")
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


def _labels(array: np.ndarray, num_images: int, what: str) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} is {array.dtype}: save integers")
    if array.shape not in ((num_images,), (num_images, 1)):
        raise ValueError(f"{what} has shape {array.shape} for {num_images} images: save one label per image, (N,)")
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        worst = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"{what} must be numbered from 0, got {worst}: correct the labels")
    return array.reshape(-1).astype(np.int64)
