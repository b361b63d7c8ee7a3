import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.data.loader import Batch
from fedlscl.functional.objectives import compensation_weights
from fedlscl.methods.glfc import CompensationModule
from fedlscl.nets.net import Net, Output
from reference import glfc


class Table(Net):
    """Logits that are looked up by the first pixel."""

    def __init__(self, logits):
        super().__init__()
        self.head = torch.nn.Linear(1, logits.shape[1])
        self.logits = torch.nn.Parameter(logits.clone())

    def forward(self, images, prefix=None):
        return Output(self.logits, self.logits[images[:, 0, 0, 0].long()])


def batch(labels):
    index = torch.arange(len(labels))
    return Batch(index[:, None, None, None].expand(-1, 3, 1, 1), torch.tensor(labels), index)


def logits(seed, n=6):
    return 2 * torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 10**6), labels=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_each_group_weighs_one_on_the_mean(seed, labels):
    labels = torch.tensor(labels)
    weights = compensation_weights(logits(seed, len(labels)), labels, labels < 2)
    for group in (labels < 2, labels >= 2):
        if group.any():
            torch.testing.assert_close(weights[group].mean(), torch.tensor(1.0))


def test_a_group_without_gradient_weighs_one_throughout():
    fitted = torch.tensor([[1e4, 0.0], [1e4, 0.0]])
    assert compensation_weights(fitted, torch.tensor([0, 0]), torch.tensor([True, True])).tolist() == [1, 1]


def test_without_memory_and_old_model_it_is_the_mean_binary_cross_entropy():
    net, labels = Table(logits(0)), [0, 1, 3, 3, 1, 0]
    terms = CompensationModule(net, torch.tensor([0, 1, 3])).loss(batch(labels))
    assert terms.keys() == {"compensation"}
    expected = glfc.loss(net.logits, torch.tensor(labels), [0, 1, 3])
    assert terms["compensation"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("new", [None, [3, 4]])
def test_the_objective_is_the_papers(new):
    net, previous, labels = Table(logits(1)), Table(logits(2)), [0, 4, 3, 3, 1, 0]
    chosen = None if new is None else torch.tensor(new)
    columns, old = torch.tensor([0, 1, 3, 4]), torch.tensor([0, 1])
    terms = CompensationModule(net, columns, chosen, previous, old).loss(batch(labels))
    expected = glfc.loss(net.logits, torch.tensor(labels), columns.tolist(), new, previous.logits, old.tolist())
    assert sum(terms.values()).item() == pytest.approx(expected, rel=1e-5)
    assert terms["compensation"].item() != pytest.approx(terms["relation"].item(), rel=1e-3)


def test_relation_leaves_old_columns_alone_where_the_old_model_agrees():
    net, old = Table(logits(3)), torch.tensor([0, 2])
    module = CompensationModule(net, torch.arange(5), previous=Table(logits(3)), old=old)
    module.loss(batch([1, 3, 4, 1, 0, 2]))["relation"].backward()
    assert not net.logits.grad[:, old].any() and net.logits.grad[:, [1, 3, 4]].all()


def test_columns_of_other_classes_get_no_gradient():
    net = Table(logits(4))
    terms = CompensationModule(net, torch.tensor([0, 1]), torch.tensor([1])).loss(batch([0, 1, 1, 0, 0, 1]))
    terms["compensation"].backward()
    assert not net.logits.grad[:, 2:].any() and net.logits.grad[:, :2].all()
