"""Which client gets which samples in which task, drawn from a seed or read from a manifest, a split as a file."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedlscl.data.loader import check_integers, plain_name

# One independent random stream per purpose: changing one draw leaves the others as they were.
CLASS_ORDER, TASK_ORDER, SAMPLES, VALIDATION = range(4)
MAX_CLIENTS = 100_000
"""More than this would exhaust memory (ours)."""
MAX_DIRICHLET_ALPHA = 1e9
"""Shares are even long before; near the largest float the draw overflows and they are not (ours)."""
FORMAT = 2
"""Since 2 the fingerprint covers all pixels and the class names."""
CROPPED = ("folder", "imagenet-r")
"""Data sets that were cropped from image files by versions that did not record it."""


@dataclass(frozen=True, eq=False)
class ClientSplit:
    """One client's stream of tasks; every field has one entry per task."""

    classes: tuple[tuple[int, ...], ...]
    """Classes of the task, sorted."""
    train: tuple[np.ndarray, ...]
    """Sorted ids of the client's own train samples, int64."""
    test: tuple[np.ndarray, ...]
    """Sorted ids of all test samples of the task's classes; they start at ``len(train_labels)``."""


def spatial_temporal_split(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_clients: int,
    num_tasks: int,
    private_classes: int,
    public_classes: int,
    dirichlet_alpha: float = 1.0,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> list[ClientSplit]:
    """Give each client its private classes and a Dirichlet share of the public ones, in an order of its own.

    Args:
        train_labels: (N,) integers; samples with a negative one are given to no client.
        test_labels: (M,) integers.
        num_clients: clients K.
        num_tasks: tasks T per client, of equally many classes.
        private_classes: classes per client that no other client has.
        public_classes: classes that every client has; their train samples are divided without overlap.
        dirichlet_alpha: Dirichlet concentration per public class; smaller is more heterogeneous.
        seed: of the class order, the task orders and the shares.
        class_names: names in label order, for error messages.

    Raises:
        ValueError: if there are too few classes, if they cannot be cut into equal tasks, or if a public class has
            fewer train samples than there are clients.

    Example:
        >>> labels = np.repeat(np.arange(8), 10)
        >>> kwargs = dict(num_clients=3, num_tasks=2, private_classes=2, public_classes=2, seed=42)
        >>> splits = spatial_temporal_split(labels, labels, **kwargs)
        >>> [len(classes) for classes in splits[0].classes]
        [2, 2]
        >>> sum(len(ids) for split in splits for ids in split.train)
        80
    """
    check_split(num_clients, num_tasks, private_classes, public_classes, dirichlet_alpha, seed)
    order = _class_order(train_labels, seed)
    needed = private_classes * num_clients + public_classes
    if needed > len(order):
        raise ValueError(
            f"{private_classes} private x {num_clients} clients + {public_classes} public = {needed} classes, but "
            f"the data set has {len(order)}: lower private_classes, public_classes or num_clients."
        )
    _check_equal_tasks(
        f"{private_classes} private + {public_classes} public classes", private_classes + public_classes, num_tasks
    )
    private = order[: private_classes * num_clients].reshape(num_clients, private_classes)
    public = order[private_classes * num_clients : needed]
    for label in public.tolist():
        if (count := int((train_labels == label).sum())) < num_clients:
            name = label if class_names is None else repr(class_names[label])
            raise ValueError(
                f"public class {name} must have at least {num_clients} train samples, one per client, got {count}: "
                "lower num_clients, add images or raise train_per_class."
            )
    shares = {
        int(label): _share(train_labels, label, num_clients, dirichlet_alpha, seed, at_least=1) for label in public
    }
    splits = []
    for client in range(num_clients):
        owned = {int(label): np.flatnonzero(train_labels == label) for label in private[client]}
        owned |= {label: share[client] for label, share in shares.items()}
        classes = np.random.default_rng((seed, TASK_ORDER, client)).permutation(
            np.concatenate([private[client], public])
        )
        splits.append(_cut(classes, owned, train_labels, test_labels, num_tasks))
    return splits


def dirichlet_split(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_clients: int,
    num_tasks: int,
    num_classes: int,
    dirichlet_alpha: float,
    seed: int,
) -> list[ClientSplit]:
    """Give all clients the same classes in the same order, and each a Dirichlet share of every class.

    A client may get no sample of a class, or of a whole task. Arguments and errors are those of
    `spatial_temporal_split`; ``num_classes`` is how many classes of the data set are used.

    Example:
        >>> labels = np.repeat(np.arange(4), 10)
        >>> kwargs = dict(num_clients=2, num_tasks=2, num_classes=4, dirichlet_alpha=0.1, seed=42)
        >>> first, second = dirichlet_split(labels, labels, **kwargs)
        >>> first.classes == second.classes
        True
    """
    check_split(num_clients, num_tasks, 0, num_classes, dirichlet_alpha, seed)
    order = _class_order(train_labels, seed)
    if num_classes > len(order):
        raise ValueError(
            f"public_classes must be at most {len(order)}, the classes of the data set, got {num_classes}."
        )
    _check_equal_tasks(f"{num_classes} public classes", num_classes, num_tasks)
    classes = order[:num_classes]
    shares = {int(label): _share(train_labels, label, num_clients, dirichlet_alpha, seed) for label in classes}
    return [
        _cut(classes, {label: share[client] for label, share in shares.items()}, train_labels, test_labels, num_tasks)
        for client in range(num_clients)
    ]


def held_out(train_labels: np.ndarray, per_class: int, seed: int, class_names: Sequence[str]) -> np.ndarray:
    """Which train samples are kept for validation, (N,) bool: ``per_class`` random ones of each class.

    Raises:
        ValueError: if a class would have no other train sample.

    Example:
        >>> held_out(np.array([0, 0, 0, 1, 1, 1]), 2, 42, ["a", "b"]).sum()
        np.int64(4)
    """
    mask = np.zeros(len(train_labels), dtype=bool)
    for label in np.unique(train_labels).tolist() if per_class else ():
        ids = np.flatnonzero(train_labels == label)
        if len(ids) <= per_class:
            raise ValueError(
                f"validation_per_class must be less than the {len(ids)} train samples of class {class_names[label]!r}, "
                f"got {per_class}: lower it or raise train_per_class."
            )
        mask[np.random.default_rng((seed, VALIDATION, label)).permutation(ids)[:per_class]] = True
    return mask


def _class_order(train_labels: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, CLASS_ORDER)).permutation(np.unique(train_labels[train_labels >= 0]))


def _share(
    train_labels: np.ndarray, label: int, num_clients: int, dirichlet_alpha: float, seed: int, at_least: int = 0
) -> list[np.ndarray]:
    """Divide the train samples of one class completely: one array of ids per client."""
    ids = np.flatnonzero(train_labels == label)
    free = len(ids) - at_least * num_clients
    random = np.random.default_rng((seed, SAMPLES, int(label)))
    exact = random.dirichlet(np.full(num_clients, dirichlet_alpha)) * free
    counts = np.floor(exact).astype(np.int64)
    # What rounding down left over goes to the largest fractions.
    counts[np.argsort(counts - exact, kind="stable")[: free - counts.sum()]] += 1
    return np.split(random.permutation(ids), np.cumsum(counts + at_least)[:-1])


def _cut(
    classes: np.ndarray,
    owned: dict[int, np.ndarray],
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    num_tasks: int,
) -> ClientSplit:
    """Cut a client's classes, in this order, into equal tasks."""
    tasks = [tuple(sorted(task.tolist())) for task in np.split(classes, num_tasks)]
    return ClientSplit(
        classes=tuple(tasks),
        train=tuple(np.sort(np.concatenate([owned[label] for label in task])) for task in tasks),
        test=tuple(np.flatnonzero(np.isin(test_labels, task)) + len(train_labels) for task in tasks),
    )


def check_split(
    num_clients: int,
    num_tasks: int,
    private_classes: int,
    public_classes: int,
    dirichlet_alpha: float,
    seed: int | None,
) -> None:
    """Raise a ValueError that names the first option of a split that is out of range."""
    check_integers(1, MAX_CLIENTS, num_clients=num_clients)
    check_integers(1, num_tasks=num_tasks)
    check_integers(0, private_classes=private_classes, public_classes=public_classes, seed=seed)
    if not 0 < dirichlet_alpha <= MAX_DIRICHLET_ALPHA:
        raise ValueError(
            f"dirichlet_alpha must be in (0, {MAX_DIRICHLET_ALPHA:g}], got {dirichlet_alpha}: 1 gives uneven shares, "
            "1000 nearly even ones."
        )


def _check_equal_tasks(what: str, num_classes: int, num_tasks: int) -> None:
    if num_classes < 1 or num_classes % num_tasks:
        divisors = ", ".join(str(n) for n in range(1, num_classes + 1) if num_classes % n == 0)
        fix = f"set num_tasks to one of {divisors}, or change the number of classes" if divisors else "use more"
        total = f" = {num_classes}" if "+" in what else ""
        raise ValueError(f"{what}{total} cannot be cut into {num_tasks} equal tasks: {fix}.")


# A split as a JSON file that other projects can read, with a hash that detects changes.


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
