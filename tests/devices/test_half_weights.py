"""The frozen ViT's half-precision copies: the bits of autocast's own casts, and float32 weights afterwards."""

from contextlib import nullcontext

import pytest
import torch

import tiny_methods
from fedlscl.nets.vit import Foundation, LowRankShape, fingerprint, foundation, split_lora
from fedlscl.testing import learn, same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_vit_has_the_bits_of_autocast_in_both_directions(foundation_config, dtype):
    vit = foundation(foundation_config)
    torch.manual_seed(0)
    images, shapes = torch.rand(3, 3, vit.image_size, vit.image_size), [LowRankShape(64, 192, 2)]
    lora = torch.randn(3, shapes[0].size, requires_grad=True)
    found = []
    for context in (nullcontext(), vit.cast(dtype), vit.cast(dtype)):
        with torch.autocast("cpu", dtype), context:
            tokens = vit.tokens(images, 1)
            features = vit.features(tokens, 1, {(1, "attn.qkv"): split_lora(lora, shapes, 1.0)[0]})
        (gradient,) = torch.autograd.grad(features.float().square().sum(), lora)
        found.append((tokens, features, gradient))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert found[0][2].abs().sum() > 0


def test_weights_are_float32_again_afterwards(foundation_config):
    vit = Foundation(foundation_config)
    layers = [layer for layer in vit.vit.modules() if isinstance(layer, torch.nn.Linear)]
    before = [layer.weight for layer in layers]
    with pytest.raises(KeyboardInterrupt), vit.cast(torch.bfloat16):
        assert all(layer.weight.dtype is torch.bfloat16 for layer in layers)
        assert all(p.dtype is torch.float32 for name, p in vit.vit.named_parameters() if "norm" in name)
        raise KeyboardInterrupt
    assert all(layer.weight is weight for layer, weight in zip(layers, before, strict=True))
    assert fingerprint(vit.vit) == vit.fingerprint


@pytest.mark.parametrize(
    "name",
    ["FedLSCL", *(pytest.param(name, marks=pytest.mark.slow) for name in ("LoRM", "FedBE", "PILoRA", "FedDualP"))],
)
def test_runs_in_bf16_have_the_same_bits_without_the_copies(name, monkeypatch):
    make, casts = tiny_methods.METHODS[name], []
    cast = Foundation.cast
    monkeypatch.setattr(Foundation, "cast", lambda self, dtype: casts.append(dtype) or cast(self, dtype))
    run = learn(make(), precision="bf16-mixed", rounds_per_task=1)
    assert set(casts) == {torch.bfloat16}
    monkeypatch.setattr(Foundation, "cast", lambda self, dtype: nullcontext())
    same(learn(make(), precision="bf16-mixed", rounds_per_task=1), run, "a run without copies")
