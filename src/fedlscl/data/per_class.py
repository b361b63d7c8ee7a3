"""Seeded choices within each class."""

import numpy as np


def first_per_class(labels: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """Sorted positions of at most ``limit`` samples of each class: the first ones of a seeded permutation.

    A larger limit keeps what a smaller one chose.

    Example:
        >>> first_per_class(np.array([0, 0, 0, 1]), 1, seed=0).size
        2
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 sample of each class, got {limit}: raise it, or use None for all")
    return np.sort(np.concatenate([ids[:limit] for ids in _permuted_per_class(labels, seed)]))


def split_per_class(labels: np.ndarray, train_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of the train part and of the test part; both have every class that has two samples.

    Example:
        >>> train, test = split_per_class(np.repeat([0, 1], 4), 0.75, seed=0)
        >>> train.size, test.size
        (6, 2)
    """
    train, test = [], []
    for ids in _permuted_per_class(labels, seed):
        cut = min(max(round(train_fraction * len(ids)), 1), max(len(ids) - 1, 1))
        train.append(ids[:cut])
        test.append(ids[cut:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _permuted_per_class(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    return [
        np.random.default_rng((seed, int(label))).permutation(np.flatnonzero(labels == label))
        for label in np.unique(labels)
    ]
