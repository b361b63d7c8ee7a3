"""Readouts: what they are equal to, and that they change nothing else."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.federated.method import Progress, StreamShape
from fedlscl.federated.payload import Upload
from fedlscl.federated.readout import ReadoutConfig, check_widths, client_sums
from fedlscl.functional.analytic import moment_sums
from fedlscl.methods import FedNCM, FedRidge
from fedlscl.testing import Recorded, Stop, Stopped, fake_data
from tiny_methods import METHODS

ALL_HEADS = ("lda", "ridge", "ncm")
CONFIG = ReadoutConfig(heads=ALL_HEADS, features=("adapted", "frozen"))


def values(trainer):
    return {name: found.nan_to_num(-1) for name, found in trainer.run.readouts.values.items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def lorm(federate):
    return federate(METHODS["LoRM"](), readouts=CONFIG)


def test_frozen_readouts_are_the_training_free_methods(federate, foundation_config, lorm):
    """One sum, one solver: FedRidge's and FedNCM's accuracies, whatever the method trains."""
    ridge = federate(FedRidge(foundation=foundation_config))
    ncm = federate(FedNCM(foundation=foundation_config))
    found = values(lorm)
    assert torch.equal(found["frozen/ridge"], ridge.matrix.values[1].nan_to_num(-1))
    assert torch.equal(found["frozen/ncm"], ncm.matrix.values[1].nan_to_num(-1))


def test_readouts_change_nothing_else(federate, lorm):
    plain = federate(METHODS["LoRM"]())
    assert torch.equal(plain.matrix.values.nan_to_num(-1), lorm.matrix.values.nan_to_num(-1))
    assert all(torch.equal(plain.run.traffic[name], lorm.run.traffic[name]) for name in plain.run.traffic)
    assert plain.run.history == lorm.run.history


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_the_readouts_of_its_net(name, federate):
    """Without a ViT there is none; otherwise every client is evaluated on every task so far."""
    trainer = federate(METHODS[name](), readouts=CONFIG)
    has_vit = trainer.clients[0].net.foundation is not None
    expected = [f"{view}/{head}" for view in CONFIG.features for head in ALL_HEADS] if has_vit else []
    assert sorted(trainer.run.readouts.values) == sorted(expected)
    measured = ~trainer.matrix.of("class_il").isnan()
    for found in trainer.run.readouts.values.values():
        assert torch.equal(~found.isnan().any(0), measured)
        assert ((found.nan_to_num(0) >= 0) & (found.nan_to_num(0) <= 1)).all()
    assert (trainer.run.readouts.traffic["up"] > 0).all() == has_vit


def test_sums_of_all_clients_are_those_of_all_data(federate, lorm):
    """In any split: frozen features of both tasks and clients at once."""
    total = None
    for client in lorm.clients:
        for task in range(2):
            ids = client.data.train_ids(task)
            for batch, views in client.engine.infer(
                client.net, client.data, ids, views=lambda batch, net=client.net: CONFIG.views(net, batch)
            ):
                part = moment_sums(views["frozen"], batch.labels, 6)
                total = part if total is None else type(part)(*(a + b for a, b in zip(total, part, strict=True)))
    assert torch.allclose(lorm.run.readouts.sums["frozen"].gram, total.gram, atol=1e-5)
    assert torch.allclose(lorm.run.readouts.sums["frozen"].products, total.products, atol=1e-5)


def test_a_stopped_run_resumes_with_equal_readouts(tmp_path):
    whole = Recorded(readouts=CONFIG)
    whole.fit(METHODS["LoRM"](), fake_data())
    stopped = Recorded(readouts=CONFIG, callbacks=[Stop(after=3)])
    stopped.run_dir = tmp_path
    with pytest.raises(Stopped):
        stopped.fit(METHODS["LoRM"](), fake_data())
    resumed = Recorded(readouts=CONFIG, clients_gb=0)
    resumed.fit(METHODS["LoRM"](), fake_data(), checkpoint=tmp_path / "checkpoint.pt")
    same(values(resumed), values(whole))
    assert torch.equal(resumed.run.readouts.traffic["up"], whole.run.readouts.traffic["up"])


def test_the_clients_keep_the_heads_they_were_evaluated_with(lorm):
    for client in lorm.clients:
        heads = client.state_dict()["readouts"]
        assert sorted(heads) == sorted(lorm.run.readouts.names)
        for name, (weight, bias) in CONFIG.solve(lorm.run.readouts.sums["frozen"]).items():
            assert torch.equal(heads[f"frozen/{name}"]["weight"], weight)
            assert torch.equal(heads[f"frozen/{name}"]["bias"], bias)


@given(
    st.sampled_from(["gram", "products", "counts", "shape"]),
    st.floats(1.5, 1e6),
    st.sampled_from(["adapted", "frozen"]),
)
def test_sums_that_cannot_be_of_unit_features_are_rejected(lorm, flaw, factor, view):
    run, client = lorm.run, lorm.clients[0]
    payload = client_sums(client, CONFIG)
    counts = client.data.class_counts(client.task)
    match flaw:
        case "gram" | "products":
            payload[f"{view}.{flaw}"] = payload[f"{view}.{flaw}"] * factor
        case "counts":
            payload[f"{view}.products"][-1, 0] += 1
        case "shape":
            payload[f"{view}.gram"] = payload[f"{view}.gram"][:-1]
    upload = Upload(client=0, task=1, round=0, payload=payload, class_counts=counts)
    before = len(run.validator.rejected)
    assert run.validator.filter([upload], Progress(1, 0), run.readouts) == []
    assert view in run.validator.rejected[-1].reason
    del run.validator.rejected[before:]


def test_secure_sums_give_the_same_readouts(federate):
    """Masks cancel: only the total is known, and it has fixed-point rounding."""
    plain, secure = (
        federate(replace(METHODS["FedLSCL"](), secure_sum=secure), readouts=CONFIG, rounds_per_task=3)
        for secure in (False, True)
    )
    for name, sums in plain.run.readouts.sums.items():
        if name == "frozen":
            assert torch.allclose(sums.gram, secure.run.readouts.sums[name].gram, atol=1e-4)
            assert torch.allclose(sums.products, secure.run.readouts.sums[name].products, atol=1e-4)
    assert secure.run.readouts.values.keys() == plain.run.readouts.values.keys()


def test_features_of_small_models(federate):
    """The pooled CNN features and both side by side, each of unit norm."""
    config = ReadoutConfig(heads=["ncm"], features=["small", "frozen+small"])
    trainer = federate(METHODS["FedLSCL"](), readouts=config)
    net = trainer.clients[0].net
    widths = trainer.run.readouts.widths
    assert widths == {"small": net.small.width, "frozen+small": net.foundation.width + net.small.width}
    gram = trainer.run.readouts.sums["frozen+small"].gram
    samples = gram[-1, -1]
    assert torch.allclose(gram[: net.foundation.width, : net.foundation.width].trace(), samples / 2, rtol=1e-5)


def test_small_models_of_different_widths_are_refused():
    """Also where a method says that they are equal."""
    method = replace(METHODS["FedLSCL"](), small_models=["test_resnet", "test_efficientnet"])
    config = ReadoutConfig(heads=["ncm"], features=["adapted", "small"])
    nets = [method.build_net(client, StreamShape(6, 2, 2)) for client in (0, 1)]
    with pytest.raises(ValueError, match=r"readouts.features must be features of one width on all clients, got small"):
        check_widths(config, nets)


@pytest.mark.parametrize(("method", "missing"), [("FedAvg", "adapted, frozen"), ("FedNCM", "small")])
def test_features_that_nets_do_not_have_are_named(federate, caplog, method, missing):
    features = ["adapted", "frozen"] if method == "FedAvg" else ["frozen", "small"]
    federate(METHODS[method](), readouts=ReadoutConfig(heads=["ncm"], features=features), max_tasks=1)
    assert f"the method's nets have no features {missing}, and so no readouts of them" in caplog.text


def test_sums_without_noise_are_refused(federate):
    method = replace(METHODS["FedLSCL"](), noise_multiplier=1.0)
    with pytest.raises(
        ValueError, match=r"readouts.heads must be empty for a method that adds noise, got lda, ridge, ncm"
    ):
        federate(method, readouts=CONFIG)


def test_random_features_replace_the_width(federate, foundation_config):
    config = ReadoutConfig(heads=["ridge"], features=["frozen"], random_features=100)
    trainer = federate(FedNCM(foundation=foundation_config), readouts=config)
    assert trainer.run.readouts.sums["frozen"].gram.shape == (101, 101)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ["svm"]}, r"readouts.heads must be one of lda, ridge, ncm, got \['svm'\]"),
        ({"heads": ["lda", "lda"]}, "readouts.heads must be different ones"),
        ({"heads": ["lda"], "features": []}, "readouts.features must name features"),
        ({"features": ["raw"]}, "readouts.features must be one of adapted, frozen"),
        ({"random_features": -1}, "readouts.random_features must be >= 0, got -1"),
        ({"shrinkage": 0.0}, r"readouts.shrinkage must be in \(0, 1\], got 0.0"),
        ({"ridge": 0.0}, "readouts.ridge must be > 0, got 0.0"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReadoutConfig(**options)
