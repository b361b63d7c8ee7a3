import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.semidefinite import is_semidefinite


@given(st.integers(1, 12), st.integers(1, 30), st.sampled_from([1e-6, 1.0, 1e6]), st.integers(0, 2**31))
def test_sums_of_outer_products_are_however_they_are_rounded(rows, size, scale, seed):
    x = scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    assert is_semidefinite(x.mT @ x)
    assert is_semidefinite((x.double().mT @ x.double()).float())


@given(st.integers(2, 30), st.integers(0, 2**31))
def test_what_takes_a_thousandth_of_the_trace_from_a_direction_without_inputs_is_not(size, seed):
    x = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    x[:, 0] = 0
    gram = x.mT @ x
    gram[0, 0] -= 1e-3 * gram.trace()
    assert not is_semidefinite(gram)


def test_corner_cases():
    assert is_semidefinite(torch.zeros(3, 3))
    assert not is_semidefinite(-torch.eye(3))
    assert not is_semidefinite(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    assert not is_semidefinite(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
