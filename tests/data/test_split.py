import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlscl.data import spatial_temporal_split

GLOBAL = {"protocol": "global", "private_classes": 0}


@st.composite
def federations(draw):
    """Labels of a random data set with what a split of it needs."""
    num_clients = draw(st.integers(1, 5))
    num_tasks = draw(st.integers(1, 4))
    per_client = num_tasks * draw(st.integers(1, 3))
    private = draw(st.integers(0, per_client))
    public = per_client - private
    num_classes = private * num_clients + public + draw(st.integers(0, 3))
    samples = draw(st.lists(st.integers(num_clients, 12), min_size=num_classes, max_size=num_classes))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    train_labels = random.permutation(np.repeat(np.arange(num_classes), samples))
    test_labels = random.permutation(np.repeat(np.arange(num_classes), 2))
    kwargs = {
        "num_clients": num_clients,
        "num_tasks": num_tasks,
        "private_classes": private,
        "public_classes": public,
        "dirichlet_alpha": draw(st.floats(0.01, 1000)),
        "seed": draw(st.integers(0, 2**32)),
    }
    return train_labels, test_labels, kwargs


@settings(deadline=None, max_examples=50)
@given(federations())
def test_split_is_disjoint_complete_and_cut_into_equal_tasks(federation):
    train_labels, test_labels, kwargs = federation
    splits = spatial_temporal_split(train_labels, test_labels, **kwargs)
    given_ids = np.concatenate([ids for split in splits for ids in split.train])
    used = {label for split in splits for task in split.classes for label in task}

    assert len(splits) == kwargs["num_clients"]
    assert len(np.unique(given_ids)) == len(given_ids)
    assert set(given_ids) == set(np.flatnonzero(np.isin(train_labels, list(used))))
    for split in splits:
        classes = [label for task in split.classes for label in task]
        assert len(set(classes)) == len(classes) == kwargs["private_classes"] + kwargs["public_classes"]
        assert len({len(task) for task in split.classes}) == 1
        assert len(split.classes) == len(split.train) == len(split.test) == kwargs["num_tasks"]


@settings(deadline=None, max_examples=50)
@given(federations())
def test_private_classes_have_one_owner_and_public_ones_reach_all(federation):
    train_labels, test_labels, kwargs = federation
    splits = spatial_temporal_split(train_labels, test_labels, **kwargs)
    owners = np.zeros(train_labels.max() + 1, dtype=int)
    for split in splits:
        for task, ids in zip(split.classes, split.train, strict=True):
            assert set(train_labels[ids]) == set(task)  # at least one sample of every class
            owners[list(task)] += 1

    expected = [1] * kwargs["private_classes"] * kwargs["num_clients"]
    expected += [kwargs["num_clients"]] * kwargs["public_classes"]
    assert sorted(owners[owners > 0]) == sorted(expected)


@settings(deadline=None, max_examples=50)
@given(federations())
def test_test_ids_are_all_test_samples_of_the_task_after_the_train_ones(federation):
    train_labels, test_labels, kwargs = federation
    both = np.concatenate([train_labels, test_labels])
    for split in spatial_temporal_split(train_labels, test_labels, **kwargs):
        for task, ids in zip(split.classes, split.test, strict=True):
            assert ids.min() >= len(train_labels)
            assert sorted(both[ids]) == sorted(2 * task)  # two test samples per class


def test_split_depends_on_the_seed_and_on_nothing_else():
    labels = np.repeat(np.arange(20), 30)

    def split(seed):
        kwargs = {"num_clients": 3, "num_tasks": 2, "private_classes": 4, "public_classes": 6}
        return spatial_temporal_split(labels, labels, **kwargs, seed=seed)

    def ids(splits):
        return [ids.tolist() for split in splits for ids in split.train]

    assert ids(split(42)) == ids(split(42))
    assert ids(split(42)) != ids(split(43))
    assert len({split(42)[client].classes for client in range(3)}) == 3


def test_small_concentration_gives_unequal_shares():
    labels = np.repeat(np.arange(4), 200)

    def largest_share(dirichlet_alpha):
        kwargs = {"num_clients": 4, "num_tasks": 1, "private_classes": 0, "public_classes": 4, "seed": 1}
        splits = spatial_temporal_split(labels, labels, **kwargs, dirichlet_alpha=dirichlet_alpha)
        counts = np.array([np.bincount(labels[split.train[0]], minlength=4) for split in splits])
        return counts.max() / 200

    assert largest_share(0.01) > 0.9
    assert largest_share(1000) < 0.3


@settings(deadline=None, max_examples=50)
@given(
    num_clients=st.integers(1, 6),
    num_tasks=st.integers(1, 3),
    dirichlet_alpha=st.floats(0.01, 1000),
    seed=st.integers(0, 2**32),
)
def test_the_global_protocol_shares_classes_and_divides_every_sample(num_clients, num_tasks, dirichlet_alpha, seed):
    labels = np.repeat(np.arange(7), 5)
    splits = spatial_temporal_split(
        labels,
        labels,
        num_clients=num_clients,
        num_tasks=num_tasks,
        dirichlet_alpha=dirichlet_alpha,
        seed=seed,
        **GLOBAL,
        public_classes=6,
    )
    assert len({split.classes for split in splits}) == 1
    for task, classes in enumerate(splits[0].classes):
        given_ids = np.concatenate([split.train[task] for split in splits])
        assert sorted(given_ids) == np.flatnonzero(np.isin(labels, classes)).tolist()
        assert all((split.test[task] == splits[0].test[task]).all() for split in splits)


def test_the_global_protocol_may_leave_a_client_without_samples():
    labels = np.repeat(np.arange(2), 3)
    splits = spatial_temporal_split(labels, labels, num_clients=8, num_tasks=2, public_classes=2, seed=0, **GLOBAL)
    sizes = [len(ids) for split in splits for ids in split.train]
    assert 0 in sizes and sum(sizes) == 6
    assert all(ids.dtype == np.int64 for split in splits for ids in split.train)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"private_classes": 15, "public_classes": 30, "num_clients": 5},
            r"15 private x 5 clients \+ 30 public = 105 classes, but the data set has 100: lower",
        ),
        (
            {"private_classes": 15, "public_classes": 30, "num_clients": 2, "num_tasks": 4},
            r"15 private \+ 30 public classes = 45 cannot be cut into 4 equal tasks: .* 1, 3, 5, 9, 15, 45",
        ),
        ({"private_classes": 0, "public_classes": 0}, "cannot be cut into 5 equal tasks: use more"),
        ({"num_clients": 0}, "num_clients must be from 1 to 100000, got 0"),
        ({"num_clients": 10**12}, "num_clients must be from 1 to 100000, got 1000000000000"),
        ({"num_tasks": -1}, "num_tasks must be >= 1, got -1"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"dirichlet_alpha": 0.0}, "dirichlet_alpha must be in \\(0, 1e9\\], got 0.0"),
        ({"dirichlet_alpha": float("inf")}, "dirichlet_alpha must be in \\(0, 1e9\\], got inf"),
        ({"dirichlet_alpha": float("nan")}, "dirichlet_alpha must be in \\(0, 1e9\\], got nan"),
        ({"dirichlet_alpha": 1e308}, "dirichlet_alpha must be in \\(0, 1e9\\], got 1e\\+308"),
        ({"private_classes": -1}, "private_classes must be >= 0, got -1"),
        (
            {"private_classes": 0, "num_clients": 4},
            "must have at least 4 train samples, one per client, got 3: lower num_clients",
        ),
    ],
)
def test_impossible_splits_are_refused_in_one_line(changed, message):
    labels = np.repeat(np.arange(100), 3)
    kwargs = {"num_clients": 2, "num_tasks": 5, "private_classes": 15, "public_classes": 25, "seed": 42} | changed
    with pytest.raises(ValueError, match=message) as caught:
        spatial_temporal_split(labels, labels, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"public_classes": 5}, r"0 private x 2 clients \+ 5 public = 5 classes, but the data set has 4"),
        ({"num_tasks": 3}, r"0 private \+ 4 public classes = 4 cannot be cut into 3 equal tasks"),
        ({"private_classes": 1}, "private_classes must be 0 for protocol 'global', got 1"),
        ({"protocol": "globl"}, "protocol must be one of local, global, got 'globl'"),
    ],
)
def test_impossible_global_splits_are_refused(changed, message):
    labels = np.repeat(np.arange(4), 3)
    kwargs = {"num_clients": 2, "num_tasks": 2, "public_classes": 4, "seed": 42} | GLOBAL | changed
    with pytest.raises(ValueError, match=message):
        spatial_temporal_split(labels, labels, **kwargs)


def test_the_largest_concentration_gives_equal_shares():
    labels = np.repeat(np.arange(4), 120)
    kwargs = {"num_clients": 3, "num_tasks": 1, "public_classes": 4, "dirichlet_alpha": 1e9} | GLOBAL
    for seed in range(5):
        for split in spatial_temporal_split(labels, labels, **kwargs, seed=seed):
            assert np.abs(np.bincount(labels[split.train[0]]) - 40).max() <= 1


def test_a_class_with_too_few_samples_is_named():
    labels = np.repeat(np.arange(3), [5, 5, 2])
    kwargs = {"num_clients": 3, "num_tasks": 1, "private_classes": 0, "public_classes": 3, "seed": 0}
    for names, said in ((None, "2"), (("cat", "dog", "owl"), "'owl'")):
        with pytest.raises(ValueError, match=f"public class {said} must have at least 3 train samples"):
            spatial_temporal_split(labels, labels, **kwargs, class_names=names)
