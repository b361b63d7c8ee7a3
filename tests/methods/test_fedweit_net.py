import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.methods.fedweit import (
    UNKNOWN,
    DecomposedClassifier,
    DecomposedConv,
    largest,
    pack_sparse,
    unpack_sparse,
)
from fedlscl.nets.net import SmallClassifier
from reference import fedweit

SHAPE = {"num_tasks": 3, "num_clients": 2, "threshold": 1e-3}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return DecomposedClassifier("test_resnet", 6, 16, **SHAPE)


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def layer():
    torch.manual_seed(1)
    layer = DecomposedConv(torch.nn.Conv2d(2, 3, 2), **(SHAPE | {"threshold": 0.05}))
    layer.knowledge.normal_()
    return layer


@torch.no_grad()
def fill(values, number):
    for value in values:
        value.fill_(number)


def test_alone_the_base_is_the_plain_network(net, images):
    """alpha = 0, A = 0, sigmoid(m) = 1."""
    for part in net.convolutions.values():
        fill(part.adaptive, 0.0), fill(part.attention, 0.0), fill(part.mask, 40.0)
    plain = SmallClassifier("test_resnet", 6, 16).eval()
    state = net.state_dict()
    for name in plain.state_dict():
        module, _, kind = name.rpartition(".")
        source = next(key for key in (name, f"{module}.conv.{kind}", f"{module}.norms.0.{kind}") if key in state)
        plain.state_dict()[name].copy_(state[source])
    assert torch.equal(net.eval()(images).logits, plain(images).logits)


def test_a_layers_weight_is_the_papers(layer):
    layer.train()
    parts = layer.conv.weight, layer.mask[0], layer.adaptive[0], layer.attention[0], layer.knowledge
    expected = fedweit.weight(*(part.tolist() for part in parts))
    assert {index: layer.weight()[index].item() for index in expected} == pytest.approx(expected, abs=1e-6)


def test_what_is_sent_and_evaluated_has_no_small_entry(layer):
    sent = layer.sparse_adaptive()
    assert not ((sent != 0) & (sent.abs() <= 0.05)).any()
    assert (sent == 0).any() and torch.equal(sent[sent != 0], layer.adaptive[0][sent != 0])
    difference = layer.train().weight() - layer.eval().weight()
    torch.testing.assert_close(difference, layer.adaptive[0] - sent)


def test_a_folded_task_predicts_as_before_after_later_downloads(layer):
    before = layer.eval().weight().detach().clone()
    layer.fold()
    layer.is_current = False
    layer.knowledge.normal_()
    torch.testing.assert_close(layer.weight(), before)
    assert torch.equal(layer.train().weight(), layer.eval().weight())


def test_a_bias_belongs_to_the_task(layer):
    x = torch.rand(1, 2, 4, 4)
    before = layer(x)
    fill(layer.bias[1:], 9.0)
    assert torch.equal(layer(x), before)
    layer.task = 1
    assert (layer(x) > 5).all()


def test_only_the_newest_tasks_parts_and_the_base_are_trained(net, images):
    net.begin_task(torch.tensor([0, 1]), 0)
    net.begin_task(torch.tensor([2, 3]), 1)
    net.train()(images).logits.square().sum().backward()
    for name, parameter in net.named_parameters():
        own = True
        if "adaptive" in name or "mask" in name or "attention" in name:
            own = name.endswith(".1")
        elif "norms" in name:
            own = ".norms.1." in name
        assert parameter.requires_grad is own and (parameter.grad is not None) is own, name


def test_every_tasks_model_answers_for_its_own_classes(net, images):
    net.begin_task(torch.tensor([0, 1]), 0)
    alone = net.eval()(images).logits
    net.begin_task(torch.tensor([3, 5]), 1)
    together = net(images).logits
    torch.testing.assert_close(together[:, [0, 1]], alone[:, [0, 1]])
    for classes in ([0, 1], [3, 5]):
        torch.testing.assert_close(together[:, classes].exp().sum(1), torch.ones(4))
    assert (together[:, [2, 4]] == UNKNOWN).all() and (alone[:, [2, 3, 4, 5]] == UNKNOWN).all()
    assert net.task == 1 and all(part.task == 1 for part in net.convolutions.values())


def test_a_loaded_state_answers_as_the_net_that_it_is_of(net, images):
    net.begin_task(torch.tensor([0, 1]), 0)
    net.begin_task(torch.tensor([2, 3]), 1)
    other = DecomposedClassifier("test_resnet", 6, 16, **SHAPE)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(images).logits, net.eval()(images).logits)


def test_a_new_tasks_norm_starts_where_the_last_one_ended(net, images):
    net.begin_task(torch.tensor([0, 1]), 0)
    net.train()(images)
    net.begin_task(torch.tensor([2, 3]), 1)
    state = net.state_dict()
    means = [name for name in state if name.endswith("norms.0.running_mean")]
    assert means and all(torch.equal(state[name], state[name.replace("norms.0", "norms.1")]) for name in means)
    assert any(state[name].any() and not state[name.replace("norms.0", "norms.2")].any() for name in means)


def test_a_net_with_other_layers_is_refused():
    with pytest.raises(ValueError, match=r"small_model must consist of convolutions .* got \w.*, a \w+\.$"):
        DecomposedClassifier("test_convnext", 6, 32, **SHAPE)


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), sparsity=st.floats(0, 0.99))
def test_the_largest_are_kept_in_exact_number(seed, n, sparsity):
    x = values(seed, n)
    kept = largest(x, sparsity)
    assert kept.sum() == n - int(sparsity * n)
    assert kept.all() or x[kept].abs().min() >= x[~kept].abs().max()


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_equal_values_are_kept_all_the_same(sparsity):
    """A strict comparison with the quantile would keep none of them."""
    assert largest(torch.ones(10), sparsity).sum() == 10 - int(10 * sparsity)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), columns=st.integers(1, 9), threshold=st.floats(0, 3))
def test_what_is_packed_comes_back_to_the_bit(seed, rows, columns, threshold):
    x = values(seed, rows, columns)
    x = torch.where(x.abs() > threshold, x, 0)
    kept, bits = pack_sparse(x)
    assert len(kept) == int((x != 0).sum()) and len(bits) == -(-x.numel() // 8)
    assert torch.equal(unpack_sparse(kept, bits, x.shape), x)
