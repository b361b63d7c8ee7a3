"""Who stays in memory; that a federation on disk learns the same bits is a promise of the contract."""

import pytest
import torch

from fedlscl.federated.client import Client, Parking
from fedlscl.federated.trainer import FederatedTrainer


class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(100))


def make_clients(number):
    return [Client(id=i, net=Weight(), data=None, engine=None) for i in range(number)]


def test_the_longest_idle_make_room():
    clients, parking = make_clients(3), Parking(2 * 400)
    values = [client.net.weight.detach().clone() for client in clients]
    for client in clients:
        parking.leave(client)
    assert [client.parked is None for client in clients] == [False, True, True]
    parking.take(clients[0])
    assert clients[0].parked is None and clients[0].net.weight.equal(values[0])
    parking.leave(clients[0])
    assert [client.parked is None for client in clients] == [True, False, True]
    assert parking.resident_bytes == 800


def test_a_parked_client_tells_its_state_without_coming_back():
    (client,), parking = make_clients(1), Parking(0)
    before = client.net.weight.detach().clone()
    parking.leave(client)
    assert client.state_dict()["net"]["weight"].equal(before) and client.parked is not None


def test_a_memory_that_is_none_is_refused():
    with pytest.raises(ValueError, match="clients_gb -1 is no amount of memory"):
        FederatedTrainer(clients_gb=-1)


def test_a_state_that_somebody_holds_outlives_the_next_turns():
    """It may be mapped from the file that the next turn replaces."""
    (client,), parking = make_clients(1), Parking(0)
    client.net.weight = torch.nn.Parameter(torch.rand(100_000))
    before = client.net.weight.detach().clone()
    parking.leave(client)
    held = client.state_dict()
    for _ in range(3):
        parking.take(client)
        with torch.no_grad():
            client.net.weight += 1
        parking.leave(client)
    assert held["net"]["weight"].equal(before)
    torch.testing.assert_close(client.state_dict()["net"]["weight"], before + 3)
