import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from fedlscl.methods.data_free import (
    disagreement,
    norm_distance,
    norm_divergence,
    norm_statistics,
    roughness,
    unevenness,
    updated,
)
from reference import synthesis as literal


@st.composite
def statistics(draw):
    """One to three layers of one to five channels: mean, variance, running mean, running variance."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        values = torch.randn(4, draw(st.integers(1, 5)), generator=random, dtype=torch.float64)
        layers.append((values[0], values[1].exp(), values[2], values[3].exp()))
    return layers


def plain(layers):
    return [[part.tolist() for part in layer] for layer in layers]


@given(statistics())
def test_distance_from_the_statistics_is_the_literal_one(layers):
    assert norm_distance(layers).item() == pytest.approx(literal.norm_distance(plain(layers)))


@given(statistics())
def test_divergence_from_the_statistics_is_torchs_kl(layers):
    expected = [kl_divergence(Normal(m0, r.sqrt()), Normal(m, v.sqrt())).mean() for m, v, m0, r in layers]
    assert norm_divergence(layers).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert norm_divergence(layers).item() == pytest.approx(literal.norm_divergence(plain(layers)), rel=1e-5)


def test_a_batch_with_the_running_statistics_costs_nothing():
    torch.manual_seed(0)
    images, layer = torch.randn(8, 3, 5, 5), nn.BatchNorm2d(3)
    layer.running_mean, layer.running_var = images.mean((0, 2, 3)), images.var((0, 2, 3), correction=0)
    net = nn.Sequential(layer).eval()
    with norm_statistics(net) as found:
        net(images)
    assert norm_distance(found).item() == pytest.approx(0, abs=1e-5)
    assert norm_divergence(found).item() == pytest.approx(0, abs=1e-6)
    with norm_statistics(net) as shifted:
        net(images + 1)
    assert norm_distance(shifted).item() == pytest.approx(3**0.5, rel=1e-5)


@given(statistics(), st.floats(0, 1))
def test_momentum_mixes_earlier_batches_into_the_statistics(layers, momentum):
    earlier = [(m + 1, 2 * v) for m, v, *_ in layers]
    mixed = [((1 - momentum) * m + momentum * (m + 1), (1 - momentum) * v + momentum * 2 * v) for m, v, *_ in layers]
    expected = [(m, v, *layer[2:]) for (m, v), layer in zip(mixed, layers, strict=True)]
    assert norm_distance(layers, earlier, momentum).item() == pytest.approx(norm_distance(expected).item())
    for (m, v), (wanted_m, wanted_v) in zip(updated(earlier, layers, momentum), mixed, strict=True):
        torch.testing.assert_close(m, wanted_m)
        torch.testing.assert_close(v, wanted_v)
    first = updated([], layers, momentum)
    assert all(
        torch.equal(a, b)
        for pair, layer in zip(first, layers, strict=True)
        for a, b in zip(pair, layer[:2], strict=True)
    )


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_unevenness_is_0_for_all_classes_alike_and_1_for_one(num_classes):
    assert unevenness(1e3 * torch.eye(num_classes)).item() == pytest.approx(0, abs=1e-6)
    assert unevenness(torch.zeros(4, num_classes)).item() == pytest.approx(0, abs=1e-6)
    assert unevenness(1e3 * torch.eye(num_classes)[:1].expand(4, -1)).item() == 1


def test_students_are_told_apart_where_they_name_the_same_class():
    teacher = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    p, q = teacher[0].softmax(0), student[0].softmax(0)
    assert disagreement(teacher, student).item() == pytest.approx((p * (p / q).log()).sum().item() / 3)


def test_roughness_is_the_distance_from_the_literal_blur():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 4, 6)
    blurred = [
        [[[literal.blurred(plane.tolist(), i, j) for j in range(6)] for i in range(4)] for plane in image]
        for image in images
    ]
    expected = (images - torch.tensor(blurred)).square().mean().item()
    assert roughness(images).item() == pytest.approx(expected, rel=1e-5)
    assert roughness(torch.full((1, 3, 5, 5), 0.3)).item() == pytest.approx(0, abs=1e-12)
