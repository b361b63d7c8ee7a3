import torch
import torch.nn.functional as F

from fedlscl.data import Buffer
from fedlscl.federated.client import class_means
from fedlscl.methods import FedAvg


def start(federate, foundation_config):
    """A client with a frozen ViT after two tasks."""
    return federate(FedAvg(foundation=foundation_config, local_epochs=1)).clients[0]


def test_class_means_are_means_of_normalised_features(federate, foundation_config):
    """Not of unit length: whoever adds up clients must be able to weigh them by their samples."""
    client = start(federate, foundation_config)
    classes, means = class_means(client, client.train_ids)
    batch = client.data.fetch(client.train_ids)
    rows = F.normalize(client.net(batch.images).features.double())
    assert torch.equal(classes, client.classes)
    for label, mean in zip(classes, means, strict=True):
        expected = rows[batch.labels == label].mean(0)
        assert expected.norm() < 0.9999
        torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-5)


def test_class_means_read_the_named_output(federate, foundation_config):
    client = start(federate, foundation_config)
    by_logits = class_means(client, client.train_ids, pick="logits")[1]
    assert by_logits.shape == (2, 6)


def test_classes_follow_the_task(federate, foundation_config):
    client = start(federate, foundation_config)
    client.task = 0
    assert torch.equal(client.seen, client.classes) and len(client.old) == 0
    first = client.classes
    client.task = 1
    assert torch.equal(client.old, first)
    assert torch.equal(client.seen, torch.cat([first, client.classes]).unique())
    assert torch.equal(client.data.data.labels(client.train_ids).unique(), client.classes)


def test_a_snapshot_is_frozen_and_apart(federate, foundation_config):
    client = start(federate, foundation_config)
    client.snapshot()
    before = client.previous.head.weight.clone()
    with torch.no_grad():
        client.net.head.weight.add_(1)
    assert torch.equal(client.previous.head.weight, before)
    assert not client.previous.training and not client.previous.head.weight.requires_grad
    assert client.net.head.weight.requires_grad
    assert client.previous.foundation is client.net.foundation


def test_what_a_client_keeps_comes_back(federate, foundation_config):
    client = start(federate, foundation_config)
    client.snapshot()
    with torch.no_grad():
        client.net.head.weight.add_(1)
    client.memory["kept"] = torch.arange(3)
    client.buffer = Buffer.empty().updated(torch.tensor([4, 5]), torch.tensor([1, 1]), torch.tensor([0.5, 0.1]), 1)
    state = client.state_dict()
    other = start(federate, foundation_config)
    other.previous = None
    other.load_state_dict(state)
    assert torch.equal(other.net.head.weight, client.net.head.weight)
    assert torch.equal(other.previous.head.weight, client.previous.head.weight)
    assert not other.previous.head.weight.requires_grad and not other.previous.training
    assert other.net.head.weight.requires_grad
    assert other.buffer.ids.tolist() == [5] and other.memory["kept"].tolist() == [0, 1, 2]
    client.previous = None
    other.load_state_dict(client.state_dict())
    assert other.previous is None
