import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedlscl.data import Batch
from fedlscl.federated.method import Stage
from fedlscl.modules import ClassificationModule, as_batch
from fedlscl.nets.net import Frozen
from fedlscl.nets.vit import fingerprint


def owned(module):
    return {name: value.clone() for name, value in module.net.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_stock_trainer_runs_every_module_on_our_data(make_module, data, stock):
    module, trainer = make_module(), stock()
    before = owned(module)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == len(data.train_dataloader())
    assert not same(before, owned(module))
    assert all(value.isfinite().all() for value in owned(module).values())
    metrics = trainer.callback_metrics
    terms = [metrics[f"train/{name}"].item() for name in module.loss(next(iter(data.train_dataloader())))]
    assert metrics["train/loss"].item() == pytest.approx(sum(terms), rel=1e-5)
    (results,) = trainer.test(module, datamodule=data, verbose=False)
    module.eval()
    with torch.no_grad():
        logits = torch.cat([module(batch.images) for batch in data.test_dataloader()])
    labels = torch.cat([batch.labels for batch in data.test_dataloader()])
    assert results["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    predictions = torch.cat(trainer.predict(module, datamodule=data))
    torch.testing.assert_close(predictions, logits.softmax(1))


def test_a_stock_trainer_runs_every_module_on_a_plain_data_set(make_module, stock):
    """Float images in 0..1 as torchvision's ToTensor gives them, and labels."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.rand(12, 3, 20, 20), torch.arange(12) % 6), batch_size=6)
    module, trainer = make_module(), stock()
    before = owned(module)
    trainer.fit(module, loader, loader)
    assert trainer.global_step == 2 and not same(before, owned(module))
    assert 0 <= trainer.callback_metrics["val/accuracy"] <= 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_stock_trainer_runs_every_module_on_a_last_batch_of_one(make_module, stock, precision):
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.rand(5, 3, 20, 20), torch.arange(5)), batch_size=2)
    module, trainer = make_module(), stock(precision=precision)
    before = owned(module)
    trainer.fit(module, loader)
    assert trainer.global_step == 3 and not same(before, owned(module))
    assert all(value.isfinite().all() for value in owned(module).values())


def test_a_stock_trainer_runs_one_place_of_the_streams(make_module, data, stock):
    stock(fast_dev_run=True, max_epochs=None).fit(make_module(), datamodule=data.at(1, 0))


def test_stock_trainer_and_federation_train_the_same_bits(make_module, batches, engine, stock):
    ours, theirs = make_module(), make_module()
    assert same(owned(ours), owned(theirs))
    engine.train(Stage("train", ours, batches(), epochs=2))
    stock(max_epochs=2).fit(theirs, batches())
    assert same(owned(ours), owned(theirs))


def test_frozen_parts_stay_as_they_are(make_module, data, stock):
    module = make_module()
    frozen = [part for part in module.modules() if isinstance(part, Frozen)]
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in frozen]
    vit = getattr(module.net, "foundation", None)
    module.train()
    assert not any(layer.training for part in frozen for layer in part.modules())
    stock().fit(module, datamodule=data)
    assert not any(layer.training for part in frozen for layer in part.modules())
    assert all(same(old, part.state_dict()) for old, part in zip(before, frozen, strict=True))
    if vit is not None:
        assert fingerprint(vit.vit) == vit.fingerprint
        assert not any(layer.training for layer in vit.vit.modules())


@pytest.mark.parametrize("trainer", ["stock", "engine"])
def test_frozen_norms_keep_their_statistics_bit_for_bit(trainer, small_net, batches, engine, stock):
    module = ClassificationModule(small_net.train(), freeze_norm=True)
    norms = [part for part in small_net.modules() if isinstance(part, nn.BatchNorm2d)]
    before = owned(module)
    if trainer == "stock":
        stock().fit(module, batches())
    else:
        engine.train(Stage("train", module, batches(), 1))
    after = owned(module)
    statistics = [name for name in before if "running" in name or "tracked" in name]
    assert len(statistics) == 3 * len(norms) > 0
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert not same(before, after)


@pytest.mark.parametrize("trainer", ["stock", "engine"])
def test_other_norms_follow_the_data(trainer, small_net, batches, engine, stock):
    """Even those of a net that comes from an evaluation."""
    module = ClassificationModule(small_net.eval())
    before = owned(module)
    if trainer == "stock":
        stock().fit(module, batches())
    else:
        engine.train(Stage("train", module, batches(), 1))
    counters = [name for name in before if "tracked" in name]
    steps = len(batches())
    assert all(owned(module)[name] == before[name] + steps for name in counters)


def test_loss_is_the_sum_of_its_terms(make_module, batches):
    module = make_module().eval()
    batch = next(iter(batches()))
    terms, step = module.loss(batch), module.training_step(batch, 0)
    assert step.keys() == {"loss", *terms}
    assert torch.equal(step["loss"], torch.stack(list(terms.values())).sum())
    assert step["loss"].requires_grad and not any(step[name].requires_grad for name in terms)


def test_parts_have_learning_rates_of_their_own(collaborator):
    module = ClassificationModule(collaborator, lr=0.5, lr_of={"generator": 0.25, "small": 0.1, "small.cnn.conv1": 0.2})
    rates = {id(p): group["lr"] for group in module.configure_optimizers().param_groups for p in group["params"]}
    expected = {"generator": 0.25, "unit": 0.5, "head": 0.5, "small": 0.1}
    for name, parameter in collaborator.named_parameters():
        rate = 0.2 if name.startswith("small.cnn.conv1") else expected[name.split(".")[0]]
        assert rates[id(parameter)] == rate
    assert len(rates) == len(list(collaborator.parameters()))


def test_what_needs_no_gradient_is_not_optimised(small_net):
    small_net.small.requires_grad_(False)
    groups = ClassificationModule(small_net).configure_optimizers().param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in small_net.head.parameters()}


def test_images_and_labels_alone_make_a_batch():
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    assert as_batch((images, labels)).ids.tolist() == [-1, -1]
    batch = Batch(images, labels, torch.tensor([5, 6]), torch.ones(2))
    assert as_batch(batch) == batch
    assert as_batch([images, labels])[:2] == (images, labels)
