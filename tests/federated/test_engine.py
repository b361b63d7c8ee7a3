from copy import deepcopy

import pytest
import torch
from lightning.fabric import Fabric

from fedlscl.federated.client import Client
from fedlscl.federated.engine import Engine, PrefixCache
from fedlscl.federated.method import Stage
from fedlscl.modules import ClassificationModule, Learner
from fedlscl.nets.collaborator import Collaborator
from fedlscl.nets.net import SmallClassifier


@pytest.fixture
def data(make_data):
    return make_data()


@pytest.fixture
def engine(data):
    return Engine(Fabric(accelerator="cpu"), PrefixCache(data, 0, torch.float32), infer_batch_size=3)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return SmallClassifier("test_resnet", 6, 16)


@pytest.fixture
def batches(data):
    stream = data.stream(0)
    return stream.loader(stream.train_ids(0), 6, shuffle=True, generator=torch.Generator().manual_seed(0))


class Spy(Learner):
    """Notes what every step sees; its terms count the steps."""

    def __init__(self, net, **options):
        super().__init__(net, **options)
        self.seen = []

    def loss(self, batch):
        self.seen.append((self.net.training, batch.ids.tolist(), torch.is_autocast_enabled("cpu"), batch.prefix))
        anchor = self.net.head.weight.sum() * 0
        return {"first": anchor + len(self.seen), "second": anchor + 10}


def test_every_epoch_goes_through_all_batches_in_train_mode(engine, net, batches):
    module, sizes = Spy(net.eval()), []
    engine.train(Stage("train", module, batches, 3), sizes.append)
    assert len(module.seen) == len(sizes) == 3 * len(batches)
    assert all(is_training for is_training, *_ in module.seen) and not module.training
    epochs = [
        [i for _, ids, *_ in module.seen[start : start + len(batches)] for i in ids] for start in (0, len(batches))
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert sizes == [len(ids) for _, ids, *_ in module.seen]


def test_terms_are_means_over_the_last_epoch(engine, net, batches):
    terms = engine.train(Stage("train", Spy(net), batches, 3))
    steps = list(range(2 * len(batches) + 1, 3 * len(batches) + 1))
    mean = sum(steps) / len(steps)
    assert terms == {"loss": pytest.approx(mean + 10), "first": pytest.approx(mean), "second": pytest.approx(10)}


def test_no_batches_train_nothing(engine, net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert engine.train(Stage("train", Spy(net), [], 2)) == {}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_step_is_adams(net, batches, engine):
    """The same loop written out in plain torch."""
    other, epoch = deepcopy(net).train(), list(batches)
    engine.train(Stage("train", ClassificationModule(net), epoch, 2))
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-3, fused=True)
    for batch in epoch * 2:
        loss = torch.nn.functional.cross_entropy(other(batch.images).logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(("precision", "expected"), [("32-true", False), ("bf16-mixed", True)])
def test_steps_and_inference_run_in_fabrics_precision(data, net, batches, precision, expected):
    engine = Engine(Fabric(accelerator="cpu", precision=precision), PrefixCache(data, 0, torch.float32))
    module = Spy(net)
    engine.train(Stage("train", module, batches, 1))
    assert all(is_mixed is expected for _, _, is_mixed, _ in module.seen)
    stream = data.stream(0)
    _, output = next(engine.infer(net, stream, stream.test_ids(0)))
    exact = net(data.fetch(stream.test_ids(0)).images).logits
    torch.testing.assert_close(output.logits.float(), exact, rtol=0.1, atol=0.1)
    assert torch.equal(output.logits.float(), exact) is not expected


def test_gradients_are_clipped_where_asked(engine, net, batches):
    norms = []

    class Norms(ClassificationModule):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            norms.append(torch.stack([p.grad.norm() for p in self.net.parameters()]).norm().item())

    engine.train(Stage("train", Norms(net, max_norm=0.01), batches, 1))
    assert norms == pytest.approx([0.01] * len(batches), rel=1e-3)
    norms.clear()
    engine.train(Stage("train", Norms(net), batches, 1))
    assert min(norms) > 0.02


def test_inference_keeps_the_order_and_changes_nothing(engine, net, data):
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ids = data.stream(0).test_ids(0).flip(0)
    found = list(engine.infer(net, data.stream(0), ids))
    assert torch.cat([batch.ids for batch, _ in found]).tolist() == ids.tolist()
    assert len(found) == -(-len(ids) // 3)
    logits = torch.cat([output.logits for _, output in found])
    assert not logits.requires_grad and not net.training
    torch.testing.assert_close(logits, net(data.fetch(ids).images).logits)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_inference_of_a_part_sees_images_alone(engine, data, collaborator_config):
    net = Collaborator(collaborator_config, 6)
    ids = data.stream(0).test_ids(0)
    found = list(engine.infer(net, data.stream(0), ids, part=net.generate))
    features = torch.cat([features for _, (features, _) in found])
    torch.testing.assert_close(features, net(data.fetch(ids).images).features)
    assert all(batch.prefix is None for batch, _ in found)


def test_batches_come_with_the_cached_prefix(data, collaborator_config, batches):
    engine = Engine(Fabric(accelerator="cpu"), PrefixCache(data, 2**30, torch.float32))
    module = Spy(Collaborator(collaborator_config, 6))
    engine.train(Stage("train", module, batches, 1))
    assert all(prefix.shape == (len(ids), 5, 64) for _, ids, _, prefix in module.seen)


def test_turns_inside_a_turn_move_nothing(engine, net, data, monkeypatch):
    client, moved = Client(id=0, net=net, data=data.stream(0), engine=engine), []
    monkeypatch.setattr(engine.fabric, "to_device", lambda part: moved.append(part) or part)
    with engine.on_device(client):
        for _ in range(3):
            with engine.on_device(client):
                assert engine.visitor is client
        assert engine.visitor is client
    assert moved == [net] and engine.visitor is None


def test_an_error_in_a_turn_leaves_the_device_in_order(engine, net, data):
    client = Client(id=0, net=net, data=data.stream(0), engine=engine)
    with pytest.raises(KeyboardInterrupt), engine.on_device(client):
        raise KeyboardInterrupt
    assert next(net.parameters()).device.type == "cpu"
