import pytest
import torch

SMALL = {"small_model": "test_resnet", "small_image_size": 16, "local_epochs": 1, "batch_size": 8}


@pytest.fixture(scope="session")
def small():
    """Fields of a method that trains a tiny CNN for one epoch a round."""
    return SMALL


@pytest.fixture(scope="session")
def nets():
    """All clients' states of a trainer."""
    return lambda trainer: [client.net.state_dict() for client in trainer.clients]


@pytest.fixture(scope="session")
def same(nets):
    """Whether the clients of two trainers have the same nets bit for bit."""

    def compare(left, right):
        return all(
            a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
            for a, b in zip(nets(left), nets(right), strict=True)
        )

    return compare
