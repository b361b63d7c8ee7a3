import pytest
import torch
import torch.nn.functional as F

from fedlscl.methods import FedNCM, FedRidge


def pooled(trainer):
    """Features (double) and labels of all training samples of all clients and tasks, each once."""
    data = trainer.pool.datamodule
    ids = torch.cat([client.data.train_ids(task) for client in trainer.clients for task in range(2)])
    assert len(ids.unique()) == len(ids)
    batch = data.fetch(ids)
    with torch.no_grad():
        return trainer.clients[0].net(batch.images).features.double(), batch.labels


@pytest.mark.parametrize("rounds_per_task", [1, 3])
def test_nearest_class_means_are_those_of_the_pooled_data(federate, foundation_config, rounds_per_task):
    trainer = federate(FedNCM(foundation=foundation_config), rounds_per_task=rounds_per_task)
    features, labels = pooled(trainer)
    rows = F.normalize(features)
    expected = torch.stack([F.normalize(rows[labels == label].sum(0), dim=0) for label in range(6)])
    for client in trainer.clients:
        torch.testing.assert_close(client.net.head.weight.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rounds_per_task", [1, 3])
def test_ridge_is_that_of_the_pooled_data(federate, foundation_config, rounds_per_task):
    trainer = federate(FedRidge(foundation=foundation_config, ridge=0.1), rounds_per_task=rounds_per_task)
    features, labels = pooled(trainer)
    x = torch.cat([F.normalize(features), torch.ones(len(features), 1, dtype=torch.float64)], 1)
    y = F.one_hot(labels, 6).double()
    shrink = 0.1 * (x.T @ x).trace() / 65
    expected = torch.linalg.solve(x.T @ x + shrink * torch.eye(65, dtype=torch.float64), x.T @ y)
    for client in trainer.clients:
        torch.testing.assert_close(client.net.head.weight.double(), expected[:-1].T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(client.net.head.bias.double(), expected[-1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [FedNCM, FedRidge])
def test_statistics_are_sent_once_per_task(federate, foundation_config, method):
    up = federate(method(foundation=foundation_config), rounds_per_task=3).traffic["up"]
    assert (up[:, :, 0] > 0).all() and not up[:, :, 1:].any()


@pytest.mark.parametrize("method", [FedNCM, FedRidge])
def test_nothing_is_forgotten_by_other_tasks_statistics(federate, foundation_config, method):
    """What the server knows of a class does not depend on the order of tasks: rows of the first are still there."""
    trainer = federate(method(foundation=foundation_config))
    assert trainer.matrix.of("class_il")[:, 1].mean() > 0.9
    assert not any(trainer.history)
