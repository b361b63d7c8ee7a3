import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.methods.glfc import herding
from reference import glfc


def features(seed, n):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), count=st.integers(0, 10))
def test_herding_is_the_greedy_rule_as_it_is_written(seed, n, count):
    rows = features(seed, n)
    order = herding(rows, count).tolist()
    assert order == glfc.herding(rows.double().tolist(), count)
    assert len(set(order)) == len(order) == min(n, count)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 9))
def test_a_shorter_order_is_the_beginning_of_a_longer_one(seed, n):
    whole = herding(features(seed, n), n).tolist()
    assert all(herding(features(seed, n), count).tolist() == whole[:count] for count in range(n))
