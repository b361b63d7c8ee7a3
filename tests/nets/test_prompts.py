from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from fedlscl.methods.prompts import PromptedViT, PromptPool, insert_prompts, majority
from fedlscl.nets.net import prepare
from fedlscl.nets.vit import FoundationConfig, fingerprint, foundation
from reference import prompts as literal

CLOSE = {"rtol": 0, "atol": 1e-5}
CLASSES = 6


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_net(foundation_config):
    def make(size=8, length=2, top=3, vote=True, hidden=0, config=foundation_config):
        torch.manual_seed(0)
        pool = PromptPool(size, length, foundation(config).width, top, vote)
        return PromptedViT(config, CLASSES, pool, hidden)

    return make


def test_net_is_the_literal_one_of_each_image(make_net, images):
    net = make_net().eval()
    model = net.foundation
    output = net(images)
    for image, chosen, features in zip(images, output.chosen, output.features, strict=True):
        prepared = prepare(image[None], model.image_size, model.mean, model.std)[0]
        expected = literal.prompted_features(model.vit, prepared, net.pool.prompts[chosen].flatten(0, 1))
        torch.testing.assert_close(features, expected, **CLOSE)
    torch.testing.assert_close(output.logits, net.head(output.features))


def test_choice_is_the_nearest_keys_and_match_their_cosines(make_net, images):
    net = make_net().eval()
    query, output = net.frozen_prefix(images), net(images)
    for q, chosen, match in zip(query, output.chosen, output.match, strict=True):
        cosines = torch.stack([torch.cosine_similarity(q, key, dim=0) for key in net.pool.keys])
        assert chosen.tolist() == sorted(cosines.topk(3).indices.tolist())
        torch.testing.assert_close(match, cosines[chosen].sum(), **CLOSE)


def test_keys_learn_from_the_match_only_and_prompts_and_head_from_the_logits_only(make_net, images):
    net = make_net()
    net(images).logits.square().sum().backward()
    assert net.pool.keys.grad is None
    assert net.pool.prompts.grad.any() and net.head.weight.grad.any()
    net.zero_grad()
    net(images).match.sum().backward()
    assert net.pool.keys.grad.any()
    assert net.pool.prompts.grad is None and net.head.weight.grad is None


def test_only_chosen_prompts_get_a_gradient(make_net, images):
    net = make_net()
    output = net(images)
    output.logits.square().sum().backward()
    touched = net.pool.prompts.grad.flatten(1).any(1).nonzero().flatten().tolist()
    assert touched == sorted(set(output.chosen.flatten().tolist()))
    assert len(touched) == 3


def test_one_image_gets_the_same_logits_with_and_without_the_vote(make_net, images):
    voting, alone = make_net(vote=True).train(), make_net(vote=False).train()
    assert torch.equal(voting(images[:1]).logits, alone(images[:1]).logits)


def test_a_full_choice_makes_keys_irrelevant(make_net, images):
    net = make_net(size=3, top=3).train()
    expected = net(images).logits
    torch.nn.init.normal_(net.pool.keys)
    assert torch.equal(net(images).logits, expected)
    assert torch.equal(net.eval()(images).logits, expected)


@given(factors=st.lists(st.floats(0.01, 100), min_size=8, max_size=8), scale=st.floats(0.01, 100))
def test_choice_is_invariant_to_the_length_of_keys_and_query(factors, scale):
    torch.manual_seed(0)
    pool, query = PromptPool(8, 2, 16, 3).eval(), torch.randn(4, 16)
    chosen, match = pool.choose(query)
    pool.keys.data *= torch.tensor(factors)[:, None]
    again, rematch = pool.choose(query * scale)
    assert torch.equal(again, chosen)
    torch.testing.assert_close(rematch, match, rtol=1e-4, atol=1e-5)


@given(st.data())
def test_vote_is_the_literal_count(data):
    size, top = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 2))
    ids = st.lists(st.integers(0, size - 1), min_size=top, max_size=top, unique=True)
    choices = data.draw(st.lists(ids, min_size=1, max_size=5))
    voted = majority(torch.tensor(choices), size)
    assert voted.shape == (len(choices), top)
    assert all(sorted(row) == literal.vote(choices, size, top) for row in voted.tolist())


def test_a_training_batch_agrees_and_test_images_choose_alone(make_net, images):
    net = make_net(size=12, top=2)
    shared = net.train()(images).chosen
    assert (shared == shared[0]).all()
    together = net.eval()(images)
    assert (together.chosen != together.chosen[0]).any()
    for i in range(len(images)):
        alone, turned = net(images[i : i + 1]), net(images.flip(0))
        assert torch.equal(alone.chosen[0], together.chosen[i])
        torch.testing.assert_close(alone.logits[0], together.logits[i], **CLOSE)
        torch.testing.assert_close(turned.logits[len(images) - 1 - i], together.logits[i], **CLOSE)


def test_cached_prefix_is_the_plain_features_and_changes_nothing(make_net, images):
    net = make_net().eval()
    prefix = net.frozen_prefix(images)
    assert prefix.shape == (5, net.foundation.width)
    cached, direct = vars(net(images, prefix)), vars(net(images))
    assert all(torch.equal(cached[name], direct[name]) for name in direct)


def test_bf16_trains_and_keeps_keys_in_float32(make_net, images):
    net = make_net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(images, net.frozen_prefix(images).bfloat16())
    assert output.match.dtype == torch.float32
    (output.logits.float().square().sum() - output.match.sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("name", ["test_vit2", "test_vit3", "test_vit4"])
def test_other_poolings(name, make_net, images):
    """Average and attention pooling."""
    net = make_net(config=FoundationConfig(name=name, weights="random", image_size=32)).eval()
    output = net(images)
    assert output.features.shape == (5, net.foundation.width)
    output.logits.sum().backward()
    assert net.pool.prompts.grad.any()


@pytest.mark.parametrize(
    ("options", "start", "is_placed"),
    [
        ({}, 1, True),
        ({"no_embed_class": True}, 1, False),
        ({"class_token": False, "global_pool": "avg"}, 0, False),
        ({"reg_tokens": 2}, 3, True),
    ],
)
def test_prompts_stand_behind_class_and_register_tokens(options, start, is_placed):
    vit = VisionTransformer(img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=0, **options)
    tokens, prompts = torch.randn(2, 4 + start, 16), torch.randn(2, 3, 16)
    x = insert_prompts(SimpleNamespace(vit=vit), tokens, prompts)
    assert torch.equal(x[:, :start], tokens[:, :start]) and torch.equal(x[:, start + 3 :], tokens[:, start:])
    assert torch.equal(x[:, start : start + 3], prompts + vit.pos_embed[:, :1] if is_placed else prompts)


def test_hidden_units_stand_before_the_head(make_net, images):
    net = make_net(hidden=7).eval()
    output = net(images)
    torch.testing.assert_close(output.logits, net.head(net.hidden[0](output.features).relu()))
    assert net.head.weight.shape == (CLASSES, 7)


def test_state_is_prompts_keys_and_head_and_the_vit_stays_as_it_is(make_net, images):
    net = make_net()
    before = net.foundation.fingerprint
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    net(images).logits.square().sum().backward()
    optimizer.step()
    assert list(net.state_dict()) == ["head.weight", "head.bias", "pool.prompts", "pool.keys"]
    assert fingerprint(net.foundation.vit) == before


@pytest.mark.parametrize("top", [0, 9])
def test_a_choice_beyond_the_pool_is_refused_in_one_line(make_net, top):
    with pytest.raises(ValueError, match=rf"^top must be between 1 and the pool's 8 prompts, got {top}\.$"):
        make_net(top=top)
