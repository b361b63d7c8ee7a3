import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from fedlscl.methods.mfcl import norm_divergence, roughness, unevenness
from fedlscl.methods.target import (
    GeneratorWithTeacher,
    Statistics,
    Synthesizer,
    disagreement,
    jitter,
    mixed,
    norm_distance,
    norm_statistics,
)
from fedlscl.nets.net import MEAN, STD, SmallClassifier
from reference import synthesis as literal


@pytest.fixture
def generator():
    torch.manual_seed(0)
    teacher = SmallClassifier("test_resnet", 6, image_size=16)
    return GeneratorWithTeacher(Synthesizer(8, (8, 4), 16), teacher, batch_size=5, padding=2)


def size(net):
    return sum(p.numel() for p in net.parameters())


def test_nets_of_the_papers_have_the_papers_sizes():
    with torch.device("meta"):
        assert size(Synthesizer(1000, (64,) * 6, 224, standardise=True)) == 3_326_275
        at_224 = Synthesizer(256, (128, 128, 64), 224)
        assert sum(p.numel() for p in at_224.project.parameters()) == 103_161_856
        small = Synthesizer(256, (128, 128, 64), 32)
        assert (small.start, small.project.out_features) == (8, 128 * 8**2)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize(("channels", "pixels"), [((8, 4), 16), ((4, 4, 4), 24), ((6,), 5)])
def test_images_have_the_size_and_range_asked_for(channels, pixels, standardise):
    torch.manual_seed(0)
    images = Synthesizer(3, channels, pixels, standardise)(torch.randn(4, 3))
    assert images.shape == (4, 3, pixels, pixels) and 0 <= images.min() < images.max() <= 1


def test_standardised_images_are_so_after_the_classifiers_normalisation():
    """Up to what is clipped to the range of pixels."""
    torch.manual_seed(0)
    images = Synthesizer(8, (8, 4), 16, standardise=True)(torch.randn(64, 8))
    seen = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3)), torch.ones(3), atol=0.15, rtol=0)


@pytest.mark.parametrize(("channels", "pixels"), [((8, 4), 15), ((8, 8, 8), 2), ((), 16)])
def test_sizes_that_cannot_be_reached_are_refused(channels, pixels):
    with pytest.raises(ValueError, match=rf"synthesis_size must be a positive multiple of .* got {pixels} with"):
        Synthesizer(8, channels, pixels)


def test_gradients_reach_noise_and_synthesizer_but_not_the_teacher(generator):
    generator.train()
    before = {name: value.clone() for name, value in generator.teacher.state_dict().items()}
    output = generator(torch.randn(5, 8))
    assert output.logits.shape == (5, 6) and output.teacher_input.shape == output.images.shape == (5, 3, 16, 16)
    output.logits.square().sum().backward()
    assert generator.shift.grad.abs().sum() > 0
    assert all(p.grad is not None for p in generator.synthesizer.parameters())
    assert all(p.grad is None for p in generator.teacher.parameters())
    after = generator.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_statistics_are_of_every_batch_norm_in_its_order(generator):
    layers = [m for m in generator.teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    output = generator(torch.randn(5, 8))
    assert all(rows.running_mean is layer.running_mean for rows, layer in zip(output.statistics, layers, strict=True))
    assert all(len(rows.mean) == layer.num_features for rows, layer in zip(output.statistics, layers, strict=True))
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_noise_that_is_not_learned_makes_no_difference_to_shapes():
    torch.manual_seed(0)
    net = GeneratorWithTeacher(Synthesizer(8, (8, 4), 16), SmallClassifier("test_resnet", 6, image_size=16))
    assert not net.shift.requires_grad and net(torch.randn(3, 8)).logits.shape == (3, 6)


def test_jitter_shifts_and_mirrors_every_image_for_itself():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 6, 6)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    found = set()
    for number, image in enumerate(jitter(images, 2)):
        views = {(i, j): padded[number, :, i : i + 6, j : j + 6] for i in range(5) for j in range(5)}
        places = [(*at, False) for at, view in views.items() if torch.equal(image, view)]
        places += [(*at, True) for at, view in views.items() if torch.equal(image, view.flip(2))]
        assert len(places) == 1
        found |= set(places)
    assert len({place[:2] for place in found}) > 15 and {place[2] for place in found} == {False, True}


@st.composite
def statistics(draw):
    """One to three layers of one to five channels: mean, variance, running mean, running variance."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        values = torch.randn(4, draw(st.integers(1, 5)), generator=random, dtype=torch.float64)
        layers.append(Statistics(values[0], values[1].exp(), values[2], values[3].exp()))
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
    earlier = [Statistics(m + 1, 2 * v, m, v) for m, v, *_ in layers]
    for found, (m, v, running_mean, running_variance) in zip(mixed(layers, earlier, momentum), layers, strict=True):
        torch.testing.assert_close(found.mean, (1 - momentum) * m + momentum * (m + 1))
        torch.testing.assert_close(found.variance, (1 - momentum) * v + momentum * 2 * v)
        assert found.running_mean is running_mean and found.running_variance is running_variance
    assert mixed(layers, [], momentum) == layers


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
