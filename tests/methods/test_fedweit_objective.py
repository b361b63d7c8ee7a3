import pytest
import torch

from fedlscl.data.loader import Batch
from fedlscl.functional.objectives import cross_entropy, retention
from fedlscl.methods import FedWeIT
from fedlscl.methods.fedweit import DecomposedClassifier, DecompositionModule
from reference import fedweit

WEIGHTS = FedWeIT(lambda_sparse=1e-3, lambda_mask=1e-2, lambda_retain=100.0, weight_decay=1e-4)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = DecomposedClassifier("test_resnet", 6, 16, num_tasks=2, num_clients=2, threshold=1e-3)
    net.begin_task(torch.tensor([0, 1]), 0)
    return net


@pytest.fixture
def batch():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.tensor([0, 1, 1, 0]), torch.arange(4))


def parts(net, pick):
    return torch.cat([pick(layer).flatten() for layer in net.convolutions.values()]).detach().double()


def test_the_first_tasks_terms_are_the_papers(net, batch):
    terms = DecompositionModule(net, torch.tensor([0, 1]), WEIGHTS).eval().loss(batch)
    base, adaptive, mask = (
        parts(net, pick)
        for pick in (lambda part: part.conv.weight, lambda part: part.adaptive[0], lambda part: part.mask[0])
    )
    squares = sum(float(value.square().sum()) for value in (base, adaptive, mask))
    assert terms.keys() == {"cross_entropy", "decay", "sparsity"}
    assert terms["decay"].item() == pytest.approx(1e-4 * squares / 2, rel=1e-5)
    expected = 1e-3 * float(adaptive.abs().sum()) + 1e-2 * float(mask.abs().sum())
    assert terms["sparsity"].item() == pytest.approx(expected, rel=1e-5)
    answers = net.eval()(batch.images).logits
    expected = cross_entropy(answers, batch.labels, torch.tensor([0, 1])).item()
    assert terms["cross_entropy"].item() == pytest.approx(expected, rel=1e-5)


def test_retention_is_zero_until_the_base_moves(net, batch):
    net.begin_task(torch.tensor([2, 3]), 1)
    module = DecompositionModule(net, torch.tensor([0, 1, 2, 3]), WEIGHTS)
    assert module.loss(batch)["retention"] == 0
    with torch.no_grad():
        for layer in net.convolutions.values():
            layer.adaptive[1].add_(1.0)
            layer.mask[1].add_(1.0)
    terms = module.loss(batch)
    assert terms["retention"] == 0
    base = parts(net, lambda layer: layer.conv.weight)
    squares = sum(
        float(parts(net, p).square().sum()) for p in (lambda part: part.adaptive[1], lambda part: part.mask[1])
    )
    assert terms["decay"].item() == pytest.approx(1e-4 * squares / 2, rel=1e-5) and base.any()
    with torch.no_grad():
        next(iter(net.convolutions.values())).conv.weight.add_(0.1)
    assert module.loss(batch)["retention"] > 0


def test_retention_is_that_of_all_earlier_weights():
    torch.manual_seed(0)
    base, anchor, masks, adaptives = (
        torch.randn(3, 2, 2, 2),
        torch.randn(3, 2, 2, 2),
        torch.randn(2, 3),
        torch.randn(2, 3, 2, 2, 2),
    )
    expected = fedweit.retention(base.tolist(), anchor.tolist(), masks.tolist(), adaptives.tolist())
    assert retention(base, anchor, masks.sigmoid()).item() == pytest.approx(expected, rel=1e-5)
