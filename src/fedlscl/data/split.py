"""Which client gets which samples in which task. Pure numpy, deterministic in the seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

# One independent random stream per purpose: changing one draw leaves the others as they were.
CLASS_ORDER, TASK_ORDER, SAMPLES = range(3)
MAX_CLIENTS = 100_000
"""More than this would exhaust memory (ours)."""
MAX_DIRICHLET_ALPHA = 1e9
"""Shares are even long before; near the largest float the draw overflows and they are not (ours)."""


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
        train_labels: (N,) integers.
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
        classes = _stream(seed, TASK_ORDER, client).permutation(np.concatenate([private[client], public]))
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


def _stream(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _class_order(train_labels: np.ndarray, seed: int) -> np.ndarray:
    return _stream(seed, CLASS_ORDER).permutation(np.unique(train_labels))


def _share(
    train_labels: np.ndarray, label: int, num_clients: int, dirichlet_alpha: float, seed: int, at_least: int = 0
) -> list[np.ndarray]:
    """Divide the train samples of one class completely: one array of ids per client."""
    ids = np.flatnonzero(train_labels == label)
    free = len(ids) - at_least * num_clients
    random = _stream(seed, SAMPLES, int(label))
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


def check_integers(low: int, high: int | None = None, /, **values: int | None) -> None:
    """Raise a ValueError that names the first value that is not an integer in range; None is an option left out."""
    for name, value in values.items():
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (is_whole and low <= value <= (value if high is None else high)):
            bounds = f">= {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name} must be {'' if is_whole else 'an integer '}{bounds}, got {value}.")


def _check_equal_tasks(what: str, num_classes: int, num_tasks: int) -> None:
    if num_classes < 1 or num_classes % num_tasks:
        divisors = ", ".join(str(n) for n in range(1, num_classes + 1) if num_classes % n == 0)
        fix = f"set num_tasks to one of {divisors}, or change the number of classes" if divisors else "use more"
        total = f" = {num_classes}" if "+" in what else ""
        raise ValueError(f"{what}{total} cannot be cut into {num_tasks} equal tasks: {fix}.")
