import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from fedlscl.methods.fedbe import ExpandedViT, expansion_positions, identity_copy
from fedlscl.nets.net import prepare
from fedlscl.nets.vit import FoundationConfig, fingerprint, foundation, run_block


def make(config, num_expanded=3, awake=False):
    torch.manual_seed(0)
    net = ExpandedViT(config, 6, num_expanded).eval()
    if awake:
        for parameter in net.expanded.parameters():
            nn.init.normal_(parameter, std=0.2)
    return net


@pytest.fixture
def images():
    return torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def biased(foundation_config):
    """The shared ViT with biases everywhere, as a trained one has."""
    model = foundation(foundation_config)
    before = {name: value.clone() for name, value in model.vit.state_dict().items()}
    for name, parameter in model.vit.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    yield model
    model.vit.load_state_dict(before)


@pytest.mark.parametrize("num_expanded", [1, 2, 3, 4, 6])
def test_expansion_is_the_base_vit_bit_for_bit(biased, foundation_config, images, num_expanded):
    net = make(foundation_config, num_expanded)
    expected = biased.vit(prepare(images, biased.image_size, biased.mean, biased.std))
    with torch.no_grad():
        assert torch.equal(net(images).features, expected)
        assert torch.equal(net(images).logits, net.head(expected))
    # Under gradients attention is written out, and rounds in its own way.
    torch.testing.assert_close(net(images).features, expected, rtol=1e-5, atol=1e-5)


def test_a_copied_bias_would_break_the_identity(biased):
    """ViTs have biases in their output layers, LLaMA has none: zero weights alone are not enough."""
    block, x = biased.block(0), torch.randn(2, 5, biased.width)
    copy = identity_copy(block)
    assert torch.equal(copy(x), x) and torch.equal(run_block(copy, x), x)
    copy.attn.proj.bias.data.copy_(block.attn.proj.bias)
    assert not torch.allclose(copy(x), x)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_any_vit_of_timm(name, images):
    """With a class token, with average and attention pooling, and with register tokens."""
    config = FoundationConfig(name=name, weights="random", image_size=32)
    model = foundation(config)
    net = make(config, model.depth)
    with torch.no_grad():
        assert torch.equal(net(images).features, model.vit(prepare(images, model.image_size, model.mean, model.std)))


def test_new_blocks_stand_behind_their_groups(foundation_config, images):
    net = make(foundation_config, 2, awake=True)
    vit = net.foundation.vit
    x = net.foundation.tokens(prepare(images, 32, net.foundation.mean, net.foundation.std), 0)
    for index, block in enumerate(vit.blocks):
        x = block(x)
        x = net.expanded[0](x) if index == 2 else net.expanded[1](x) if index == 5 else x
    torch.testing.assert_close(net(images).features, vit.forward_head(vit.norm(x)), rtol=1e-5, atol=1e-5)


def test_output_layers_wake_first(foundation_config, images):
    net = make(foundation_config)
    net(images).logits.square().sum().backward()
    for block in net.expanded:
        moved = {name for name, p in block.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert moved == {f"{layer}.{part}" for layer in ("attn.proj", "mlp.fc2") for part in ("weight", "bias")}


def test_base_weights_get_no_gradient_and_stay(foundation_config, images):
    net = make(foundation_config, awake=True)
    optimizer = torch.optim.Adam(net.parameters())
    net.train()(images).logits.square().sum().backward()
    optimizer.step()
    vit = net.foundation.vit
    assert all(p.grad is None and not p.requires_grad for p in vit.parameters()) and not vit.training
    assert fingerprint(vit) == net.foundation.fingerprint
    assert {name.split(".")[0] for name in net.state_dict()} == {"expanded", "head"}


def test_only_allocated_blocks_learn(foundation_config, images):
    net = make(foundation_config, awake=True)
    for blocks in ([1], [0, 2], []):
        net.zero_grad()
        net.set_trainable(blocks)
        net(images).logits.sum().backward()
        trained = [any(p.grad is not None for p in block.parameters()) for block in net.expanded]
        assert trained == [number in blocks for number in range(3)] and net.head.weight.grad is not None


@pytest.mark.parametrize("num_expanded", [1, 2, 6])
def test_cached_tokens_change_nothing(foundation_config, images, num_expanded):
    net = make(foundation_config, num_expanded, awake=True)
    assert net.prefix_key.endswith(f"/32/{ {1: 5, 2: 3, 6: 1}[num_expanded] }")
    assert torch.equal(net(images, net.frozen_prefix(images)).logits, net(images).logits)


def test_bfloat16(foundation_config, images):
    net = make(foundation_config, awake=True)
    exact = net(images).features
    with torch.autocast("cpu", torch.bfloat16):
        output = net(images, net.frozen_prefix(images).bfloat16())
    output.logits.float().sum().backward()
    torch.testing.assert_close(output.features.float(), exact, rtol=0.2, atol=0.2)
    assert not torch.equal(output.features.float(), exact)
    assert all(p.grad.isfinite().all() for p in net.expanded.parameters())


@given(st.integers(1, 40), st.data())
def test_groups_are_even_and_end_at_the_last_block(depth, data):
    positions = expansion_positions(depth, data.draw(st.integers(1, depth)))
    sizes = [b - a for a, b in zip([0, *positions], positions, strict=False)]
    assert positions[-1] == depth and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_what_cannot_be_expanded_is_refused():
    for number in (0, 13):
        with pytest.raises(ValueError, match=f"num_expanded must be between 1 and the ViT's 12 blocks, got {number}"):
            expansion_positions(12, number)
    with pytest.raises(ValueError, match="foundation must have plain pre-norm blocks, got ResPostBlock"):
        identity_copy(ResPostBlock(16, 4))
