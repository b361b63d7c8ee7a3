from copy import deepcopy

import pytest
import torch
from torch import nn

from fedlscl.nets.lora_vit import LoraViT, OneTask
from fedlscl.nets.net import LinearHead, prepare
from fedlscl.nets.vit import FoundationConfig, fingerprint, foundation

EVERYWHERE = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make(config, awake=True, **options):
    """A net with six classes whose modules do something."""
    torch.manual_seed(0)
    net = LoraViT(config, LinearHead(foundation(config).width, 6), **({"rank": 2} | options)).eval()
    if awake:
        for layer in net.lora:
            for factor in layer.up:
                nn.init.normal_(factor, std=0.3)
    return net


def merged(net, tasks, shares=None):
    """The ViT with sum_t B_t A_t diag(share_t) added to its weights, as the equation says."""
    vit = deepcopy(net.foundation.vit)
    for layer in net.lora:
        linear = vit.blocks[layer.block].get_submodule(layer.target)
        start, end = layer.padding[0], linear.out_features - layer.padding[1]
        for t in tasks:
            share = 1.0 if shares is None else shares[t]
            linear.weight.data[start:end] += layer.up[t].data @ layer.down[t].data * share
    return vit


@pytest.fixture
def images():
    return torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def entering(foundation_config, images):
    """What the ViT sees of the images."""
    model = foundation(foundation_config)
    return prepare(images, model.image_size, model.mean, model.std)


@pytest.mark.parametrize("options", [{}, {"targets": EVERYWHERE}, {"blocks": (0,), "targets": ("attn.q", "attn.v")}])
def test_an_untrained_net_is_the_frozen_vit(foundation_config, images, entering, options):
    net = make(foundation_config, awake=False, num_tasks=3, **options)
    expected = net.foundation.vit(entering)
    torch.testing.assert_close(net(images).features, expected, **CLOSE)
    with torch.no_grad():  # under gradients attention is written out, and rounds in its own way
        if "blocks" not in options:  # so does the short cut of the last block
            assert torch.equal(net(images).features, expected)


@pytest.mark.parametrize("blocks", [None, (0,), (2, 4), (5,)])
@pytest.mark.parametrize("targets", [EVERYWHERE, ("attn.q", "attn.v"), ("attn.k",)])
def test_prediction_uses_the_sum_of_all_tasks_modules(foundation_config, images, entering, blocks, targets):
    """Also in evaluation mode: the released evaluation of PILoRA leaves them out."""
    net = make(foundation_config, blocks=blocks, targets=targets, num_tasks=3)
    output = net(images)
    torch.testing.assert_close(output.features, merged(net, range(3))(entering), **CLOSE)
    torch.testing.assert_close(output.logits, net.head(output.features))
    assert torch.equal(net.train()(images).logits, output.logits)
    assert (output.features - net.foundation.vit(entering)).abs().max() > 1e-3


def test_one_task_alone(foundation_config, images, entering):
    net = make(foundation_config, targets=EVERYWHERE, num_tasks=3)
    view = OneTask(net, 1)
    torch.testing.assert_close(view(images).features, merged(net, [1])(entering), **CLOSE)
    assert view.head is net.head and view.foundation is net.foundation and view.prefix_key == net.prefix_key
    assert torch.equal(view(images, view.frozen_prefix(images)).logits, view(images).logits)
    assert {id(p) for p in view.parameters()} == {id(p) for p in net.parameters()}


def test_shares_weigh_the_inputs_of_each_task(foundation_config, images, entering):
    net = make(foundation_config, blocks=(1, 5), targets=("mlp.fc1", "attn.qkv"), num_tasks=2)
    shares = torch.rand(2, net.foundation.width, generator=torch.Generator().manual_seed(0))
    for layer in net.lora:
        layer.share.copy_(shares)
    torch.testing.assert_close(net(images).features, merged(net, range(2), shares)(entering), **CLOSE)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_any_vit_of_timm(name, images):
    """With a class token, with average and attention pooling, and with register tokens."""
    config = FoundationConfig(name=name, weights="random", image_size=32)
    net = make(config, targets=("attn.qkv", "mlp.fc2"))
    vit = net.foundation
    expected = merged(net, [0])(prepare(images, vit.image_size, vit.mean, vit.std))
    torch.testing.assert_close(net(images).features, expected, **CLOSE)


@pytest.mark.parametrize(("target", "third"), [("attn.q", 0), ("attn.k", 1), ("attn.v", 2)])
def test_a_part_of_qkv_is_adapted_alone(foundation_config, target, third):
    net = make(foundation_config, blocks=(0,), targets=(target,))
    down, up, _ = net.lora[0].factors()
    width = net.foundation.width
    assert down.shape == (2, width) and up.shape == (3 * width, 2)
    rows = up.abs().sum(1).view(3, width) > 0
    assert rows[third].all() and rows.sum() == width


def test_only_what_learns_gets_a_gradient(foundation_config, images):
    net = make(foundation_config, targets=("attn.qkv",), num_tasks=3)
    for factors in (("up",), ("down",), ("down", "up")):
        net.zero_grad()
        net.set_trainable(1, factors)
        net(images).logits.sum().backward()
        for layer in net.lora:
            for kind in ("down", "up"):
                grads = [p.grad is not None for p in getattr(layer, kind)]
                assert grads == [False, kind in factors, False]
        assert net.head.weight.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in net.foundation.vit.parameters())


@pytest.mark.parametrize("blocks", [None, (3, 2)])
def test_cached_tokens_change_nothing(foundation_config, images, blocks):
    net = make(foundation_config, blocks=blocks)
    assert net.entry == (0 if blocks is None else 2)
    assert net.prefix_key.endswith(f"/32/{net.entry}")
    assert torch.equal(net(images, net.frozen_prefix(images)).logits, net(images).logits)


def test_the_shared_vit_is_left_as_it_was(foundation_config, images):
    net = make(foundation_config, targets=EVERYWHERE)
    assert not any(name.startswith("foundation") for name in net.state_dict())
    with pytest.raises(RuntimeError):
        net(images, torch.zeros(4, 5, net.foundation.width + 1))
    net(images)
    assert fingerprint(net.foundation.vit) == net.foundation.fingerprint
    assert not any(layer._forward_hooks for layer in net.foundation.vit.modules())


def test_state_of_one_shape_from_the_start(foundation_config, images):
    net, other = make(foundation_config, num_tasks=3), make(foundation_config, awake=False, num_tasks=3)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images).logits, net(images).logits)


@pytest.mark.parametrize("task", [None, 0])
def test_bfloat16(foundation_config, images, task):
    net = make(foundation_config, targets=EVERYWHERE, num_tasks=2)
    exact = net(images, None, task)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(images, net.frozen_prefix(images).bfloat16(), task)
    output.logits.float().sum().backward()
    torch.testing.assert_close(output.features.float(), exact.features, rtol=0.1, atol=0.1)
    assert not torch.equal(output.features.float(), exact.features)
    assert all(p.grad.isfinite().all() for p in net.lora[0].down[:1])


def test_what_makes_no_net_is_refused(foundation_config):
    with pytest.raises(ValueError, match=r"rank must be >= 1, got 0\."):
        make(foundation_config, rank=0)
    with pytest.raises(ValueError, match=r"target must be one of attn.qkv.*, got 'attn.o'"):
        make(foundation_config, targets=("attn.o",))
    with pytest.raises(ValueError, match="block must be 0 to 5 for test_vit, got 6"):
        make(foundation_config, blocks=(6,))
