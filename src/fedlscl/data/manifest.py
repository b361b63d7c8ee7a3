"""A split as a JSON file that other projects can read, with a hash that detects changes."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedlscl.data.images import plain_name
from fedlscl.data.split import ClientSplit

FORMAT = 2
"""Since 2 the fingerprint covers all pixels and the class names."""
CROPPED = ("folder", "imagenet-r")
"""Data sets that were cropped from image files by versions that did not record it."""


def save_manifest(
    path: str | Path,
    splits: list[ClientSplit],
    class_names: Sequence[str],
    fingerprint: str,
    meta: dict[str, str | int | float | None],
) -> None:
    """Write classes, train ids and test ids of every client and task.

    Args:
        path: the JSON file, replaced atomically.
        splits: one per client.
        class_names: names in label order.
        fingerprint: `ImageData.fingerprint` of the data set.
        meta: how the split was drawn and the images were prepared.
    """
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "meta": meta,
        "class_names": list(class_names),
        "clients": [
            [
                {"classes": list(classes), "train": train.tolist(), "test": test.tolist()}
                for classes, train, test in zip(split.classes, split.train, split.test, strict=True)
            ]
            for split in splits
        ],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        json.dump(content | {"sha256": _sha256(content)}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Manifest(NamedTuple):
    """A saved split, usable without the data set."""

    splits: list[ClientSplit]
    class_names: tuple[str, ...]
    fingerprint: str
    """Of the data set, `ImageData.fingerprint`."""
    meta: dict[str, Any]
    """How the split was drawn and, for `preparation`, how the images were prepared."""


class Preparation(NamedTuple):
    """How to bring an image file to the size of the data set's images, so that `predict` sees what `test` sees."""

    height: int
    width: int
    is_cropped: bool
    """Whether the images were cropped from image files; otherwise they were stored in this size."""


def preparation(manifest: Manifest) -> Preparation:
    """Read it from ``meta``; earlier versions stored the side of square images only.

    Raises:
        ValueError: if the manifest does not record it.
    """
    meta = manifest.meta
    size: tuple[Any, Any] = meta.get("image_height"), meta.get("image_width")
    rule = meta.get("image_rule")
    if rule is None and not str(meta.get("dataset", ".npz")).endswith(".npz"):
        size = (meta.get("image_size"), meta.get("image_size"))
        rule = "crop" if meta["dataset"] in CROPPED else "stored"
    if rule not in ("crop", "stored") or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(
            f"the manifest must record image_height, image_width and image_rule, got {size[0]}, {size[1]} and "
            f"{rule!r}: save it again with SpatialTemporalDataModule.save_manifest."
        )
    return Preparation(*size, is_cropped=rule == "crop")


def load_manifest(path: str | Path, fingerprint: str, class_names: Sequence[str]) -> list[ClientSplit]:
    """Read a split back, for the data set with this fingerprint and these names in label order.

    Raises:
        ValueError: if the file is missing, changed or of another format, or belongs to another data set.
    """
    saved = read_manifest(path)
    if len(saved.class_names) != len(class_names):
        raise ValueError(
            f"manifest {path} must have the {len(class_names)} classes of the data set, got {len(saved.class_names)}: "
            "use the data set that it was saved from."
        )
    for label, (name, own) in enumerate(zip(saved.class_names, class_names, strict=True)):
        if plain_name(name) != plain_name(own):
            raise ValueError(
                f"manifest {path} must name class {label} {own!r} as the data set does, got {name!r}: "
                "number and name the classes as in the data set that it was saved from."
            )
    if saved.fingerprint != fingerprint:
        raise ValueError(
            f"manifest {path} belongs to a data set with fingerprint {saved.fingerprint[:12]}, this one has "
            f"{fingerprint[:12]}: use the same images and labels, and the same image_size, train_per_class and "
            "test_per_class."
        )
    return saved.splits


def read_manifest(path: str | Path) -> Manifest:
    """Read a split and what is known about its data set.

    Raises:
        ValueError: if the file is missing, changed or of another format.
    """
    try:
        content = json.loads(Path(path).read_text())
        stored = content.pop("sha256")
        version = content["format"]
    except OSError as error:
        raise ValueError(f"manifest {path} cannot be read ({error.strerror}): give the path of a saved one.") from None
    except (ValueError, AttributeError, TypeError, KeyError):
        raise ValueError(f"manifest {path} is not a split manifest: save it again with save_manifest.") from None
    if version != FORMAT:
        raise ValueError(
            f"manifest {path} must have format {FORMAT}, got {version!r}: draw and save the split again with the same "
            "options and seed, or use the version of fedlscl that wrote it."
        )
    if stored != _sha256(content):
        raise ValueError(f"manifest {path} was changed (its sha256 does not match): save or fetch it again.")
    splits = [
        ClientSplit(
            classes=tuple(tuple(task["classes"]) for task in tasks),
            train=tuple(np.array(task["train"], dtype=np.int64) for task in tasks),
            test=tuple(np.array(task["test"], dtype=np.int64) for task in tasks),
        )
        for tasks in content["clients"]
    ]
    return Manifest(splits, tuple(content["class_names"]), content["fingerprint"], content["meta"])


def _sha256(content: dict) -> str:
    # Without spaces and with sorted keys, so that layout does not count.
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
