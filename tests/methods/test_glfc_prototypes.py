import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.methods.glfc import herding, infer_labels, prototype_encoder, prototype_gradient, reconstruct
from reference import glfc

NUM_CLASSES = 7


@pytest.fixture(scope="module")
def encoder():
    return prototype_encoder(NUM_CLASSES, size=8)


@pytest.fixture(scope="module")
def images():
    return torch.rand(NUM_CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gradients(encoder, images):
    return torch.stack([prototype_gradient(encoder, image, torch.tensor(i)) for i, image in enumerate(images)])


def test_gradients_are_those_of_each_images_own_cross_entropy(encoder, images, gradients):
    encoder.zero_grad()
    F.cross_entropy(encoder(images[2:3]), torch.tensor([2])).backward()
    assert torch.equal(gradients[2], torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    encoder.zero_grad()


def test_the_label_of_every_class_is_inferred(encoder, gradients):
    assert infer_labels(encoder, gradients).tolist() == list(range(NUM_CLASSES))


def test_an_image_comes_back_from_its_gradient(encoder, images, gradients):
    """That it does is the method's leak: the mean error falls to less than a third of the first guess's."""
    start = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = reconstruct(encoder, gradients[3], torch.tensor(3), start, steps=20, keep=4)
    assert found.shape == (4, 3, 8, 8) and found.min() >= 0 and found.max() <= 1
    errors = [(image - images[3]).square().mean() for image in (start, found[-1])]
    assert errors[1] < errors[0] / 3


def test_a_search_without_steps_or_numbers_gives_the_start(encoder, gradients):
    start = torch.rand(3, 8, 8)
    for gradient, steps in ((gradients[0], 0), (gradients[0] * torch.nan, 3)):
        assert torch.equal(reconstruct(encoder, gradient, torch.tensor(0), start, steps, keep=2), start[None])


def test_clients_and_proxy_build_the_same_weights_whatever_was_drawn_before():
    first = prototype_encoder(5, 32).state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(123)
        second = prototype_encoder(5, 32).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_has_the_papers_size():
    """8136 + 769 C at 32 pixels."""
    assert sum(p.numel() for p in prototype_encoder(100, 32).parameters()) == 8136 + 769 * 100
    assert prototype_encoder(100, 32)(torch.rand(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("size", [0, 30])
def test_a_size_that_cannot_be_halved_twice_is_refused(size):
    with pytest.raises(ValueError, match=f"prototype_size must be a positive multiple of 4, got {size}"):
        prototype_encoder(5, size)


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
