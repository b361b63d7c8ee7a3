import lightning
import pytest
import torch
from hypothesis import settings
from lightning.fabric import Fabric

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.engine import Engine, PrefixCache
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.nets.collaborator import CollaboratorConfig
from fedlscl.nets.net import SmallClassifier
from fedlscl.nets.vit import FoundationConfig

torch.set_num_threads(1)
settings.register_profile("fedlscl", deadline=None, max_examples=40)
settings.load_profile("fedlscl")


@pytest.fixture(scope="session")
def foundation_config():
    """A ViT of six blocks of width 64 over five tokens, with random weights."""
    return FoundationConfig(name="test_vit", weights="random", image_size=32)


@pytest.fixture(scope="session")
def collaborator_config(foundation_config):
    """The same ViT with a small CNN at 16 pixels and one adapted block."""
    return CollaboratorConfig(
        foundation=foundation_config, small_model="test_resnet", small_image_size=16, feature_dim=16, blocks=(3,)
    )


@pytest.fixture(scope="session")
def make_data():
    """Two clients, two tasks of two classes, six classes in all; keywords change that."""

    def make(**changed):
        tiny = {
            "dataset": "fake",
            "fake_classes": 6,
            "num_clients": 2,
            "num_tasks": 2,
            "private_classes": 2,
            "public_classes": 2,
            "train_per_class": 8,
            "test_per_class": 4,
            "image_size": 16,
            "batch_size": 8,
        }
        return SpatialTemporalDataModule(**(tiny | changed))

    return make


@pytest.fixture(scope="session")
def federate(make_data):
    """Fit a method on tiny data and return the trainer."""

    def run(method, data=None, seed=42, rounds_per_task=1, **options):
        trainer = FederatedTrainer(rounds_per_task=rounds_per_task, accelerator="cpu", **options)
        trainer.fit(method, make_data() if data is None else data, seed)
        return trainer

    return run


@pytest.fixture
def small_net():
    torch.manual_seed(0)
    return SmallClassifier("test_resnet", 6, image_size=16)


@pytest.fixture(scope="session")
def data(make_data):
    return make_data()


@pytest.fixture(scope="session")
def engine(data):
    return Engine(Fabric(accelerator="cpu"), PrefixCache(data, 0, torch.float32))


@pytest.fixture
def stock():
    """A stock trainer that writes nothing."""

    def make(**options):
        return lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **({"max_epochs": 1} | options),
        )

    return make


@pytest.fixture
def batches(data):
    """A loader over the first client's first task, in the same order at every call."""

    def make(client=0, task=0):
        stream = data.stream(client)
        return stream.loader(stream.train_ids(task), 6, shuffle=True, generator=torch.Generator().manual_seed(0))

    return make
