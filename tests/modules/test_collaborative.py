import pytest
import torch

from fedlscl.federated.method import Stage
from fedlscl.modules import CollaborativeModule, as_collaborator, describe
from fedlscl.nets.collaborator import Collaborator
from reference import objectives as literal


def test_loss_is_eq3(collaborator, batches):
    batch = next(iter(batches()))
    classes = batch.labels.unique()
    module = CollaborativeModule(collaborator, classes).eval()
    terms = module.loss(batch)
    assert terms.keys() == {"cross_entropy"}
    expected = literal.eq3(collaborator(batch.images).logits, batch.labels, classes.tolist())
    assert terms["cross_entropy"].item() == pytest.approx(expected, rel=1e-5)


def test_cnn_generator_and_head_learn(collaborator, batches, engine):
    before = {name: value.clone() for name, value in collaborator.state_dict().items()}
    losses = [engine.train(Stage("train", CollaborativeModule(collaborator), batches(), 1))["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]
    moved = {name.split(".")[0] for name, value in collaborator.state_dict().items() if not value.equal(before[name])}
    assert moved == {"small", "unit", "generator", "head"}


def test_generator_and_head_have_learning_rates_of_their_own(collaborator):
    module = CollaborativeModule(collaborator, lr=0.5, generator_lr=0.25, bias_lr=0.75, head_lr=0.125)
    optimizer = module.configure_optimizers()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in collaborator.named_parameters():
        own = {"generator.weight": 0.25, "generator.bias": 0.75, "head.weight": 0.125}
        assert rates[id(parameter)] == own.get(name, 0.5)


def test_cached_prefixes_give_the_same_loss(collaborator, batches):
    batch = next(iter(batches()))
    module = CollaborativeModule(collaborator).eval()
    cached = batch._replace(prefix=collaborator.frozen_prefix(batch.images))
    assert torch.equal(module.loss(batch)["cross_entropy"], module.loss(cached)["cross_entropy"])


def test_a_checkpoint_of_the_stock_trainer_comes_back(collaborator, data, stock, tmp_path):
    module = CollaborativeModule(
        collaborator, lr=0.01, generator_lr=0.002, bias_lr=0.004, head_lr=0.003, freeze_norm=True
    )
    trainer = stock()
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CollaborativeModule.load_from_checkpoint(tmp_path / "last.ckpt")
    images = next(iter(data.test_dataloader())).images
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    rates = {"generator": 0.002, "generator.bias": 0.004, "head": 0.003}
    assert (loaded.lr, loaded.lr_of, loaded.freeze_norm) == (0.01, rates, True)
    assert loaded.net.config == collaborator.config
    assert loaded.net.foundation is collaborator.foundation


def test_a_checkpoint_holds_no_foundation_weights(collaborator, data, stock, tmp_path):
    trainer = stock(fast_dev_run=True, max_epochs=None)
    trainer.fit(CollaborativeModule(collaborator), datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[1] for name in state} == {"small", "unit", "generator", "head"}


def test_a_net_is_described_by_plain_values(collaborator):
    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return isinstance(value, str | int | float | None)

    description = describe(collaborator)
    assert plain(description)
    rebuilt = as_collaborator(description)
    assert isinstance(rebuilt, Collaborator) and rebuilt.config == collaborator.config
    assert rebuilt.num_classes == collaborator.num_classes
    assert as_collaborator(collaborator) is collaborator
