"""fp16 with a GradScaler, on the CPU: gradients are clipped unscaled, and no stage depends on an earlier one."""

from copy import deepcopy

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.pytorch.plugins import MixedPrecision as StockMixedPrecision

from fedlscl.federated.engine import INITIAL_SCALE, Engine
from fedlscl.federated.method import Stage
from fedlscl.modules import ClassificationModule
from fedlscl.nets.vit import FoundationClassifier


def scaler(scale=2.0**16):
    return torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.fixture
def engine():
    return Engine(Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler())), None)


@pytest.fixture
def net(foundation_config):
    torch.manual_seed(0)
    return FoundationClassifier(foundation_config, 6)


@pytest.fixture
def batches(make_data):
    data = make_data()
    return data.stream(0).loader(data.stream(0).train_ids(0), 6, shuffle=False)


class Norms(ClassificationModule):
    """Notes the gradient's norm before and after clipping."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        norm = torch.stack([p.grad.norm() for p in self.net.head.parameters()]).norm().item()
        self.norms = [*getattr(self, "norms", []), norm]


@pytest.mark.parametrize("max_norm", [0.01, None])
def test_both_trainers_clip_unscaled_gradients(engine, net, batches, max_norm):
    ours, theirs = (Norms(deepcopy(net), max_norm=max_norm) for _ in range(2))
    engine.train(Stage("train", ours, batches, 1))
    if max_norm is None:
        assert 0.02 < min(ours.norms) and max(ours.norms) < 100
        return
    assert ours.norms == pytest.approx([max_norm] * len(batches), rel=1e-3)
    plugin = StockMixedPrecision("16-mixed", "cpu", scaler(INITIAL_SCALE))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    lightning.Trainer(accelerator="cpu", plugins=plugin, enable_model_summary=False, **options).fit(theirs, batches)
    assert theirs.norms == pytest.approx(ours.norms, rel=1e-3)
    weights = zip(ours.net.parameters(), theirs.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_stage_does_not_depend_on_an_earlier_one(engine, net, batches):
    """Its scaler does not grow or shrink over the run, so that a resumed run needs none of it."""
    alone, second = Norms(deepcopy(net)), Norms(deepcopy(net))
    engine.train(Stage("train", alone, batches, 1))
    plugin = engine.fabric.strategy.precision
    plugin.scaler.update(2.0**30)
    engine.train(Stage("train", second, batches, 1))
    assert second.norms == alone.norms and plugin.scaler.get_scale() == INITIAL_SCALE
    assert all(torch.equal(a, b) for a, b in zip(alone.net.parameters(), second.net.parameters(), strict=True))
