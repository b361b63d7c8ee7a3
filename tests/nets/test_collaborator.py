import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from fedlscl.nets import vit
from fedlscl.nets.collaborator import Collaborator
from fedlscl.nets.net import prepare
from fedlscl.nets.vit import fingerprint, split_lora
from reference import lora as literal

PARTS = {"small", "unit", "generator", "head"}
TARGETS = [("attn.qkv",), ("attn.proj",), ("mlp.fc1",), ("mlp.fc2",), ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def awake(config, num_classes=5):
    """A collaborator whose adapters do something; timm starts the last norm of a residual branch at zero."""
    torch.manual_seed(0)
    net = Collaborator(config, num_classes).eval()
    for parameter in net.small.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1)
    torch.nn.init.normal_(net.generator.weight, std=0.2)
    torch.nn.init.normal_(net.generator.bias, std=0.2)
    return net


@pytest.fixture
def images():
    return torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def entering(foundation_config, images):
    """What the ViT sees of the images."""
    model = vit.foundation(foundation_config)
    return prepare(images, model.image_size, model.mean, model.std)


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize("blocks", [[0], [3], [5], [1, 4], "all"])
def test_a_new_collaborator_is_the_frozen_vit_bit_for_bit(collaborator_config, images, entering, targets, blocks):
    net = Collaborator(replace(collaborator_config, targets=targets, blocks=blocks), 5).eval()
    model = net.foundation
    output = net(images)
    assert net.entry == (0 if blocks == "all" else blocks[0])
    assert torch.equal(output.tokens, model.features(model.tokens(entering, net.entry), net.entry))
    torch.testing.assert_close(output.tokens, model.vit(entering), rtol=0, atol=1e-5)
    assert torch.equal(output.logits, net.head(output.tokens))


def test_loaded_writing_factors_of_zero_give_the_frozen_vit_bit_for_bit(collaborator_config, images, entering):
    """Whatever CNN and reading factors were learned."""
    net = awake(collaborator_config)
    state = net.state_dict()
    (shape,) = net.shapes
    state["generator.weight"][shape.down_size :] = 0
    state["generator.bias"][shape.down_size :] = 0
    other = Collaborator(collaborator_config, 5).eval()
    other.load_state_dict(state)
    model = other.foundation
    assert torch.equal(other(images).tokens, model.features(model.tokens(entering, 3), 3))


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize("blocks", [[2], [4, 1], "all"], ids=str)
def test_every_sample_runs_through_a_vit_of_its_own(collaborator_config, images, entering, targets, blocks):
    """W0 + alpha / rank * up @ down of W = phi(theta(x)), one sample at a time through timm's own forward pass."""
    config = replace(collaborator_config, targets=targets, blocks=blocks, rank=3, alpha=1.5)
    net = awake(config)
    output = net(images)
    assert torch.equal(output.lora, net.generator(output.features))
    layers = [f"blocks.{i}.{t}" for i in (range(6) if blocks == "all" else sorted(blocks)) for t in targets]
    named = dict(zip(layers, split_lora(output.lora, net.shapes, scale=0.5), strict=True))
    torch.testing.assert_close(
        output.tokens, literal.adapted(net.foundation.vit, entering, named), rtol=1e-4, atol=1e-4
    )
    assert (output.tokens - net.foundation.vit(entering)).abs().max() > 1e-2


@pytest.mark.parametrize("blocks", [[0], [3], [5], [5, 2], "all"])
@pytest.mark.parametrize("collaboration", [True, False])
def test_cached_prefixes_change_no_bit(collaborator_config, images, blocks, collaboration):
    config = replace(collaborator_config, blocks=blocks, collaboration=collaboration)
    net = awake(config) if collaboration else Collaborator(config, 5).eval()
    direct, cached = vars(net(images)), vars(net(images, net.frozen_prefix(images)))
    assert all(torch.equal(cached[name], direct[name]) for name in direct)


def test_prefixes_are_shared_exactly_when_they_are_equal(collaborator_config, foundation_config):
    def key(**changed):
        return Collaborator(replace(collaborator_config, **changed), 5).prefix_key

    assert key() == key(blocks=(5, 3)) == key(rank=2, head="linear", small_image_size=20)
    others = [
        key(blocks=(2,)),
        key(collaboration=False),
        key(foundation=replace(foundation_config, image_size=48)),
        key(foundation=replace(foundation_config, name="test_vit2")),
    ]
    assert len({key(), *others}) == 5


def test_gradients_reach_cnn_generator_and_head_and_never_the_vit(collaborator_config, images):
    net = awake(collaborator_config).train()
    before = fingerprint(net.foundation.vit)
    net(images).logits.logsumexp(1).sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == PARTS
    assert all(parameter.grad is None for parameter in net.foundation.vit.parameters())
    assert fingerprint(net.foundation.vit) == before == net.foundation.fingerprint


def test_the_first_step_already_moves_the_writing_factors(collaborator_config, images):
    """Both factors at zero would have no gradient for ever."""
    net = Collaborator(collaborator_config, 5)
    net(images).logits.logsumexp(1).sum().backward()
    (shape,) = net.shapes
    assert net.generator.weight.grad[shape.down_size :].abs().sum() > 0


def test_the_state_is_what_the_client_owns(collaborator_config):
    net = Collaborator(collaborator_config, 5)
    assert {name.split(".")[0] for name in net.state_dict()} == PARTS
    assert not net.foundation.vit.state_dict().keys() & net.state_dict().keys()
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == PARTS


def test_loading_is_strict(collaborator_config):
    net = Collaborator(collaborator_config, 5)
    state = net.state_dict()
    with pytest.raises(RuntimeError, match="foundation"):
        net.load_state_dict({**state, "foundation.vit.cls_token": torch.zeros(1)})
    del state["head.weight"]
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        net.load_state_dict(state)


def test_copies_share_the_vit_and_nothing_else(collaborator_config, images):
    net = awake(collaborator_config)
    copy = deepcopy(net)
    assert copy.foundation is net.foundation
    assert torch.equal(copy(images).logits, net(images).logits)
    assert not {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in net.parameters()}


def test_pickles_leave_the_vit_at_home(collaborator_config, images, monkeypatch):
    net = awake(collaborator_config)
    pickled = pickle.dumps(net)
    assert len(pickled) < 1.2 * sum(value.nbytes for value in net.state_dict().values()) + 100_000
    monkeypatch.setattr(vit, "_shared", {})
    rebuilt = pickle.loads(pickled)
    assert rebuilt.foundation is not net.foundation
    assert torch.equal(rebuilt(images).logits, net(images).logits)


def test_train_mode_and_optimizers_do_not_reach_the_vit(collaborator_config):
    net = Collaborator(collaborator_config, 5).train().requires_grad_(True)
    assert not any(module.training for module in net.foundation.vit.modules())
    assert not any(p.requires_grad for p in net.foundation.vit.parameters())
    assert not {id(p) for p in net.foundation.vit.parameters()} & {id(p) for p in net.parameters()}


def test_without_collaboration_the_frozen_vit_and_the_head_remain(collaborator_config, images, entering):
    net = Collaborator(replace(collaborator_config, collaboration=False), 5)
    output = net(images)
    torch.testing.assert_close(output.tokens, net.foundation.vit(entering), rtol=0, atol=1e-5)
    assert output.features.shape == output.lora.shape == (4, 0)
    assert {name.split(".")[0] for name in net.state_dict()} == {"head"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"blocks": (3, 6)}, "block must be 0 to 5 for test_vit, got 6"),
        ({"blocks": ()}, "blocks and targets must not be empty"),
        ({"targets": ("attn.q",)}, "target must be one of attn.qkv.* got 'attn.q'"),
        ({"head": "mlp"}, "head must be one of cosine, linear, got 'mlp'"),
        ({"small_model": "resnet81"}, "small_model 'resnet81' is unknown"),
    ],
)
def test_shapes_that_cannot_be_are_refused(collaborator_config, changed, message):
    with pytest.raises(ValueError, match=message):
        Collaborator(replace(collaborator_config, **changed), 5)


@pytest.mark.parametrize("frozen", [True, False])
def test_features_of_a_cnn_that_is_not_trained_are_the_same_in_training(collaborator_config, images, frozen):
    """Without dropout or stochastic depth; a trained CNN keeps its own."""
    config = replace(collaborator_config, freeze_small=frozen, small_options={"drop_path_rate": 0.9})
    net = awake(config)
    tested = net.small(images)
    net.train()
    assert torch.equal(net.small(images), tested) == frozen
    assert net.head.training and net.small.training != frozen
