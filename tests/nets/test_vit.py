import os
import pickle
from copy import deepcopy

import pytest
import timm
import torch
from safetensors.torch import save_file

from fedlscl.nets import vit
from fedlscl.nets.lora import LowRank
from fedlscl.nets.vit import Foundation, FoundationConfig, fingerprint, foundation
from reference import lora as literal

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(foundation_config):
    return foundation(foundation_config)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights_file(model, tmp_path):
    save_file(model.vit.state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_split_at_any_block_gives_the_features_of_timm(name, images):
    """With a class token, with average and attention pooling, and with register tokens."""
    model = foundation(FoundationConfig(name=name, weights="random", image_size=32))
    expected = model.vit(images)
    assert expected.shape == (3, model.width)
    for block in range(model.depth + 1):
        torch.testing.assert_close(model.features(model.tokens(images, block), block), expected, **CLOSE)


@pytest.mark.parametrize("block", [0, 3, 5])
@pytest.mark.parametrize("targets", [["attn.qkv"], ["attn.proj", "mlp.fc1"], ["mlp.fc2"]])
def test_adapted_features_equal_timms_forward_pass_of_each_sample_with_its_own_weights(model, images, block, targets):
    torch.manual_seed(0)
    layers = {target: model.linear(block, target) for target in targets}
    updates = {
        target: LowRank(torch.randn(3, 2, layer.in_features), 0.1 * torch.randn(3, layer.out_features, 2), 0.5)
        for target, layer in layers.items()
    }
    found = model.features(model.tokens(images, block), block, updates)
    named = {f"blocks.{block}.{target}": update for target, update in updates.items()}
    torch.testing.assert_close(found, literal.adapted(model.vit, images, named), rtol=1e-4, atol=1e-5)
    assert (found - model.vit(images)).abs().max() > 1e-3
    assert not any(module._forward_hooks for module in model.vit.modules())


def test_hooks_are_removed_when_the_block_fails(model, images):
    bad = {"attn.qkv": LowRank(torch.randn(3, 2, 7), torch.randn(3, 7, 2), 1.0)}
    with pytest.raises(RuntimeError):
        model.features(model.tokens(images, 3), 3, bad)
    assert not any(module._forward_hooks for module in model.vit.modules())


def test_one_object_serves_the_process(model, foundation_config):
    assert foundation(foundation_config) is model
    assert deepcopy(model) is model
    assert pickle.loads(pickle.dumps(model)) is model


def test_another_process_rebuilds_the_same_weights(model, monkeypatch):
    pickled = pickle.dumps(model)
    assert len(pickled) < 1000
    monkeypatch.setattr(vit, "_shared", {})
    rebuilt = pickle.loads(pickled)
    assert rebuilt is not model and rebuilt.fingerprint == model.fingerprint


def test_building_leaves_the_random_generator_alone(foundation_config):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    Foundation(foundation_config)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_in_it_trains(model):
    assert not model.vit.training
    assert not any(parameter.requires_grad for parameter in model.vit.parameters())


def test_fingerprint_sees_every_bit_and_every_name(model):
    copy = deepcopy(model.vit)
    assert fingerprint(copy) == model.fingerprint
    weight = copy.blocks[5].mlp.fc2.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert fingerprint(copy) != model.fingerprint
    a, b = torch.nn.Module(), torch.nn.Module()
    a.first, b.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.second.load_state_dict(a.first.state_dict())
    assert fingerprint(a) != fingerprint(b)


def test_weights_come_back_from_a_file(model, weights_file):
    loaded = foundation(FoundationConfig(name="test_vit", weights=str(weights_file), image_size=32))
    assert loaded.fingerprint == model.fingerprint


def test_a_classification_head_in_the_file_is_left_out(model, tmp_path):
    path = tmp_path / "with_head.safetensors"
    save_file({**model.vit.state_dict(), "head.weight": torch.ones(9, 64), "head.bias": torch.ones(9)}, path)
    assert foundation(FoundationConfig(name="test_vit", weights=str(path), image_size=32)).fingerprint == (
        model.fingerprint
    )


def test_a_file_that_changed_is_read_anew(weights_file):
    config = FoundationConfig(name="test_vit", weights=str(weights_file), image_size=32)
    before = foundation(config)
    state = {name: value + 1 for name, value in before.vit.state_dict().items()}
    save_file(state, weights_file)
    os.utime(weights_file, (0, 0))
    assert foundation(config).fingerprint != before.fingerprint


def test_another_image_size_resizes_the_position_embedding(weights_file):
    large = foundation(FoundationConfig(name="test_vit", weights=str(weights_file), image_size=64))
    assert large.image_size == 64
    tokens = large.tokens(torch.randn(2, 3, 64, 64), 3)
    assert tokens.shape == (2, 17, 64)  # 4 x 4 patches of 16 pixels and a class token


def test_own_image_size_is_the_default():
    assert foundation(FoundationConfig(name="test_vit", weights="random")).image_size == 160


def test_normalisation_is_the_models_own(model):
    assert model.mean.tolist() == [0.5] * 3 and model.std.tolist() == [0.5] * 3


@pytest.mark.parametrize("block", [-1, 6, 99])
def test_a_block_beyond_the_vit_is_refused(model, block):
    with pytest.raises(ValueError, match=f"block {block} is beyond test_vit: choose 0 to 5"):
        model.block(block)


def test_a_target_that_is_no_linear_layer_is_refused_with_those_that_are(model):
    with pytest.raises(ValueError, match=r"'attn.q_norm' is no linear layer of block 2: choose from attn.qkv, attn.pr"):
        model.linear(2, "attn.q_norm")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"foundation 'deit_tony_patch16_224' is unknown to timm.*deit_tiny_patch16_224"
    ):
        foundation(FoundationConfig(name="deit_tony_patch16_224", weights="random"))


@pytest.mark.parametrize(("image_size", "reason"), [(None, "is a ResNet"), (32, "takes no image_size")])
def test_a_model_that_is_no_vit_is_refused(image_size, reason):
    with pytest.raises(ValueError, match=f"foundation 'test_resnet' {reason}: choose one of timm's"):
        foundation(FoundationConfig(name="test_resnet", weights="random", image_size=image_size))


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit2", num_classes=0, img_size=32).state_dict(), path)
    with pytest.raises(ValueError, match="do not fit 'test_vit'") as error:
        foundation(FoundationConfig(name="test_vit", weights=str(path), image_size=32))
    assert "\n" not in str(error.value)


def test_weights_that_lack_a_tensor_are_refused(model, tmp_path):
    state = model.vit.state_dict()
    del state["blocks.3.norm1.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"do not fit 'test_vit' .*blocks\.3\.norm1\.weight"):
        foundation(FoundationConfig(name="test_vit", weights=str(tmp_path / "short.safetensors"), image_size=32))


def test_a_missing_weights_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.safetensors' is no file"):
        foundation(FoundationConfig(name="test_vit", weights=str(tmp_path / "absent.safetensors")))


def test_a_damaged_weights_file_is_refused(weights_file):
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no safetensors file"):
        foundation(FoundationConfig(name="test_vit", weights=str(weights_file), image_size=32))


def test_a_failed_download_names_the_ways_out(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("We couldn't connect to the hub\nmore")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match=r"could not be made .*hub.*: name a safetensors file in weights, or 'random'"):
        foundation(FoundationConfig(name="test_vit", image_size=48))
