from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[2].parent / "shared/data"
CIFAR = "cifar100_100x30.npz"


@pytest.fixture
def cifar_root():
    """Folder with a part of the real CIFAR-100."""
    if not (SHARED / CIFAR).is_file():
        pytest.skip(f"{CIFAR} (a part of the real CIFAR-100) is not there")
    return SHARED


@pytest.fixture
def save_npz(tmp_path):
    """Write a valid .npz of four images and two classes, with some arrays replaced or, if None, left out."""

    def save(**changed):
        arrays = {
            "train_images": np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6),
            "train_labels": np.array([[0], [1], [0], [1]]),
            "test_images": np.zeros((2, 5, 6), np.uint8),
            "test_labels": np.array([[0], [1]]),
        }
        arrays = {key: array for key, array in (arrays | changed).items() if array is not None}
        np.savez(tmp_path / "small.npz", **arrays)
        return tmp_path / "small.npz"

    return save


@pytest.fixture
def save_images(tmp_path):
    """Write a tree of small images: ``save_images({"cat": 3})`` gives cat/0.png .. cat/2.png, each of its own grey."""
    from PIL import Image

    def save(counts, size=(12, 8)):
        for position, (folder, count) in enumerate(counts.items()):
            (tmp_path / "tree" / folder).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                grey = 20 * position + index
                Image.new("RGB", size, (grey, grey, grey)).save(tmp_path / "tree" / folder / f"{index}.png")
        return tmp_path / "tree"

    return save
