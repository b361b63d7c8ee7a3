import pytest
import torch

from fedlscl.methods.glfc import PrototypeEncoder


def test_clients_and_proxy_build_the_same_weights_whatever_was_drawn_before():
    first = PrototypeEncoder(5, 32).state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(123)
        second = PrototypeEncoder(5, 32).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_has_the_papers_size():
    """8136 + 769 C at 32 pixels."""
    assert sum(p.numel() for p in PrototypeEncoder(100, 32).parameters()) == 8136 + 769 * 100
    assert PrototypeEncoder(100, 32)(torch.rand(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("size", [0, 30])
def test_a_size_that_cannot_be_halved_twice_is_refused(size):
    with pytest.raises(ValueError, match=f"prototype_size {size} .* multiple of 4"):
        PrototypeEncoder(5, size)
