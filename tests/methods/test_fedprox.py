import torch

from fedlscl.federated.client import Client
from fedlscl.methods import FedProx
from fedlscl.modules import ProximalModule, trainable


def test_every_round_is_anchored_at_the_weights_just_received(federate, small):
    """And at those of the last task when a task begins."""
    method, anchors = FedProx(mu=0.5, **small), []
    stages, download = method.stages, method.download

    def watched(client):
        for stage in stages(client):
            assert isinstance(stage.module, ProximalModule) and stage.module.mu == 0.5
            weights = trainable(client.net).values()
            assert all(torch.equal(a, w) and a is not w for a, w in zip(stage.module.anchor, weights, strict=True))
            anchors.append((client.id, [anchor.clone() for anchor in stage.module.anchor]))
            yield stage

    method.stages, received = watched, []
    method.download = lambda client, payload: received.append(payload) or download(client, payload)
    trainer = federate(method, rounds_per_task=2)
    names = list(trainable(trainer.clients[0].net))
    assert len(anchors) == len(received) == 8
    for (_, anchor), payload in zip(anchors[2:], received, strict=False):
        assert all(torch.equal(a, payload[name]) for name, a in zip(names, anchor, strict=True))
    assert isinstance(trainer.clients[0], Client)
