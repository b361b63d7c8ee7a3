import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.methods.pilora import PrototypeHead, prototype_distances


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_distances_are_root_mean_squares(batch, classes, width, seed):
    x, y = random(batch, width, seed=seed), random(classes, width, seed=seed + 1)
    exact = (x[:, None] - y).square().mean(2).sqrt()
    torch.testing.assert_close(prototype_distances(x, y), exact)


@given(st.integers(2, 8), st.integers(0, 99))
def test_prediction_is_invariant_to_a_rotation_of_features_and_prototypes(width, seed):
    x, y = random(20, width, seed=seed), random(5, width, seed=seed + 1)
    rotation = torch.linalg.qr(random(width, width, seed=seed + 2)).Q
    plain, rotated = prototype_distances(x, y), prototype_distances(x @ rotation, y @ rotation)
    torch.testing.assert_close(plain, rotated, rtol=1e-9, atol=1e-9)
    assert torch.equal(plain.argmin(1), rotated.argmin(1))


def test_a_sample_on_its_prototype_has_a_finite_gradient():
    """Where the expanded square would round below zero, and a root has an infinite slope."""
    head = PrototypeHead(192, 3)
    torch.nn.init.constant_(head.weight, 1234.567)
    features = head.weight.detach().clone().requires_grad_(True)
    logits = head(features)
    assert logits.isfinite().all() and (logits <= 0).all()
    logits.sum().backward()
    assert features.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_distances_are_in_float32_in_any_precision():
    torch.manual_seed(0)
    head, features = PrototypeHead(64, 5), torch.randn(7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(features)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, head(features))


def test_temperature_divides_distances_alone():
    torch.manual_seed(0)
    head, features = PrototypeHead(8, 5, temperature=1.0), torch.randn(7, 8)
    cold = PrototypeHead(8, 5, temperature=0.5)
    cold.load_state_dict(head.state_dict())
    torch.testing.assert_close(cold(features), 2 * head(features))


def test_prototypes_start_small():
    torch.manual_seed(0)
    head = PrototypeHead(500, 100)
    assert abs(head.weight.std().item() - 0.1) < 0.001 and head.weight.shape == (100, 500)
