"""Every promise of the contract is broken once by a method that does just that."""

from dataclasses import dataclass, field

import pytest
import torch

from fedlscl import testing as contract
from fedlscl.federated.method import federated_average
from fedlscl.federated.payload import outgoing
from fedlscl.methods import FedAvg
from fedlscl.nets.vit import FoundationConfig
from tiny_methods import SMALL, VIT

HEAD = {"foundation": VIT, "local_epochs": 1, "batch_size": 8}


class NotFinite(FedAvg):
    def download(self, client, payload):
        super().download(client, payload)
        client.memory["broken"] = torch.tensor(float("nan"))


class SendsGradients(FedAvg):
    def upload(self, client):
        return {**super().upload(client), "head.weight": client.net.head.weight}


class SaysOtherwise(FedAvg):
    def upload_spec(self, upload, net):
        return {}


class SharesMemory(FedAvg):
    def upload(self, client):
        return {name: value.detach() for name, value in client.net.state_dict().items()}


class SendsFoundation(FedAvg):
    def upload(self, client):
        frozen = client.net.foundation.vit.blocks[0].attn.qkv.weight
        return {**super().upload(client), **outgoing({"secret": frozen})}

    def download(self, client, payload):
        super().download(client, {name: value for name, value in payload.items() if name != "secret"})


class KeepsObjects(FedAvg):
    def state_dict(self):
        return {"config": FoundationConfig()}


class Draws(FedAvg):
    drawn = 0

    def upload(self, client):
        Draws.drawn += 1
        return {**super().upload(client), "drawn": torch.tensor(Draws.drawn)}

    def download(self, client, payload):
        super().download(client, {name: value for name, value in payload.items() if name != "drawn"})


class Forgets(FedAvg):
    rounds = 0  # not a dataclass field, hence not in state_dict

    def aggregate(self, uploads, progress):
        self.rounds += 1
        mean = federated_average(uploads, self.head_aggregation)
        return [{**mean, "head.bias": mean["head.bias"] * self.rounds}] * len(uploads)


@dataclass(kw_only=True)
class HoldsOn(FedAvg):
    heads: dict = field(default_factory=dict, init=False)

    def begin_task(self, client):
        self.heads[client.id] = client.net.head.weight

    def upload(self, client):
        return {**super().upload(client), **outgoing({"head.weight": self.heads[client.id]})}


BROKEN = [
    (contract.check_finite, NotFinite, SMALL, "state /clients/0/memory/broken is not finite"),
    (contract.check_payloads, SendsGradients, SMALL, "message 'head.weight' "),
    (contract.check_upload_spec, SaysOtherwise, SMALL, "is rejected: 'head.bias' is not expected"),
    (contract.check_memory, SharesMemory, SMALL, "shares memory with its client"),
    (contract.check_foundation, SendsFoundation, HEAD, "'secret' contains weights of the frozen ViT"),
    (contract.check_determinism, Draws, SMALL, "object uploads differs in /0/drawn"),
    (contract.check_resume, Forgets, SMALL, "does state_dict have the whole state"),
    (contract.check_offloading, HoldsOn, SMALL, "is some state of a client stored outside of it"),
]


@pytest.mark.parametrize(
    ("check", "method", "options", "message"), BROKEN, ids=lambda part: getattr(part, "__name__", "")
)
def test_a_broken_promise_is_named(check, method, options, message):
    run = contract.learn(method(**options))
    with pytest.raises(AssertionError, match=message):
        check(run, lambda: method(**options))


def test_state_that_a_checkpoint_cannot_read_is_refused():
    with pytest.raises(Exception, match=r"weights_only|Unsupported|WeightsUnpickler"):
        contract.check_state(contract.learn(KeepsObjects(**SMALL)), lambda: KeepsObjects(**SMALL))
