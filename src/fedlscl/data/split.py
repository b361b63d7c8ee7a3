"""Which client gets which samples in which task, drawn from a seed or read from a manifest, a split as a file."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from fedlscl.data.loader import check_integers, choose_per_class, plain_name
from fedlscl.options import Interval

Protocol = Literal["local", "global"]
# One independent random stream per purpose: changing one draw leaves the others as they were.
CLASS_ORDER, TASK_ORDER, SAMPLES, VALIDATION = range(4)
MAX_CLIENTS = 100_000
"""More than this would exhaust memory (ours)."""
ALPHAS = Interval("(0, 1e9]")
"""Shares are even long before; near the largest float the draw overflows and they are not (ours)."""
FORMAT = 2
"""Since 2 the fingerprint covers all pixels and the class names."""


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
    protocol: Protocol = "local",
    seed: int,
    class_names: Sequence[str] | None = None,
) -> list[ClientSplit]:
    """Give each client its private classes and a Dirichlet share of the public ones, in an order of its own.

    With protocol 'global' all clients have the public classes alone, in the same order, and a client may get no sample
    of a class, or of a whole task. Labels are integers (N,) and (M,); train samples with a negative one are given to no
    client. Class names in label order are for error messages; the other options are those of the datamodule.

    Example:
        >>> labels = np.repeat(np.arange(8), 10)
        >>> kwargs = dict(num_clients=3, num_tasks=2, private_classes=2, public_classes=2, seed=42)
        >>> splits = spatial_temporal_split(labels, labels, **kwargs)
        >>> len(splits[0].classes), sum(len(ids) for split in splits for ids in split.train)
        (2, 80)
    """
    check_integers(1, MAX_CLIENTS, num_clients=num_clients)
    check_integers(1, num_tasks=num_tasks)
    check_integers(0, private_classes=private_classes, public_classes=public_classes, seed=seed)
    if dirichlet_alpha not in ALPHAS:
        raise ValueError(f"dirichlet_alpha must be {ALPHAS}, got {dirichlet_alpha}.")
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol must be one of {', '.join(get_args(Protocol))}, got {protocol!r}.")
    ids = {label: np.flatnonzero(train_labels == label) for label in np.unique(train_labels).tolist() if label >= 0}
    is_local = protocol == "local"
    if private_classes and not is_local:
        raise ValueError(
            f"private_classes must be 0 for protocol 'global', got {private_classes}: set public_classes to the "
            f"classes of all clients (the data set has {len(ids)})."
        )
    num_private, per_client = private_classes * num_clients, private_classes + public_classes
    if num_private + public_classes > len(ids):
        raise ValueError(
            f"{private_classes} private x {num_clients} clients + {public_classes} public = "
            f"{num_private + public_classes} classes, but the data set has {len(ids)}: lower private_classes, "
            "public_classes or num_clients."
        )
    if per_client < 1 or per_client % num_tasks:
        divisors = ", ".join(str(n) for n in range(1, per_client + 1) if per_client % n == 0)
        fix = f"set num_tasks to one of {divisors}, or change the number of classes" if divisors else "use more"
        raise ValueError(
            f"{private_classes} private + {public_classes} public classes = {per_client} cannot be cut into "
            f"{num_tasks} equal tasks: {fix}."
        )
    order = np.random.default_rng((seed, CLASS_ORDER)).permutation(list(ids))
    private, public = order[:num_private].reshape(num_clients, -1), order[num_private:][:public_classes]
    shares = {}
    for label in public.tolist():
        if (count := len(ids[label])) < num_clients and is_local:
            name = label if class_names is None else repr(class_names[label])
            raise ValueError(
                f"public class {name} must have at least {num_clients} train samples, one per client, got {count}: "
                "lower num_clients, add images or raise train_per_class."
            )
        random = np.random.default_rng((seed, SAMPLES, label))
        shares[label] = _share(ids[label], num_clients, dirichlet_alpha, int(is_local), random)
    splits = []
    for client in range(num_clients):
        owned = ids | {label: share[client] for label, share in shares.items()}
        classes = np.concatenate([private[client], public])
        if is_local:
            classes = np.random.default_rng((seed, TASK_ORDER, client)).permutation(classes)
        tasks = tuple(tuple(sorted(task.tolist())) for task in np.split(classes, num_tasks))
        train = tuple(np.sort(np.concatenate([owned[label] for label in task])) for task in tasks)
        test = tuple(np.flatnonzero(np.isin(test_labels, task)) + len(train_labels) for task in tasks)
        splits.append(ClientSplit(tasks, train, test))
    return splits


def _share(
    ids: np.ndarray, num_clients: int, dirichlet_alpha: float, at_least: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Divide the train samples of one class completely: one array of ids per client."""
    free = len(ids) - at_least * num_clients
    exact = random.dirichlet(np.full(num_clients, dirichlet_alpha)) * free
    counts = np.floor(exact).astype(np.int64)
    # What rounding down left over goes to the largest fractions.
    counts[np.argsort(counts - exact, kind="stable")[: free - counts.sum()]] += 1
    return np.split(random.permutation(ids), np.cumsum(counts + at_least)[:-1])


def held_out(train_labels: np.ndarray, per_class: int, seed: int, class_names: Sequence[str]) -> np.ndarray:
    """Sorted ids of the train samples that are kept for validation: ``per_class`` random ones of each class.

    Example:
        >>> held_out(np.array([0, 0, 0, 1, 1, 1]), 2, 42, ["a", "b"]).size
        4
    """
    for label, count in zip(*np.unique(train_labels, return_counts=True), strict=True):
        if count <= per_class:
            raise ValueError(
                f"validation_per_class must be less than the {count} train samples of class {class_names[label]!r}, "
                f"got {per_class}: lower it or raise train_per_class."
            )
    return choose_per_class(train_labels, per_class, seed, VALIDATION)


def save_manifest(
    path: str | Path,
    splits: list[ClientSplit],
    class_names: Sequence[str],
    fingerprint: str,
    meta: dict[str, str | int | float | None],
) -> None:
    """Write a split as a JSON file that other projects can read, with a hash of its content; replaced atomically.

    Class names are in label order, the fingerprint is `ImageData.fingerprint`, and ``meta`` says how the split was
    drawn and the images were prepared.
    """
    clients = [
        [
            {"classes": list(classes), "train": train.tolist(), "test": test.tolist()}
            for classes, train, test in zip(split.classes, split.train, split.test, strict=True)
        ]
        for split in splits
    ]
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "meta": meta,
        "class_names": list(class_names),
        "clients": clients,
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
    """What ``meta`` says of it."""
    size: list[Any] = [manifest.meta.get("image_height"), manifest.meta.get("image_width")]
    rule = manifest.meta.get("image_rule")
    if rule not in ("crop", "stored") or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(
            f"the manifest must record image_height, image_width and image_rule, got {size[0]}, {size[1]} and "
            f"{rule!r}: save it again with SpatialTemporalDataModule.save_manifest."
        )
    return Preparation(*size, is_cropped=rule == "crop")


def load_manifest(path: str | Path, fingerprint: str, class_names: Sequence[str]) -> list[ClientSplit]:
    """Read the split of the data set with this fingerprint and these names in label order; refuses any other."""
    saved = read_manifest(path)
    for label, (name, own) in enumerate(zip_longest(saved.class_names, class_names)):
        if plain_name(str(name)) != plain_name(str(own)):
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
    """Read a split and what is known about its data set, unless the file was changed or has another format."""
    try:
        content = json.loads(Path(path).read_text())
        stored, version = content.pop("sha256"), content["format"]
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
