import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlscl.data.loader import choose_per_class

labels = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


@settings(deadline=None)
@given(labels, st.integers(1, 10), st.integers(0, 9))
def test_a_limit_holds_in_each_class_and_a_larger_one_keeps_the_choice(labels, limit, seed):
    chosen = choose_per_class(labels, limit, seed)
    for label in np.unique(labels):
        assert (labels[chosen] == label).sum() == min(limit, (labels == label).sum())
    assert set(chosen) <= set(choose_per_class(labels, limit + 1, seed))
    assert (choose_per_class(labels, None, seed) == np.arange(len(labels))).all()


@settings(deadline=None)
@given(labels, st.integers(0, 9))
def test_a_share_and_the_rest_have_every_class_of_two_or_more(labels, seed):
    chosen = choose_per_class(labels, 0.8, seed)
    several = {label for label in labels if (labels == label).sum() > 1}
    assert set(labels[chosen]) == set(labels) and set(np.delete(labels, chosen)) == several
