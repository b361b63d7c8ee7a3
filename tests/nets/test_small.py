import re
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from fedlscl import SpatialTemporalDataModule
from fedlscl.nets.small import SmallClassifier, SmallModel, UnitFeatures

WIDTHS = {
    "resnet18": 512,
    "mobilenetv3_large_100": 960,
    "densenet121": 1024,
    "efficientnet_b3": 1536,
    "vgg16": 512,
}
"""Channels of the last feature maps of the paper's small models."""


@pytest.mark.parametrize("name", [name for name in WIDTHS if name != "vgg16"])
def test_small_models_of_the_paper_meet_in_one_feature_space_without_an_idle_weight(name):
    torch.manual_seed(0)
    small = SmallModel(name, image_size=32)
    unit = UnitFeatures(small.width, 24)
    pooled = small(torch.randint(256, (4, 3, 20, 20), dtype=torch.uint8))
    features = unit(pooled)
    assert small.width == WIDTHS[name] and pooled.shape == (4, WIDTHS[name]) and features.shape == (4, 24)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4), rtol=1e-3, atol=0)
    features[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_vgg16_loses_its_124_million_idle_weights():
    """On the meta device, where they cost nothing: what remains are its 13 convolutions, 14,714,688 weights."""
    with torch.device("meta"):
        small = SmallModel("vgg16", image_size=64)
        features = small(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, 512) and small.width == WIDTHS["vgg16"]
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    expected = sum(9 * before * after + after for before, after in pairwise(channels))
    assert sum(parameter.numel() for parameter in small.parameters()) == expected == 14_714_688
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_pooled_features_are_the_mean_over_the_feature_maps():
    small = SmallModel("test_resnet", image_size=64).eval()
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    maps = small.cnn.forward_features((images - mean) / std)
    assert maps.shape[-2:] == (2, 2)
    torch.testing.assert_close(small(images), maps.mean((2, 3)))


def test_building_draws_the_weights_that_timm_draws():
    """The search for unused parts takes nothing from the generator and leaves no gradient and no statistics."""
    torch.manual_seed(3)
    expected = timm.create_model("test_resnet", num_classes=0)
    torch.manual_seed(3)
    small = SmallModel("test_resnet", image_size=16)
    states = expected.state_dict(), small.cnn.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    torch.manual_seed(3)
    timm.create_model("test_resnet", num_classes=0)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    SmallModel("test_resnet", image_size=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in small.parameters())
    assert all(module.training for module in small.modules())


def test_features_are_centred_and_of_unit_norm_whatever_the_scale():
    unit = UnitFeatures(12, 12)
    assert isinstance(unit.project, nn.Identity)
    for scale in (1.0, 1e3):
        features = unit(scale * torch.randn(5, 12))
        torch.testing.assert_close(features.norm(dim=1), torch.ones(5), rtol=1e-3, atol=0)
        torch.testing.assert_close(features.sum(1), torch.zeros(5), rtol=0, atol=1e-5)
    assert isinstance(UnitFeatures(12, 8).project, nn.Linear)


def test_normalisation_constants_travel_with_the_net_but_not_in_its_state():
    small = SmallModel("test_resnet", image_size=16)
    assert not {"mean", "std"} & small.state_dict().keys()
    assert {name for name, _ in small.named_buffers()} >= {"mean", "std"}


def test_a_classifier_is_a_small_model_with_a_linear_head():
    net = SmallClassifier("test_resnet", 7, 16).eval()
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    output = net(images)
    assert torch.equal(output.features, net.small(images)) and output.logits.shape == (2, 7)
    assert torch.equal(output.logits, net.head(output.features)) and net.prefix_key is None
    with pytest.raises(NotImplementedError, match="SmallClassifier has no frozen part"):
        net.frozen_prefix(images)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"small_model 'resnet81' is unknown to timm.*resnet18"):
        SmallModel("resnet81", 32)


PAGE = Path(__file__).parents[2] / "docs/methods/fedlscl.md"
IMAGES = Path(__file__).parents[2].parent / "shared/data/cifar100_100x30.npz"
SPREADS = re.findall(r"^\| `(\w+)`, (\d+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.M)


def spread(small, unit, images):
    """Mean distance of E from its mean over images."""
    with torch.no_grad():
        features = unit(small(images))
    return (features - features.mean(0)).norm(dim=1).mean().item()


@pytest.mark.skipif(not IMAGES.is_file(), reason="needs ../shared/data/cifar100_100x30.npz")
@pytest.mark.parametrize(("name", "size", "at_rest", "batch"), SPREADS, ids=lambda value: value)
def test_the_spread_of_features_is_what_the_page_states(name, size, at_rest, batch):
    shape = {"num_clients": 5, "num_tasks": 5, "private_classes": 15, "public_classes": 25}
    data = SpatialTemporalDataModule(
        dataset=IMAGES.name, root=str(IMAGES.parent), train_per_class=25, test_per_class=15, seed=42, **shape
    )
    ids = torch.cat([data.stream(client).train_ids(0) for client in range(5)])[::4]
    torch.manual_seed(42)
    small = SmallModel(name, int(size))
    unit = UnitFeatures(small.width, 512)
    assert len(ids) == 129
    assert spread(small.eval(), unit, data.fetch(ids).images) == pytest.approx(float(at_rest), abs=1e-3)
    assert spread(small.train(), unit, data.fetch(ids).images) == pytest.approx(float(batch), abs=1e-3)


def test_the_page_states_the_presets_small_model_and_one_whose_features_differ():
    stated = {(name, int(size)): float(at_rest) for name, size, at_rest, _ in SPREADS}
    assert stated["mobilenetv3_small_100", 32] < 0.05 < 0.3 < stated["resnet18", 32]
