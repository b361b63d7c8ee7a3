from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from fedlscl.federated.method import Stage
from fedlscl.modules import ContinualFineTuningModule
from fedlscl.nets.collaborator import Collaborator
from reference import objectives as literal


@pytest.fixture
def previous(collaborator):
    """A predecessor that generates other features and weights."""
    net = deepcopy(collaborator).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return net


@pytest.fixture
def batch(batches):
    return next(iter(batches()))


def test_loss_is_eq4(collaborator, previous, batch):
    classes = batch.labels.unique()
    module = ContinualFineTuningModule(collaborator, previous, classes, lambda_features=0.3, lambda_lora=0.7).eval()
    expected = literal.eq4(collaborator(batch.images), previous(batch.images), batch.labels, classes.tolist(), 0.3, 0.7)
    terms = module.loss(batch)
    assert terms.keys() == {"cross_entropy", "features", "lora"}
    assert sum(terms.values()).item() == pytest.approx(expected, rel=1e-4)
    assert min(term.item() for term in terms.values()) > 0


def test_consistency_may_leave_out_what_all_images_share(collaborator, previous, batch):
    """lambda_W ||Phi^T E - Phi'^T E'||^2: b may move."""
    torch.nn.init.normal_(collaborator.generator.bias, std=10)
    module = ContinualFineTuningModule(collaborator, previous, lambda_lora=0.7, consistent_bias=False).eval()
    now, old = collaborator(batch.images), previous(batch.images)
    change = now.features @ collaborator.generator.weight.T - old.features @ previous.generator.weight.T
    whole = now.lora - old.lora
    without = [0.7 * part.square().mean(0).sum().item() for part in (change, whole)]
    assert module.loss(batch)["lora"].item() == pytest.approx(without[0], rel=1e-3)
    module.consistent_bias = True
    assert module.loss(batch)["lora"].item() == pytest.approx(without[1], rel=1e-3)
    assert without[1] > 2 * without[0]


@pytest.mark.parametrize("trainer", ["stock", "engine"])
def test_nothing_has_to_be_kept_before_anything_was_trained(trainer, collaborator, batches, engine, stock):
    """The predecessor is the net itself and BatchNorm is at rest: both terms of the first step are exactly zero."""
    module = ContinualFineTuningModule(collaborator.train(), deepcopy(collaborator))
    first = [next(iter(batches()))]
    if trainer == "engine":
        terms = engine.train(Stage("continual", module, first, 1))
    else:
        fitted = stock()
        fitted.fit(module, DataLoader(first, batch_size=None))
        terms = {name.removeprefix("train/"): value for name, value in fitted.callback_metrics.items()}
    assert terms["features"] == 0.0 and terms["lora"] == 0.0 and terms["cross_entropy"] > 0


def test_only_samples_of_old_classes_are_kept_in_place(collaborator, previous, batch):
    old = batch.labels.unique()[:1]
    is_old = batch.labels == old
    assert 0 < is_old.sum() < len(is_old)
    module = ContinualFineTuningModule(collaborator, previous, old_classes=old).eval()
    alone = batch._replace(images=batch.images[is_old], labels=batch.labels[is_old], ids=batch.ids[is_old])
    for name in ("features", "lora"):
        expected = ContinualFineTuningModule(collaborator, previous).eval().loss(alone)[name].item()
        assert module.loss(batch)[name].item() == pytest.approx(expected, rel=1e-4)
    none = (
        ContinualFineTuningModule(collaborator, previous, old_classes=torch.tensor([5]))
        .eval()
        .loss(batch._replace(labels=torch.zeros_like(batch.labels)))
    )
    assert none["features"].item() == 0.0 and none["lora"].item() == 0.0


@pytest.fixture
def kept(previous, batch):
    """Ids in no order and the predecessor's features of a batch."""
    order = torch.randperm(len(batch.ids), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return batch.ids[order], previous.embed(batch.images)[order]


def test_kept_features_of_the_predecessor_give_the_same_step_to_the_bit(collaborator, previous, batch, kept):
    literal_step, fast_step = (
        ContinualFineTuningModule(deepcopy(collaborator), previous, kept=given).train() for given in (None, kept)
    )
    for module in (literal_step, fast_step):
        module.training_step(batch)["loss"].backward()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(literal_step.net.parameters(), fast_step.net.parameters(), strict=True)
        if a.grad is not None
    )
    terms = fast_step.loss(batch)
    assert terms["features"] > 0 and terms["lora"] > 0
    assert all(torch.equal(terms[name], value) for name, value in literal_step.loss(batch).items())


def test_kept_features_spare_the_predecessors_cnn(collaborator, previous, batch, kept, monkeypatch):
    module = ContinualFineTuningModule(collaborator, previous, kept=kept)
    monkeypatch.setattr(previous.small, "forward", lambda images: pytest.fail("the predecessor's CNN ran"))
    module.loss(batch)


def test_what_is_not_kept_is_computed(collaborator, previous, batch, kept):
    """A sample that was changed at random gets what the predecessor says of it."""
    expected = ContinualFineTuningModule(collaborator, previous).eval().loss(batch)
    for given, seen in ((kept, batch._replace(augmented=True)), ((kept[0][:0], kept[1][:0]), batch)):
        found = ContinualFineTuningModule(collaborator, previous, kept=given).eval().loss(seen)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    changed = kept[0], kept[1] + 1
    seen = batch._replace(augmented=True)
    assert torch.equal(
        ContinualFineTuningModule(collaborator, previous, kept=changed).eval().loss(seen)["lora"], expected["lora"]
    )


def test_only_old_samples_have_to_be_kept(collaborator, previous, batch, kept, monkeypatch):
    old = batch.labels.unique()[:1]
    expected = ContinualFineTuningModule(collaborator, previous, old_classes=old).eval().loss(batch)
    is_old = torch.isin(kept[0], batch.ids[batch.labels == old])
    module = ContinualFineTuningModule(
        collaborator, previous, old_classes=old, kept=(kept[0][is_old], kept[1][is_old])
    ).eval()
    monkeypatch.setattr(previous.small, "forward", lambda images: pytest.fail("the predecessor's CNN ran"))
    found = module.loss(batch)
    assert all(found[name].item() == pytest.approx(value.item(), rel=1e-5) for name, value in expected.items())


def test_the_predecessor_stays_as_it_is_in_evaluation_mode(collaborator, previous, batches, engine):
    before = {name: value.clone() for name, value in previous.state_dict().items()}
    module = ContinualFineTuningModule(collaborator, previous.train())
    assert not any(part.training for part in previous.modules())
    engine.train(Stage("continual", module, batches(), 1))
    assert all(torch.equal(value, before[name]) for name, value in previous.state_dict().items())
    assert all(parameter.grad is None for parameter in previous.parameters())


def test_consistency_pulls_towards_the_predecessor(collaborator, previous, batches, engine):
    def distance(weight):
        net = deepcopy(collaborator)
        module = ContinualFineTuningModule(net, previous, lambda_features=weight, lambda_lora=weight)
        return engine.train(Stage("continual", module, batches(), 6)), module

    kept, module = distance(10.0)
    batch = next(iter(batches()))
    start = ContinualFineTuningModule(collaborator, previous, lambda_features=10.0, lambda_lora=10.0).eval()
    assert module.eval().loss(batch)["lora"] < 0.9 * start.loss(batch)["lora"]
    assert kept["loss"] == pytest.approx(sum(kept[name] for name in ("cross_entropy", "features", "lora")), rel=1e-4)


def test_it_runs_without_collaboration(collaborator_config, batch):
    net = Collaborator(replace(collaborator_config, collaboration=False), 6)
    terms = ContinualFineTuningModule(net, deepcopy(net)).training_step(batch)
    assert terms["features"].item() == 0.0 and terms["lora"].item() == 0.0 and terms["loss"].requires_grad


def test_a_checkpoint_of_the_stock_trainer_comes_back(collaborator, previous, data, stock, tmp_path):
    module = ContinualFineTuningModule(collaborator, previous, lambda_features=0.3, lambda_lora=0.7, lr=0.01)
    trainer = stock()
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ContinualFineTuningModule.load_from_checkpoint(tmp_path / "last.ckpt")
    batch = next(iter(data.test_dataloader()))
    assert torch.equal(loaded.eval()(batch.images), module.eval()(batch.images))
    assert all(torch.equal(a, b) for a, b in zip(loaded.loss(batch).values(), module.loss(batch).values(), strict=True))
    assert (loaded.lambda_features, loaded.lambda_lora, loaded.lr) == (0.3, 0.7, 0.01)
    assert not any(part.training for part in loaded.train().previous.modules())
