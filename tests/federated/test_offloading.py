"""Who stays in memory; that a federation on disk learns the same bits is a promise of the contract."""

import pytest
import torch

from fedlscl.federated.client import Client, ClientOffloader
from fedlscl.federated.trainer import FederatedTrainer


class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(100))


def make_clients(number):
    return [Client(id=i, net=Weight(), data=None, engine=None) for i in range(number)]


def test_the_longest_idle_make_room():
    clients, offloader = make_clients(3), ClientOffloader(2 * 400)
    values = [client.net.weight.detach().clone() for client in clients]
    for client in clients:
        offloader.release(client)
    assert [client.offloaded_to is None for client in clients] == [False, True, True]
    offloader.acquire(clients[0])
    assert clients[0].offloaded_to is None and clients[0].net.weight.equal(values[0])
    offloader.release(clients[0])
    assert [client.offloaded_to is None for client in clients] == [True, False, True]
    assert sum(size for _, size in offloader.resident.values()) == 800


def test_a_parked_client_tells_its_state_without_coming_back():
    (client,), offloader = make_clients(1), ClientOffloader(0)
    before = client.net.weight.detach().clone()
    offloader.release(client)
    assert client.state_dict()["net"]["weight"].equal(before) and client.offloaded_to is not None


def test_a_memory_that_is_none_is_refused():
    with pytest.raises(ValueError, match="clients_gb must be >= 0, got -1"):
        FederatedTrainer(clients_gb=-1)


def test_a_state_that_somebody_holds_outlives_the_next_turns():
    """It may be mapped from the file that the next turn replaces."""
    (client,), offloader = make_clients(1), ClientOffloader(0)
    client.net.weight = torch.nn.Parameter(torch.rand(100_000))
    before = client.net.weight.detach().clone()
    offloader.release(client)
    held = client.state_dict()
    for _ in range(3):
        offloader.acquire(client)
        with torch.no_grad():
            client.net.weight += 1
        offloader.release(client)
    assert held["net"]["weight"].equal(before)
    torch.testing.assert_close(client.state_dict()["net"]["weight"], before + 3)
