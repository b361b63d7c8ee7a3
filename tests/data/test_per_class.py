import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlscl.data.loader import first_per_class, split_per_class

labels = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


@settings(deadline=None)
@given(labels, st.integers(1, 10), st.integers(0, 9))
def test_a_limit_holds_in_each_class_and_a_larger_one_keeps_the_choice(labels, limit, seed):
    chosen = first_per_class(labels, limit, seed)
    for label in np.unique(labels):
        assert (labels[chosen] == label).sum() == min(limit, (labels == label).sum())
    assert set(chosen) <= set(first_per_class(labels, limit + 1, seed))
    assert (first_per_class(labels, None, seed) == np.arange(len(labels))).all()


@settings(deadline=None)
@given(labels, st.integers(0, 9))
def test_both_parts_have_every_class_of_two_or_more(labels, seed):
    train, test = split_per_class(labels, 0.8, seed)
    assert sorted([*train, *test]) == list(range(len(labels)))
    several = {label for label in labels if (labels == label).sum() > 1}
    assert several <= set(labels[train]) and several == set(labels[test])
