"""Your own images as an .npz in MedMNIST's layout: three hospitals that see new findings over time.

Run it with ``python examples/own_dataset.py``; the images are made on the spot, in seconds and without a download.
"""

from pathlib import Path

import numpy as np

from fedlscl.__main__ import main as fedlscl

FINDINGS = ("clear", "nodule", "ring", "two nodules", "band", "effusion", "mesh", "shadow")
SIZE, TRAIN, TEST = 32, 20, 10


def scan(finding: str, random: np.random.Generator) -> np.ndarray:
    """A grey picture (SIZE, SIZE), uint8, that looks a little like a scan with one finding."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    body = 90.0 * ((x / 14) ** 2 + (y / 15) ** 2 < 1)
    dx, dy = random.uniform(-5, 5, 2)
    away = np.hypot(x - dx, y - dy)
    radius = random.uniform(3, 4.5)
    shape = {
        "clear": 0 * away,
        "nodule": away < radius,
        "ring": abs(away - 5.5) < 1.2,
        "two nodules": (np.hypot(x - 6, y - dy) < 3) | (np.hypot(x + 6, y + dy) < 3),
        "band": abs(x - dx + 0.4 * y) < 2,
        "effusion": y > 3 + dy,
        "mesh": ((x + dx).astype(int) % 5 == 0) | ((y + dy).astype(int) % 5 == 0),
        "shadow": -0.8 * (away < 2 * radius),
    }[finding]
    picture = body + 80 * shape * (body > 0) + random.normal(0, 8, (SIZE, SIZE))
    return picture.clip(0, 255).astype(np.uint8)


def save(path: Path) -> None:
    """Write train and test images (N, H, W) with one integer label each, and the names of the classes."""
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"class_names": np.array(FINDINGS)}
    for part, count in (("train", TRAIN), ("test", TEST)):
        labels = np.repeat(np.arange(len(FINDINGS)), count)
        arrays[f"{part}_images"] = np.stack([scan(FINDINGS[label], random) for label in labels])
        arrays[f"{part}_labels"] = labels
    np.savez_compressed(path, **arrays)


def main(root: Path = Path("data")) -> int:
    """Make scans.npz and train three hospitals on two tasks: two private findings each, two that all have."""
    root.mkdir(exist_ok=True)
    save(root / "scans.npz")
    options = {
        "data.dataset": "scans.npz",
        "data.root": str(root),
        "data.num_clients": "3",
        "data.num_tasks": "2",
        "data.private_classes": "2",
        "data.public_classes": "2",
        "method.collaborator.foundation.name": "vit_glyph_patch4_32",
        "method.collaborator.foundation.weights": "bundled",
        "method.collaborator.small_model": "test_resnet",
        "method.collaborator.small_image_size": "32",
        "method.local_epochs": "2",
        "method.batch_size": "16",
        "trainer.rounds_per_task": "1",
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": "runs/scans",
    }
    command = ["fit", *(word for name, value in options.items() for word in (f"--{name}", value))]
    print("fedlscl", *command)
    return fedlscl(command)


if __name__ == "__main__":
    raise SystemExit(main())
