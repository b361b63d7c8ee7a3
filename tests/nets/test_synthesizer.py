import pytest
import torch

from fedlscl.methods.data_free import GeneratorWithTeacher, Synthesizer, jitter
from fedlscl.nets.cnn import MEAN, STD, SmallClassifier


@pytest.fixture
def dreamer():
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
    with pytest.raises(ValueError, match=f"synthesis_size {pixels} is no multiple"):
        Synthesizer(8, channels, pixels)


def test_gradients_reach_noise_and_synthesizer_but_not_the_teacher(dreamer):
    dreamer.train()
    before = {name: value.clone() for name, value in dreamer.teacher.state_dict().items()}
    dream = dreamer(torch.randn(5, 8))
    assert dream.logits.shape == (5, 6) and dream.shown.shape == dream.images.shape == (5, 3, 16, 16)
    dream.logits.square().sum().backward()
    assert dreamer.shift.grad.abs().sum() > 0
    assert all(p.grad is not None for p in dreamer.synthesizer.parameters())
    assert all(p.grad is None for p in dreamer.teacher.parameters())
    after = dreamer.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_statistics_are_of_every_batch_norm_in_its_order(dreamer):
    layers = [m for m in dreamer.teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    dream = dreamer(torch.randn(5, 8))
    assert all(rows.running_mean is layer.running_mean for rows, layer in zip(dream.statistics, layers, strict=True))
    assert all(len(rows.mean) == layer.num_features for rows, layer in zip(dream.statistics, layers, strict=True))
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
