import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.callbacks import Callback
from fedlscl.federated.method import Progress
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.testing import Recorded, fake_data
from tiny_methods import METHODS

ORACLES = {"Joint", "JointLSCL"}
PLACES = [Progress(task, round_) for task in range(4) for round_ in range(50)]


@given(st.floats(0.01, 1), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_as_many_are_asked_as_the_share_says(participation, clients, seed):
    participants = FederatedTrainer(participation=participation).sample_clients(clients, seed, Progress(1, 2))
    assert len(participants) == max(1, round(participation * clients))
    assert participants == sorted(set(participants)) and set(participants) <= set(range(clients))


def test_everybody_comes_unless_told_otherwise():
    assert FederatedTrainer().sample_clients(5, 42, Progress(0, 0)) == [0, 1, 2, 3, 4]


def test_each_round_draws_anew_and_alike_for_the_same_seed():
    half = FederatedTrainer(participation=0.5)
    draws = [tuple(half.sample_clients(10, 42, place)) for place in PLACES]
    assert draws == [tuple(half.sample_clients(10, 42, place)) for place in PLACES]
    assert len(set(draws)) > len(draws) / 2 and {client for draw in draws for client in draw} == set(range(10))


def test_failures_come_as_often_as_asked():
    attended = [len(FederatedTrainer(failure_rate=0.3).sample_clients(10, 42, place)) for place in PLACES]
    assert abs(sum(attended) / (10 * len(PLACES)) - 0.7) < 0.03


@pytest.mark.parametrize(
    "options", [{"participation": 0.0}, {"participation": 1.1}, {"failure_rate": 1.0}, {"quorum": -1}]
)
def test_what_makes_no_sense_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        FederatedTrainer(**options)


class Absences(Callback):
    """Watches that who is absent neither trains nor changes."""

    def __init__(self):
        self.absent = 0

    def on_round_start(self, trainer):
        self.before = {c.id: c.net.state_dict() for c in trainer.clients if c.id not in trainer.participants}
        self.before = {i: {name: value.clone() for name, value in net.items()} for i, net in self.before.items()}

    def on_client_start(self, trainer, client):
        assert client.id in trainer.participants

    def on_round_end(self, trainer):
        for client, net in self.before.items():
            self.absent += 1
            assert all(value.equal(net[name]) for name, value in trainer.clients[client].net.state_dict().items())
            place = client, *trainer.progress.position
            assert not any(trainer.traffic[name][place] for name in trainer.traffic)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - ORACLES))
def test_every_method_goes_on_without_those_who_are_absent(name, federate):
    """One of two clients a round, and none at all where it fails: nobody sees what the absent would have sent."""
    watch = Absences()
    options = {"participation": 0.5, "failure_rate": 0.3, "quorum": 0, "rounds_per_task": 3}
    trainer = federate(METHODS[name](), callbacks=[watch], **options)
    assert watch.absent >= 6 and not trainer.matrix.of("class_il")[:, -1].isnan().any()


def test_a_round_without_quorum_ends_the_run_and_says_so(federate):
    with pytest.raises(ValueError, match=r"quorum 2 is not met: 1 of 2 clients answered in task 1, round 1; lower"):
        federate(METHODS["FedAvg"](), participation=0.5, quorum=2)


def test_a_round_in_which_nobody_has_a_sample_is_not_aggregated():
    """Of two clients, one of which never has any, one is asked in a round."""
    run = Recorded(participation=0.5, rounds_per_task=4)
    data = fake_data(protocol="global", private_classes=0, public_classes=4, dirichlet_alpha=0.01)
    run.fit(METHODS["FedAvg"](), data, seed=46)
    assert [len(client.data.train_ids(task)) for client in run.clients for task in range(2)] == [0, 0, 16, 16]
    senders = [upload.client for upload in run.uploads]
    assert set(senders) == {0, 1} and len(senders) == 8
    assert len(run.answers) == senders.count(1)
