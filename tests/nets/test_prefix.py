from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import Attention, Block, ResPostBlock
from torch import nn

from fedlscl.methods.prompts import PrefixedViT, Prefixes, run_blocks
from fedlscl.nets.vit import FoundationConfig, attend, fingerprint, foundation, run_block
from reference import prompts as literal

CLOSE = {"rtol": 0, "atol": 1e-5}
CLASSES, SLOTS = 6, 4


class _Other(Attention):
    """An attention that timm may write differently."""


@pytest.fixture
def model(foundation_config):
    return foundation(foundation_config)


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_net(foundation_config):
    def make(general=(0, 1), expert=(2, 3, 4), general_length=3, expert_length=2, config=foundation_config):
        torch.manual_seed(0)
        return PrefixedViT(config, CLASSES, general, expert, general_length, expert_length, SLOTS)

    return make


def test_batched_prefixes_are_those_of_each_image(model):
    torch.manual_seed(0)
    bank, slots = Prefixes(model, (2, 4), SLOTS, 3), torch.tensor([3, 0, 0, 2, 1])
    batched = bank(slots)
    assert list(batched) == [2, 4]
    for index, block in enumerate((2, 4)):
        assert batched[block].shape == (2, 5, 3, model.width)
        for image, slot in enumerate(slots):
            for part in range(2):  # keys, values
                assert torch.equal(batched[block][part, image], bank.prompts[index, part, slot])


def test_the_released_reshape_would_mix_keys_and_values(model):
    """What the card warns of: all images on one slot, yet half of them get (key, key), half (value, value)."""
    torch.manual_seed(0)
    bank, slots = Prefixes(model, (2,), SLOTS, 3), torch.zeros(4, dtype=torch.long)
    mixed = bank.prompts[:, :, slots].reshape(1, 4, 2, 3, model.width)
    assert torch.equal(mixed[0, 0, 1], bank.prompts[0, 0, 0]), "a key in the place of a value"
    assert torch.equal(bank(slots)[2][1, 0], bank.prompts[0, 1, 0])


def test_attention_is_the_literal_one_of_each_image(model):
    torch.manual_seed(0)
    attention = model.block(2).attn
    x, prefix = torch.randn(4, 5, model.width), torch.randn(2, 4, 3, model.width)
    expected = torch.stack([literal.attention_with_prefix(attention, x[i], prefix[:, i]) for i in range(4)])
    for is_explicit in (False, True):
        torch.testing.assert_close(attend(attention, x, prefix, is_explicit), expected, **CLOSE)


def test_net_is_the_literal_one_of_each_image(make_net, images):
    net, slots = make_net(), torch.tensor([0, 1, 2, 3, 3, 0])
    vit, tokens = net.foundation.vit, net.frozen_prefix(images, 0)
    expected = []
    for x, slot in zip(tokens, slots, strict=True):
        for index in range(2):
            x = literal.block_with_prefix(vit.blocks[index], x, net.general.prompts[index, :, 0])
        for index in range(3):
            x = literal.block_with_prefix(vit.blocks[2 + index], x, net.expert.prompts[index, :, slot])
        expected.append(vit.norm(vit.blocks[5](x[None]))[0, 0])
    output = net(images, slots=slots)
    torch.testing.assert_close(output.features, torch.stack(expected), rtol=0, atol=1e-4)
    assert torch.equal(output.chosen[:, 0], slots)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_an_empty_prefix_is_the_plain_vit_bit_for_bit(make_net, images, name):
    config = FoundationConfig(name=name, weights="random", image_size=32)
    net = make_net(general_length=0, expert_length=0, config=config)
    x = net.frozen_prefix(images, 0)
    for block in net.foundation.vit.blocks[:5]:
        x = run_block(block, x)
    assert torch.equal(net(images).features, net.foundation.features(x, 5))


def test_a_zero_key_and_value_scale_each_head_by_its_softmax_sum(model):
    torch.manual_seed(0)
    attention, x = deepcopy(model.block(0).attn), torch.randn(2, 5, model.width)
    attention.proj = nn.Identity()
    plain, scaled = (attend(attention, x, torch.zeros(2, 2, length, model.width)) for length in (0, 1))
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    z = (q @ k.mT * attention.scale).exp().sum(-1)  # (B, heads, N)
    expected = plain.unflatten(-1, (attention.num_heads, -1)) * (z / (z + 1)).mT[..., None]
    torch.testing.assert_close(scaled, expected.flatten(-2), **CLOSE)


def test_a_prefix_in_the_last_block_counts(make_net, images):
    net = make_net(general=(0,), expert=(5,))
    first, second = (net(images, slots=torch.full((6,), slot)).features for slot in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)
    x = run_blocks(net.foundation, net.frozen_prefix(images, 0), 0, 5, net.general(torch.zeros(6, dtype=torch.long)))
    x = run_block(net.foundation.vit.blocks[5], x, net.expert(torch.zeros(6, dtype=torch.long))[5])
    torch.testing.assert_close(first, net.foundation.vit.norm(x)[:, 0], **CLOSE)


def test_images_match_a_slot_each_on_its_own(make_net, images):
    net = make_net().eval()
    net.keys.data[:2] = net.frozen_prefix(images)[[0, 3]]
    together = net(images)
    assert together.chosen[0].item() == 0 and together.chosen[3].item() == 1
    for i in range(len(images)):
        alone = net(images[i : i + 1])
        assert torch.equal(alone.chosen[0], together.chosen[i])
        torch.testing.assert_close(alone.logits[0], together.logits[i], **CLOSE)
    cosines = torch.cosine_similarity(net.frozen_prefix(images)[:, None], net.keys[None], dim=2)
    assert torch.equal(together.chosen[:, 0], cosines.argmax(1))
    torch.testing.assert_close(together.match, cosines.amax(1), **CLOSE)


def test_given_slots_alone_get_gradients_and_keys_only_from_the_match(make_net, images):
    net, slots = make_net(), torch.full((6,), 2)
    net(images, slots=slots).logits.square().sum().backward()
    assert net.keys.grad is None
    assert net.expert.prompts.grad.transpose(0, 2).flatten(1).any(1).tolist() == [False, False, True, False]
    assert net.general.prompts.grad.flatten(1).any(1).all()
    net.zero_grad()
    net(images, slots=slots).match.sum().backward()
    assert net.keys.grad.any(1).tolist() == [False, False, True, False]
    assert net.expert.prompts.grad is None and net.head.weight.grad is None


def test_cached_prefix_changes_nothing(make_net, images):
    net = make_net()
    cached, direct = vars(net(images, net.frozen_prefix(images))), vars(net(images))
    assert all(torch.equal(cached[name], direct[name]) for name in direct)


def test_bf16_trains(make_net, images):
    net = make_net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(images, slots=torch.tensor([0, 1, 2, 3, 0, 1]))
    (output.logits.float().square().sum() - output.match.sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def test_state_is_prefixes_keys_and_head_and_the_vit_stays_as_it_is(make_net, images):
    net = make_net()
    before = net.foundation.fingerprint
    net(images).logits.square().sum().backward()
    torch.optim.Adam(net.parameters(), 0.1).step()
    assert set(net.state_dict()) == {"general.prompts", "expert.prompts", "keys", "head.weight", "head.bias"}
    assert fingerprint(net.foundation.vit) == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"expert": (2, 6)}, r"block must be 0 to 5 for test_vit, got 6\."),
        ({"expert": (1, 2)}, r"general and expert blocks must be disjoint, got \[1\] in both\."),
    ],
)
def test_blocks_that_take_no_prefix_are_refused_in_one_line(make_net, changed, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        make_net(**changed)


@pytest.mark.parametrize(
    "block", [ResPostBlock(32, 4), Block(32, 4, qkv_bias=True, attn_layer=_Other)], ids=["block", "attention"]
)
def test_a_block_written_in_another_way_is_refused_in_one_line(block):
    model = SimpleNamespace(block=lambda index: block, config=FoundationConfig(name="vit_odd"))
    with pytest.raises(
        ValueError, match=r"^foundation must be a plain vit_\* or deit_\* model, got vit_odd with block 2\.$"
    ):
        Prefixes(model, (2,), 1, 3)
