"""The closed-form methods in a run: equal to what the pooled features give."""

import pytest
import torch
import torch.nn.functional as F

from fedlscl.federated.method import Progress
from fedlscl.federated.payload import Upload, num_bytes
from fedlscl.functional.analytic import (
    discriminant_solution,
    low_rank,
    moment_sums,
    ncm_solution,
    random_features,
)
from fedlscl.methods import AFCL, STSA, STSAE, FedNCM, FedRAN, FedRidge, FrozenLDA
from reference import analytic as literal


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
    weight, _ = ncm_solution(moment_sums(features, labels, 6))
    torch.testing.assert_close(trainer.clients[0].net.head.weight, weight, rtol=1e-4, atol=1e-6)


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
def test_nothing_is_forgotten_by_other_tasks_statistics(federate, foundation_config, method):
    """What the server knows of a class does not depend on the order of tasks: rows of the first are still there."""
    trainer = federate(method(foundation=foundation_config))
    assert trainer.matrix.of("class_il")[:, 1].mean() > 0.9
    assert not any(trainer.run.history)


ALL = (AFCL, STSA, STSAE, FedNCM, FedRAN, FedRidge, FrozenLDA)
WIDE = {"width": 40}


def one_hot(labels):
    return F.one_hot(labels, 6).double()


def head(trainer):
    return trainer.clients[1].net.head.weight.double()


@pytest.mark.parametrize("options", [{}, {"num_clients": 4, "dirichlet_alpha": 0.3, "protocol": "global"}])
def test_afcl_is_the_ridge_of_the_pooled_raw_features(federate, make_data, foundation_config, options):
    if "protocol" in options:
        options = {**options, "private_classes": 0, "public_classes": 4}
    trainer = federate(AFCL(foundation=foundation_config, gamma=0.5), make_data(**options))
    features, labels = pooled(trainer)
    torch.testing.assert_close(head(trainer).mT, literal.ridge(features, one_hot(labels), 0.5), rtol=1e-3, atol=1e-4)


def test_a_discriminant_is_that_of_the_pooled_features(federate, foundation_config):
    trainer = federate(FrozenLDA(foundation=foundation_config, shrinkage=0.3))
    weight, bias = discriminant_solution(moment_sums(*pooled(trainer), 6), 0.3)
    torch.testing.assert_close(head(trainer).float(), weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(trainer.clients[0].net.head.bias, bias, rtol=1e-3, atol=1e-3)


def test_stsa_is_the_cosine_head_of_the_pooled_random_features(federate, foundation_config):
    trainer = federate(STSA(foundation=foundation_config, ridge=0.1, **WIDE))
    features, labels = pooled(trainer)
    x = random_features(features, 40).double()
    expected = literal.ridge(x, one_hot(labels), 0.1 * x.square().sum() / 40)
    torch.testing.assert_close(head(trainer).mT, F.normalize(expected, dim=0), rtol=1e-3, atol=1e-4)


def test_groups_of_one_sample_make_stsa_e_equal_to_stsa(federate, foundation_config):
    exact = federate(STSA(foundation=foundation_config, **WIDE))
    groups = federate(STSAE(foundation=foundation_config, groups=1000, **WIDE))
    torch.testing.assert_close(head(groups), head(exact), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(head(federate(STSAE(foundation=foundation_config, groups=2, **WIDE))), head(exact))


def test_fedran_of_full_rank_is_ridge_on_random_features(federate, foundation_config):
    trainer = federate(FedRAN(foundation=foundation_config, ridge=0.1, rank=40, **WIDE))
    features, labels = pooled(trainer)
    x = random_features(features, 40).double()
    expected = literal.ridge(x, one_hot(labels), 0.1 * len(x) / 40)
    torch.testing.assert_close(head(trainer).mT, expected, rtol=1e-3, atol=1e-4)


def test_fedran_adds_what_it_dropped_to_its_regularisation(federate, foundation_config):
    method = FedRAN(foundation=foundation_config, ridge=0.1, rank=3, **WIDE)
    trainer = federate(method)
    features, labels = pooled(trainer)
    x = random_features(features, 40).double()
    factor = trainer.method.sums["factor"]
    assert factor.shape == (40, 3)
    strength = (0.1 * len(x) + len(x) - factor.square().sum()) / 40
    eye = torch.eye(40, dtype=torch.float64)
    expected = torch.linalg.solve(factor @ factor.mT + strength * eye, x.mT @ one_hot(labels))
    torch.testing.assert_close(head(trainer).mT, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ALL)
def test_statistics_are_sent_once_per_task(federate, foundation_config, method):
    up = federate(method(foundation=foundation_config), rounds_per_task=3).run.traffic["up"]
    assert (up[:, :, 0] > 0).all() and not up[:, :, 1:].any()


def test_fedran_sends_the_published_number_of_values(federate, foundation_config):
    """M r + M C_t in float32: the published table has all classes' columns and float64."""
    trainer = federate(FedRAN(foundation=foundation_config, rank=5, **WIDE))
    assert (trainer.run.traffic["up_values"][:, :, 0] == 40 * 5 + 40 * 2).all()


def made(method, net_width, **changed):
    """A valid upload of three samples of class 1, with changed parts."""
    features = torch.randn(3, net_width, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([0, 3])
    x = random_features(features, 40).double()
    payload = {
        STSAE: {"sums": torch.stack([x[:2].sum(0), x[2]])[None].float(), "counts": torch.tensor([[2, 1]])},
        FedRAN: {"factor": low_rank(x.mT, 5).float(), "products": x.sum(0)[:, None].float()},
        FedNCM: {"means": F.normalize(features).sum(0)[None]},
    }[method]
    return Upload(client=0, task=0, round=0, payload=payload | changed, class_counts=counts)


@pytest.mark.parametrize(
    ("method", "name", "reason"),
    [
        (STSAE, "sums", "sums are larger than those of unit features"),
        (STSAE, "counts", "counts must be those of the announced samples of each class"),
        (FedRAN, "factor", "factor is larger than that of unit features"),
        (FedRAN, "products", "products are larger than those of unit features"),
        (FedNCM, "means", "means are larger than those of unit features"),
    ],
)
def test_impossible_statistics_are_rejected(foundation_config, method, name, reason):
    options = {STSAE: {"groups": 2, **WIDE}, FedRAN: {"rank": 5, **WIDE}}.get(method, {})
    method_ = method(foundation=foundation_config, **options)
    upload = made(method, 8)
    assert method_.check_upload(upload) == ""
    assert method_.check_upload(made(method, 8, **{name: upload.payload[name] * 4})) == reason


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (AFCL, {"gamma": 0}, "gamma must be > 0, got 0"),
        (FrozenLDA, {"shrinkage": 0}, r"shrinkage must be in \(0, 1\], got 0"),
        (FedRidge, {"ridge": -1}, "ridge must be > 0, got -1"),
        (STSA, {"width": 0}, "width must be >= 1, got 0"),
        (STSAE, {"groups": 0}, "groups must be >= 1, got 0"),
        (FedRAN, {"rank": 0}, "rank must be >= 1, got 0"),
    ],
)
def test_invalid_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_ridge_sends_a_packed_matrix_and_its_own_columns(federate, foundation_config):
    """A sixth of a square matrix in float64 with all columns."""
    trainer = federate(FedRidge(foundation=foundation_config))
    size = trainer.clients[0].net.foundation.width + 1
    expected = {"gram": torch.empty(size * (size + 1) // 2), "products": torch.empty(size, 2)}
    assert (trainer.run.traffic["up"][:, :, 0] == num_bytes(expected)).all()
    assert trainer.method.aggregate([], Progress(1, 1)) == []
