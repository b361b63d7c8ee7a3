import pytest
import torch

from fedlscl.federated.client import Client
from fedlscl.methods import EWC, FedAvg
from fedlscl.methods.fedavg import ANCHOR, FISHER, consolidate, consolidated, fisher_diagonal
from fedlscl.modules import ClassificationModule, ConsolidationModule
from fedlscl.nets.net import Net, Output, SmallClassifier


@pytest.fixture
def client(federate, small):
    """A client with a trained CNN, at its second task."""
    return federate(FedAvg(**small)).clients[0]


class Logistic(Net):
    """Two classes: a weight vector feeds a head that is (0, 1), so that log p(y | x) is a logistic model in it."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(0.02 * torch.randn(48, generator=torch.Generator().manual_seed(0)))
        self.head = torch.nn.Linear(1, 6)
        with torch.no_grad():
            self.head.weight.copy_(torch.arange(6.0)[:, None])
            self.head.bias.zero_()

    def forward(self, images, prefix=None):
        features = (images[:, :, ::4, ::4].float().flatten(1) / 255 @ self.w)[:, None]
        return Output(features, self.head(features))


def test_fisher_of_a_logistic_model_is_the_analytic_one(client):
    """(y - p)^2 x^2 over the empirical labels, times the squared distance of the two rows of the head."""
    net = Logistic()
    logistic = Client(id=0, net=net, data=client.data, engine=client.engine, task=1)
    ids = client.train_ids
    batch = client.data.fetch(ids)
    low, high = client.data.classes(1).tolist()
    x = batch.images[:, :, ::4, ::4].float().flatten(1) / 255
    p = torch.sigmoid((high - low) * (x @ net.w.detach()))
    y = (batch.labels == high).float()
    expected = (((high - low) * (y - p))[:, None] * x).square().mean(0)
    fisher = fisher_diagonal(logistic, ids)
    assert set(fisher) == {"w"}
    torch.testing.assert_close(fisher["w"], expected, rtol=1e-4, atol=1e-7)


def test_fisher_covers_the_body_and_not_the_head_and_is_not_negative(client):
    fisher = fisher_diagonal(client, client.train_ids[:3])
    assert set(fisher) == {name for name, _ in client.net.named_parameters() if not name.startswith("head.")}
    assert all((value >= 0).all() for value in fisher.values())
    assert sum(value.sum() for value in fisher.values()) > 0


def test_fisher_is_the_mean_over_single_samples(client):
    """Batch gradients squared would be smaller by about the size of the batch."""
    ids = client.train_ids[:3]
    whole, single = fisher_diagonal(client, ids), [fisher_diagonal(client, ids[i : i + 1]) for i in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(part[name] for part in single) / 3)


def test_estimating_leaves_the_net_as_it_is(client):
    before = {name: value.clone() for name, value in client.net.state_dict().items()}
    fisher_diagonal(client, client.train_ids)
    assert all(torch.equal(value, before[name]) for name, value in client.net.state_dict().items())
    assert all(parameter.grad is None for parameter in client.net.parameters())


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_importances_add_up_and_decay_and_the_anchor_moves_on(client, gamma):
    samples = len(client.train_ids)
    consolidate(client, samples, gamma)
    first = consolidated(client)[1]
    with torch.no_grad():
        for parameter in client.net.parameters():
            parameter.mul_(0.9)
    alone = fisher_diagonal(client, client.train_ids)
    consolidate(client, samples, gamma)
    anchor, fisher = consolidated(client)
    for name, value in fisher.items():
        torch.testing.assert_close(value, alone[name] + gamma * first[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(anchor[name], client.net.get_parameter(name))
    assert {name.split(".")[0] + "." for name in client.memory} == {ANCHOR, FISHER}


def test_at_most_so_many_samples_are_used(client, monkeypatch):
    used = []
    monkeypatch.setattr("fedlscl.methods.fedavg.fisher_diagonal", lambda client, ids: used.append(ids) or {})
    consolidate(client, 3, 1.0)
    consolidate(client, 10_000, 1.0)
    assert len(used[0]) == 3 and set(used[0].tolist()) < set(client.train_ids.tolist())
    assert sorted(used[1].tolist()) == sorted(client.train_ids.tolist())


def test_the_penalty_begins_with_the_second_task(federate, small):
    method, modules = EWC(strength=7.0, fisher_samples=3, **small), []
    stages = method.stages

    def watched(client):
        for stage in stages(client):
            modules.append(
                (client.task, stage.module, {n: p.detach().clone() for n, p in client.net.named_parameters()})
            )
            yield stage

    method.stages = watched
    trainer = federate(method)
    (_, first, _), _, (_, second, weights), _ = modules
    assert type(first) is ClassificationModule and type(second) is ConsolidationModule
    assert second.strength == 7.0
    # The anchor is the averaged net, which is where the second task begins.
    for name, anchor in zip(second.names, second.anchor, strict=True):
        assert torch.equal(anchor, weights[name])
    assert isinstance(trainer.clients[0].net, SmallClassifier)
    assert all(
        set(upload) == set(trainer.clients[0].net.state_dict()) for upload in [method.upload(trainer.clients[0])]
    )


def test_a_frozen_vit_has_nothing_to_consolidate(federate, foundation_config, same):
    options = {"foundation": foundation_config, "local_epochs": 1}
    assert same(federate(EWC(**options)), federate(FedAvg(**options)))
