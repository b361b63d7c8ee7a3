import os
import pickle
import re
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer

from fedlscl.nets import vit
from fedlscl.nets.vit import Foundation, FoundationConfig, LowRank, fingerprint, foundation
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
    compare(foundation(FoundationConfig(name=name, weights="random", image_size=32)), images)


def compare(model, images):
    expected = model.vit(images)
    assert expected.shape == (len(images), model.width)
    for block in range(model.depth + 1):
        torch.testing.assert_close(model.features(model.tokens(images, block), block), expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("deit_tiny_distilled_patch16_224", 32),
        ("deit_small_distilled_patch16_224", 32),
        ("deit_tiny_patch16_224", 32),
        ("deit3_small_patch16_224", 32),
        ("vit_wee_patch16_reg1_gap_256", 32),
        ("vit_pwee_patch16_reg1_gap_256", 32),
        ("vit_small_patch14_reg4_dinov2", 28),
        ("vit_tiny_r_s16_p8_224", 64),
    ],
)
def test_every_kind_of_prefix_token_head_and_block_gives_the_features_of_timm(name, image_size):
    """Distillation and register tokens, none for the class, average pooling, parallel blocks, convolutions first."""
    compare(
        foundation(FoundationConfig(name=name, weights="random", image_size=image_size)),
        torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(2)),
    )


class LastTwo(VisionTransformer):
    """Its head reads other tokens than the first."""

    def forward_head(self, x, pre_logits=False):
        return x[:, -2:].mean(1)


class PooledLast(VisionTransformer):
    """So does its pooling."""

    def pool(self, x, pool_type=None):
        return x[:, -1]


class Doubled(VisionTransformer):
    """Its features are not those of the blocks."""

    def forward_features(self, x, attn_mask=None, is_causal=False):
        return 2 * super().forward_features(x)


def build(kind, monkeypatch):
    options = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}

    def create(name, **given):
        vit = kind(**options)
        vit.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        return vit

    monkeypatch.setattr(timm, "create_model", create)
    return Foundation(FoundationConfig(name="test_vit", weights="random"))


@pytest.mark.parametrize("kind", [VisionTransformer, LastTwo, PooledLast])
def test_a_subclass_whose_head_reads_other_tokens_gives_its_own_features(kind, monkeypatch, images):
    compare(build(kind, monkeypatch), images)


def test_a_subclass_with_other_features_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="must be a plain VisionTransformer, got 'test_vit' of class Doubl"):
        build(Doubled, monkeypatch)


@pytest.mark.parametrize("blocks", [[0], [3], [5], [1, 5], range(6)])
@pytest.mark.parametrize("targets", [["attn.qkv"], ["attn.proj", "mlp.fc1"], ["attn.qkv", "mlp.fc2"]])
def test_adapted_features_equal_timms_forward_pass_of_each_sample_with_its_own_weights(model, images, blocks, targets):
    torch.manual_seed(0)
    layers = {(block, target): model.linear(block, target) for block in blocks for target in targets}
    updates = {
        name: LowRank(torch.randn(3, 2, layer.in_features), 0.1 * torch.randn(3, layer.out_features, 2), 0.5)
        for name, layer in layers.items()
    }
    found = model.features(model.tokens(images, blocks[0]), blocks[0], updates)
    named = {f"blocks.{block}.{target}": update for (block, target), update in updates.items()}
    torch.testing.assert_close(found, literal.adapted(model.vit, images, named), rtol=1e-4, atol=1e-5)
    assert (found - model.vit(images)).abs().max() > 1e-3
    assert not any(module._forward_hooks for module in model.vit.modules())


def test_hooks_are_removed_when_the_block_fails(model, images):
    bad = {(3, "attn.qkv"): LowRank(torch.randn(3, 2, 7), torch.randn(3, 7, 2), 1.0)}
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
    with pytest.raises(ValueError, match=f"block must be 0 to 5 for test_vit, got {block}"):
        model.block(block)


def test_a_target_that_is_no_linear_layer_is_refused_with_those_that_are(model):
    with pytest.raises(ValueError, match=r"target must be one of attn.qkv, attn.proj.* in block 2, got 'attn.q_norm'"):
        model.linear(2, "attn.q_norm")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"foundation 'deit_tony_patch16_224' is unknown to timm.*deit_tiny_patch16_224"
    ):
        foundation(FoundationConfig(name="deit_tony_patch16_224", weights="random"))


@pytest.mark.parametrize(
    ("name", "image_size", "reason"),
    [
        ("test_resnet", None, "must be a plain VisionTransformer, got 'test_resnet' of class ResNet"),
        ("test_resnet", 32, "'test_resnet' with weights 'random' could not be created .*'img_size'.*"),
        ("vit_small_patch16_dinov3", None, "must be a plain VisionTransformer, got .* of class Eva"),
        (
            "vit_relpos_small_patch16_224",
            None,
            "must be a plain VisionTransformer, got .* of class VisionTransformerRelPos",
        ),
    ],
)
def test_a_model_of_another_class_is_refused_with_the_class_that_is_meant(name, image_size, reason):
    with pytest.raises(ValueError, match=f"^foundation {reason}: choose a name .* whose timm class is VisionTr"):
        foundation(FoundationConfig(name=name, weights="random", image_size=image_size))


def test_a_tag_that_timm_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"with weights 'random' could not be created \(Invalid pretrained tag"):
        foundation(FoundationConfig(name="vit_tiny_patch16_224.absent", weights="random"))


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
    with pytest.raises(ValueError, match=r"weights must be .*, got '.*absent\.safetensors'"):
        foundation(FoundationConfig(name="test_vit", weights=str(tmp_path / "absent.safetensors")))


def test_a_damaged_weights_file_is_refused(weights_file):
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"must be a safetensors file, got .*: download it again or convert it"):
        foundation(FoundationConfig(name="test_vit", weights=str(weights_file), image_size=32))


def test_a_failed_download_names_the_ways_out(monkeypatch):
    def reject(*arguments, **options):
        raise OSError("We couldn't connect to the hub\nmore")

    monkeypatch.setattr(timm, "create_model", reject)
    with pytest.raises(
        ValueError, match=r"could not be created .*hub.*, or set weights to a safetensors file or 'random'"
    ):
        foundation(FoundationConfig(name="test_vit", image_size=48))


def load(path):
    return foundation(FoundationConfig(name="test_vit", weights=str(path), image_size=32))


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "backbone.", "module.model.", "student.backbone.", "_orig_mod."]
)
def test_prefixes_of_wrappers_are_left_out(model, tmp_path, prefix):
    state = {f"{prefix}{name}": value for name, value in model.vit.state_dict().items()}
    save_file({**state, f"{prefix}head.weight": torch.ones(9, 64)}, tmp_path / "wrapped.safetensors")
    assert load(tmp_path / "wrapped.safetensors").fingerprint == model.fingerprint


@pytest.mark.parametrize("prefixes", [("", "model."), ("student.backbone.", "teacher.backbone.")])
def test_weights_of_two_models_are_refused_with_their_prefixes(model, tmp_path, prefixes):
    state = {f"{prefix}{name}": value.clone() for prefix in prefixes for name, value in model.vit.state_dict().items()}
    save_file(state, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=" and ".join(repr(prefix) for prefix in prefixes)):
        load(tmp_path / "two.safetensors")


def test_a_tensor_outside_the_prefix_is_refused_by_name(model, tmp_path):
    state = {f"model.{name}": value for name, value in model.vit.state_dict().items()}
    save_file({**state, "projector.weight": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"do not fit 'test_vit' .*projector\.weight"):
        load(tmp_path / "more.safetensors")


def test_a_long_reason_ends_with_a_word(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "alien.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "alien.safetensors")
    assert re.search(
        r'\(Missing key\(s\) in state_dict: ("[\w.]+", )*"[\w.]+", \.\.\.\): choose the timm name', str(error.value)
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_file_is_refused_with_the_way_to_convert_it(model, tmp_path, legacy):
    torch.save(model.vit.state_dict(), tmp_path / "vit.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        ValueError, match=r"must be a safetensors file, got .*vit\.pth' .*convert it to safetensors, as docs"
    ):
        load(tmp_path / "vit.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_with_the_tensors_name(model, tmp_path, value, dtype):
    state = {name: weight.to(dtype, copy=True) for name, weight in model.vit.state_dict().items()}
    state["blocks.4.norm2.bias"][3] = value
    save_file(state, tmp_path / "diverged.safetensors")
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in blocks\.4\.norm2\.bias of "):
        load(tmp_path / "diverged.safetensors")


def test_the_command_in_the_docs_converts_a_pickled_file(model, tmp_path, monkeypatch):
    """The Python of docs/own_models.md, run as it stands."""
    page = (Path(__file__).parents[2] / "docs/own_models.md").read_text()
    (code,) = re.findall(r'^python -c "(.*save_file.*)"$', page, re.M)
    monkeypatch.chdir(tmp_path)
    torch.save(model.vit.state_dict(), "vit.pth")
    exec(code, {})
    assert load(tmp_path / "vit.safetensors").fingerprint == model.fingerprint
