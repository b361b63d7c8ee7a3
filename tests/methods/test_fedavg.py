from dataclasses import replace

import pytest
import torch

from fedlscl.callbacks import Callback
from fedlscl.federated.method import StreamShape
from fedlscl.methods import EWC, FedAvg, FedProx, Local, LwF
from fedlscl.nets.net import SmallClassifier
from fedlscl.nets.vit import FoundationClassifier


@pytest.fixture(scope="module")
def plain(federate, small):
    return federate(FedAvg(**small), rounds_per_task=2)


@pytest.mark.parametrize(
    "method",
    [
        lambda small: FedProx(mu=0, **small),
        lambda small: LwF(alpha=0, **small),
        lambda small: EWC(strength=0, **small),
    ],
    ids=["FedProx(mu=0)", "LwF(alpha=0)", "EWC(strength=0)"],
)
def test_a_method_without_its_term_is_fedavg_bit_for_bit(plain, federate, small, same, method):
    other = federate(method(small), rounds_per_task=2)
    assert same(plain, other)
    assert torch.equal(plain.matrix.values.nan_to_num(-1), other.matrix.values.nan_to_num(-1))


@pytest.mark.parametrize(
    "method",
    [
        lambda small: FedProx(mu=1.0, **small),
        lambda small: LwF(alpha=1.0, **small),
        lambda small: EWC(strength=1e4, **small),
    ],
    ids=["FedProx", "LwF", "EWC"],
)
def test_a_method_with_its_term_is_not(plain, federate, small, same, method):
    assert not same(plain, federate(method(small), rounds_per_task=2))


def test_all_clients_have_one_net_after_a_round(plain, nets):
    first, *others = nets(plain)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_one_client_alone_keeps_its_own_net(federate, make_data, small, same):
    data = {"num_clients": 1, "private_classes": 4, "public_classes": 0}
    assert same(federate(FedAvg(**small), make_data(**data)), federate(Local(**small), make_data(**data)))


class Downloads(Callback):
    """The head of each client before and after the server's answer, in the first round."""

    def __init__(self):
        self.before, self.after = [], []

    def on_server_end(self, trainer, seconds):
        self.before = self.before or [client.net.head.weight.detach().clone() for client in trainer.clients]

    def on_round_end(self, trainer):
        self.after = self.after or [client.net.head.weight.detach().clone() for client in trainer.clients]


@pytest.mark.parametrize("head_aggregation", ["classwise", "average"])
def test_the_row_of_a_private_class(federate, make_data, foundation_config, head_aggregation):
    """Class by class it is its owner's; in a plain average it moves by the owner's share of the samples."""
    seen = Downloads()
    method = FedAvg(foundation=foundation_config, local_epochs=1, head_aggregation=head_aggregation)
    data = make_data(private_classes=2, public_classes=2, num_tasks=1)
    trainer = federate(method, data, callbacks=[seen])
    start = FoundationClassifier(foundation_config, 6)
    counts = [client.data.class_counts(0) for client in trainer.clients]
    total = sum(count.sum() for count in counts)
    private = [(i, c) for i, count in enumerate(counts) for c in range(6) if count[c] and not counts[1 - i][c]]
    assert len(private) == 4
    for owner, label in private:
        own, other, after = seen.before[owner][label], seen.before[1 - owner][label], seen.after[0][label]
        if head_aggregation == "classwise":
            assert torch.equal(after, own)
        else:
            share = counts[owner].sum() / total  # the other client did not move this row: it has the server's V_s
            torch.testing.assert_close(after, other + share * (own - other))
            assert not torch.equal(own, other)
    assert start.head.weight.shape == seen.after[0].shape


def test_only_the_head_of_a_frozen_vit_is_trained_and_sent(federate, foundation_config):
    trainer = federate(FedAvg(foundation=foundation_config, local_epochs=1))
    assert isinstance(trainer.clients[0].net, FoundationClassifier)
    assert set(trainer.clients[0].net.state_dict()) == {"head.weight", "head.bias"}
    assert (trainer.run.traffic["up_values"] == 6 * 64 + 6).all()


def test_cached_features_train_the_same_head(federate, foundation_config, nets):
    def fit(**options):
        return nets(federate(FedAvg(foundation=foundation_config, local_epochs=2), **options))[0]

    with_cache, without = fit(), fit(cache_gb=0)
    for name in with_cache:
        torch.testing.assert_close(with_cache[name], without[name], rtol=1e-4, atol=1e-5)


def test_clients_that_train_alone_send_nothing(federate, small, nets):
    trainer = federate(Local(**small), rounds_per_task=2)
    assert all(not values.any() for values in trainer.run.traffic.values())
    first, second = nets(trainer)
    assert not torch.equal(first["head.weight"], second["head.weight"])
    for mask in ("task_il", "class_il"):
        before, after = trainer.matrix.of(mask, "before"), trainer.matrix.of(mask, "after")
        assert torch.equal(before.nan_to_num(-1), after.nan_to_num(-1))


def test_nets_are_as_configured(foundation_config):
    net = FedAvg(small_model="test_byobnet", small_image_size=20).build_net(0, StreamShape(5))
    assert isinstance(net, SmallClassifier) and net.small.image_size == 20 and net.head.weight.shape[0] == 5
    frozen = FedAvg(foundation=replace(foundation_config, image_size=48)).build_net(0, StreamShape(5))
    assert frozen.foundation.image_size == 48
