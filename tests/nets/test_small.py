import re
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import SelectAdaptivePool2d
from torch import nn

from fedlscl import SpatialTemporalDataModule
from fedlscl.nets.net import MEAN, STD, ProjectedFeatures, SmallClassifier, SmallModel

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
    unit = ProjectedFeatures(small.width, 24)
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
    unit = ProjectedFeatures(12, 12)
    assert isinstance(unit.project, nn.Identity)
    for scale in (1.0, 1e3):
        features = unit(scale * torch.randn(5, 12))
        torch.testing.assert_close(features.norm(dim=1), torch.ones(5), rtol=1e-3, atol=0)
        torch.testing.assert_close(features.sum(1), torch.zeros(5), rtol=0, atol=1e-5)
    assert isinstance(ProjectedFeatures(12, 8).project, nn.Linear)


def test_raw_features_are_the_projection_alone():
    unit, x = ProjectedFeatures(12, 8, unit_norm=False), torch.randn(5, 12)
    assert torch.equal(unit(x), unit.project(x))


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
    unit = ProjectedFeatures(small.width, 512)
    assert len(ids) == 129
    assert spread(small.eval(), unit, data.fetch(ids).images) == pytest.approx(float(at_rest), abs=1e-3)
    assert spread(small.train(), unit, data.fetch(ids).images) == pytest.approx(float(batch), abs=1e-3)


def test_the_page_states_the_presets_small_model_and_one_whose_features_differ():
    stated = {(name, int(size)): float(at_rest) for name, size, at_rest, _ in SPREADS}
    assert stated["mobilenetv3_small_100", 32] < 0.05 < 0.3 < stated["resnet18", 32]


QUICK = {
    "mambaout",
    "hieradet_sam2",
    "crossvit",
    "efficientvim",
    "resnet",
    "xcit",
    "mvitv2",
    "inception_v3",
}
"""Families of timm with maps, channels-last maps, tokens, lists of maps and a minimum input size."""
REFUSED = {"coat", "crossvit", "efficientvim"}
"""Their models return a list of feature maps."""


def smallest(family):
    """The model with the fewest parameters among those of a family of timm whose names promise few."""
    order = [
        "test_",
        "nano|femto|atto|pico|zepto|xx",
        r"tiny|xs|_ti|_t\d*_|050|_0\d\d|_n\d?",
        "small|mini|_s_|_s$|_s\\d",
    ]
    ranks = {
        name: next((rank for rank, words in enumerate(order) if re.search(words, name)), len(order))
        for name in timm.list_models(module=family)
    }
    with torch.device("meta"):
        nets = [timm.create_model(name, num_classes=0) for name in sorted(ranks, key=lambda name: ranks[name])[:3]]
    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in nets]
    net = nets[sizes.index(min(sizes))]
    return net.pretrained_cfg["architecture"], net


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in timm.list_modules()]
)
def test_every_family_of_timm_is_pooled_as_timm_pools_it_or_refused_in_one_line(family):
    """Shapes are found on the meta device, where no weights are computed; pooling is then compared on random maps."""
    name, net = smallest(family)
    size = net.pretrained_cfg["input_size"][-1]
    shown = 64 if not net.pretrained_cfg.get("fixed_input_size") and family != "inception_v3" else size
    with torch.device("meta"):
        try:
            small = SmallModel(name, shown).eval()
        except ValueError as error:
            assert family in REFUSED or shown != size, error
            assert re.fullmatch(rf"small_model '{name}' .+: choose another [\w ]+\.", str(error)), error
            return
        shape = small.cnn.forward_features(torch.zeros(2, 3, shown, shown)).shape
        assert small(torch.zeros(2, 3, shown, shown)).shape == (2, small.width)
    assert family not in REFUSED and small.width == net.num_features
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    has_adapted_head = [
        part for part in net.modules() if isinstance(part, SelectAdaptivePool2d) and part.pool_type == "avg"
    ]
    if maps.dim() == 4 and has_adapted_head:
        torch.testing.assert_close(small.pool(maps), has_adapted_head[-1].cpu()(maps).flatten(1))
    else:
        channels_last = maps.dim() < 4 or getattr(net, "output_fmt", None) == "NHWC"
        expected = maps.flatten(1, -2) if channels_last else maps.flatten(2).transpose(1, 2)
        torch.testing.assert_close(small.pool(maps), expected.mean(1))


@pytest.mark.parametrize("name", ["test_mambaout", "sam2_hiera_tiny"])
@pytest.mark.parametrize("size", [32, 64, 96])
def test_channels_last_maps_keep_their_channels_at_every_size(name, size):
    with torch.device("meta"):
        small = SmallModel(name, size)
    assert small.width == small.cnn.num_features and small.pooled_axes == (1, 2)


def test_features_of_a_channels_last_model_are_those_that_timms_own_head_pools():
    """test_mambaout's head takes the mean over the image and normalises it; at 64 pixels its maps are 2 x 2."""
    torch.manual_seed(0)
    small = SmallModel("test_mambaout", 64).eval()
    net = timm.create_model("test_mambaout", num_classes=0).eval()
    net.load_state_dict(small.cnn.state_dict(), strict=False)
    images = torch.randn(3, 3, 64, 64)
    pooled = small.pool(small.cnn.forward_features(images))
    expected = net.forward_head(net.forward_features(images), pre_logits=True)
    torch.testing.assert_close(net.head.pre_logits(net.head.norm(pooled)), expected)


class Fixed(nn.Module):
    """A model that returns given features, whatever it sees."""

    def __init__(self, features, **declared):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.features = features
        for name, value in declared.items():
            setattr(self, name, value)

    def forward_features(self, x):
        if isinstance(self.features, Exception):
            raise self.features
        if isinstance(self.features, list):
            return self.features
        return self.scale * self.features.expand(len(x), *self.features.shape[1:])


def fixed(monkeypatch, features, **declared):
    monkeypatch.setattr(timm, "create_model", lambda name, **options: Fixed(features, **declared))
    return SmallModel("test_resnet", 16)


@pytest.mark.parametrize(
    ("shape", "declared", "axes"),
    [
        ((1, 5, 2, 3), {}, (2, 3)),
        ((1, 5, 2, 3), {"num_features": 5}, (2, 3)),
        ((1, 2, 3, 5), {"num_features": 5, "output_fmt": "NHWC"}, (1, 2)),
        ((1, 5, 5, 5), {"num_features": 5, "output_fmt": "NHWC"}, (1, 2)),
        ((1, 7, 5), {"num_features": 5}, (1,)),
        ((1, 7, 5), {"num_features": 5, "output_fmt": "NHWC"}, (1,)),
        ((1, 5, 7), {"num_features": 5, "output_fmt": "NCL"}, (2,)),
        ((1, 5), {"num_features": 5}, ()),
    ],
)
def test_features_are_averaged_over_every_axis_but_batch_and_channels(monkeypatch, shape, declared, axes):
    features = torch.randn(shape)
    small = fixed(monkeypatch, features, **declared)
    assert small.width == 5
    expected = features.mean(axes) if axes else features
    assert torch.equal(small(torch.zeros(1, 3, 8, 8)), expected)


@pytest.mark.parametrize(
    ("features", "declared", "reason"),
    [
        (torch.ones(1, 2, 3, 5), {"num_features": 5}, r"5 channels, got shape \[1, 2, 3, 5\]"),
        (torch.ones(1, 5, 3, 2), {"num_features": 5, "output_fmt": "NHWC"}, "5 channels, got shape"),
        (torch.ones(1, 5, 7), {"num_features": 5}, "5 channels, got shape"),
        (torch.ones(1, 5, 2, 2, 2), {"num_features": 5}, "5 channels, got shape"),
        (torch.ones(1), {"num_features": 5}, "5 channels, got shape"),
        ([torch.ones(1, 5, 2, 2)], {"num_features": 5}, "one tensor of features, got a list"),
        (KeyError("patches"), {}, "cannot take images of 16 pixels .'patches'.: choose another small_image_size"),
        (TypeError("2 images are needed\nor more"), {}, r"pixels \(2 images are needed\): choose"),
        (AssertionError(), {}, r"pixels \(AssertionError\): choose"),
    ],
)
def test_features_without_the_declared_channels_are_refused_in_one_line(monkeypatch, features, declared, reason):
    with pytest.raises(ValueError, match=reason) as error:
        fixed(monkeypatch, features, **declared)
    assert str(error.value).startswith("small_model 'test_resnet' ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "size"), [("vit_tiny_patch16_224", 64), ("inception_v3", 32), ("halonet_h1", 64), ("test_resnet", 0)]
)
def test_an_image_size_that_a_model_cannot_take_is_refused_in_one_line(name, size):
    with torch.device("meta"), pytest.raises(ValueError, match=f"^small_model '{name}' cannot take images of {size} "):
        SmallModel(name, size)


def test_without_pretrained_weights_the_constants_stay(monkeypatch):
    """mobilenetv1_100's own weights want 0.5, random ones nothing."""
    small = SmallModel("mobilenetv1_100", 32)
    assert small.cnn.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert torch.equal(small.mean, torch.tensor(MEAN)) and torch.equal(small.std, torch.tensor(STD))


@pytest.mark.parametrize("name", ["mobilenetv1_100", "test_resnet", "resnet18", "mobilenetv3_large_100.miil_in21k"])
def test_pretrained_weights_bring_their_mean_and_std(monkeypatch, name):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    small = SmallModel(name, 32, pretrained=True)
    cfg = timm.get_pretrained_cfg(name)
    assert (
        small.mean.tolist() == torch.tensor(cfg.mean).tolist() and small.std.tolist() == torch.tensor(cfg.std).tolist()
    )
    assert not {"mean", "std"} & small.state_dict().keys()


def test_a_pretrained_model_without_a_declared_normalisation_keeps_the_constants(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, **options: Fixed(torch.ones(1, 5, 2, 2)))
    assert torch.equal(SmallModel("test_resnet", 16, pretrained=True).mean, torch.tensor(MEAN))


@pytest.mark.parametrize(
    ("name", "pretrained", "reason"),
    [
        (
            "efficientnet_b6",
            True,
            r"No pretrained weights exist.*\): choose a name from timm\.list_models\(pretrained=",
        ),
        ("resnet18.absent", True, "Invalid pretrained tag"),
        ("resnet18.absent", False, r"Invalid pretrained tag.*\): choose another name\.$"),
    ],
)
def test_weights_that_timm_does_not_have_are_refused(name, pretrained, reason):
    with torch.device("meta"), pytest.raises(ValueError, match=f"^small_model '{name}' could not be created .{reason}"):
        SmallModel(name, 32, pretrained)


def test_a_failed_download_is_refused_with_the_name_and_the_ways_out(monkeypatch):
    def reject(*arguments, **options):
        raise OSError("Cannot reach the hub.\nmore")

    monkeypatch.setattr(timm, "create_model", reject)
    with pytest.raises(ValueError) as error:
        SmallModel("resnet18", 32, pretrained=True)
    assert str(error.value) == (
        "small_model 'resnet18' could not be created (Cannot reach the hub): choose a name from "
        "timm.list_models(pretrained=True), connect to the network, or set pretrained to false."
    )


EFFICIENTNET = Path(__file__).parents[3] / "shared/data/tf_efficientnet_lite0.safetensors"


@pytest.mark.skipif(not EFFICIENTNET.is_file(), reason="needs the pretrained EfficientNet-Lite0 in ../shared/data")
def test_a_pretrained_file_is_loaded_with_its_own_normalisation():
    """float16, with a head, without num_batches_tracked."""
    small = SmallModel("tf_efficientnet_lite0", 32, weights=str(EFFICIENTNET))
    stored = load_file(EFFICIENTNET)
    assert small.normalisation == {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    for name, value in small.cnn.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert value.dtype == torch.float32 and torch.equal(value, stored[name].float())


def saved(folder, state):
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "cnn.safetensors")
    return str(folder / "cnn.safetensors")


def test_weights_of_a_file_replace_the_start(tmp_path):
    torch.manual_seed(1)
    other = SmallModel("test_resnet", 16)
    path = saved(tmp_path, {**other.cnn.state_dict(), "fc.weight": torch.zeros(3, 3)})
    torch.manual_seed(2)
    small = SmallModel("test_resnet", 16, weights=path)
    assert all(torch.equal(value, other.cnn.state_dict()[name]) for name, value in small.cnn.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state, name: state.pop(name), r"small_weights must be of test_resnet, got .*Missing key.*conv1"),
        (lambda state, name: state.update({name: torch.ones(1)}), r"size mismatch.*torch.Size\(\[1\]\)"),
        (
            lambda state, name: state[name].fill_(torch.nan),
            "small_weights must be finite, got NaN or infinity in conv1",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, spoil, message):
    state = {name: value.clone() for name, value in SmallModel("test_resnet", 16).cnn.state_dict().items()}
    spoil(state, next(iter(state)))
    with pytest.raises(ValueError, match=message):
        SmallModel("test_resnet", 16, weights=saved(tmp_path, state))


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "cnn.pt").write_bytes(b"PK")
    for path, message in ((tmp_path / "cnn.pt", "convert it"), (tmp_path / "none", "No such file")):
        with pytest.raises(ValueError, match=f"small_weights must be a safetensors file, got .*{message}"):
            SmallModel("test_resnet", 16, weights=str(path))
    with pytest.raises(ValueError, match="pretrained must be false with small_weights"):
        SmallModel("test_resnet", 16, pretrained=True, weights="x")


def test_options_reach_timm():
    small = SmallModel("resnet18", 32, options={"norm_layer": "groupnorm"})
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in small.modules())
