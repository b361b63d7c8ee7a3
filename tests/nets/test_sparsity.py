import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.methods.fedweit import hard_threshold, largest, pack, unpack


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), sparsity=st.floats(0, 0.99))
def test_the_largest_are_kept_in_exact_number(seed, n, sparsity):
    x = values(seed, n)
    kept = largest(x, sparsity)
    assert kept.sum() == n - int(sparsity * n)
    assert kept.all() or x[kept].abs().min() >= x[~kept].abs().max()


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_equal_values_are_kept_all_the_same(sparsity):
    """A strict comparison with the quantile would keep none of them."""
    assert largest(torch.ones(10), sparsity).sum() == 10 - int(10 * sparsity)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), columns=st.integers(1, 9), threshold=st.floats(0, 3))
def test_what_is_packed_comes_back_to_the_bit(seed, rows, columns, threshold):
    x = hard_threshold(values(seed, rows, columns), threshold)
    assert not ((x != 0) & (x.abs() <= threshold)).any()
    kept, bits = pack(x)
    assert len(kept) == int((x != 0).sum()) and len(bits) == -(-x.numel() // 8)
    assert torch.equal(unpack(kept, bits, x.shape), x)
