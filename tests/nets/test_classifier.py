import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.nets.net import CosineHead, LinearHead, make_head, prepare
from fedlscl.nets.vit import FoundationClassifier


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32))
def test_an_imprinted_cosine_head_answers_with_the_nearest_class_mean(num_classes, width, seed):
    torch.manual_seed(seed)
    head, means, features = CosineHead(width, num_classes), torch.randn(num_classes, width), torch.randn(8, width)
    head.imprint(torch.arange(num_classes), means)
    cosines = torch.stack([F.cosine_similarity(row, means, dim=1) for row in features])
    torch.testing.assert_close(head(features), 20 * cosines, rtol=1e-4, atol=1e-4)
    assert torch.equal(head(features).argmax(1), cosines.argmax(1)) or cosines.topk(2).values.diff().abs().min() < 1e-5


def test_imprinting_sets_only_the_rows_of_its_classes():
    head = CosineHead(4, 5)
    before = head.weight.detach().clone()
    head.imprint(torch.tensor([1, 3]), torch.full((2, 4), 7.0))
    assert torch.equal(head.weight[[0, 2, 4]], before[[0, 2, 4]])
    assert torch.equal(head.weight[[1, 3]], torch.full((2, 4), 0.5))
    assert head.weight.requires_grad


def test_a_linear_head_starts_from_its_random_rows():
    head = LinearHead(4, 5)
    before = head.weight.detach().clone()
    head.imprint(torch.tensor([1, 3]), torch.ones(2, 4))
    assert torch.equal(head.weight, before)


def test_no_row_of_a_cosine_head_wins_by_norm():
    torch.manual_seed(0)
    head, features = CosineHead(6, 3), torch.randn(4, 6)
    plain = head(features)
    with torch.no_grad():
        head.weight[1] *= 100
    torch.testing.assert_close(head(features), plain)
    torch.testing.assert_close(head(50 * features), plain)


@pytest.mark.parametrize(("kind", "expected"), [("linear", LinearHead), ("cosine", CosineHead)])
def test_heads_go_by_name(kind, expected):
    head = make_head(kind, 6, 3)
    assert type(head) is expected and head(torch.randn(2, 6)).shape == (2, 3) and len(head.weight) == 3


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="head must be one of linear, cosine, unit, got 'mlp'"):
        make_head("mlp", 6, 3)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_frozen_vit_with_a_head_owns_only_the_head(foundation_config, head):
    net = FoundationClassifier(foundation_config, 5, head)
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = net.foundation.vit(prepare(images, 32, net.foundation.mean, net.foundation.std))
    output = net(images)
    torch.testing.assert_close(output.features, expected, rtol=0, atol=1e-5)
    assert torch.equal(output.logits, net.head(output.features))
    assert {name.split(".")[0] for name in net.state_dict()} == {"head"}
    assert torch.equal(net(images, net.frozen_prefix(images)).logits, output.logits)
    output.logits.sum().backward()
    assert net.head.weight.grad.abs().sum() > 0
