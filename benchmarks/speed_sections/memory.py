"""What one more idle client costs: its net and, from the second task on, its predecessor."""

import gc
from pathlib import Path

import torch

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.client import Client
from fedlscl.methods import FedLSCL
from fedlscl.nets.collaborator import CollaboratorConfig
from fedlscl.nets.vit import FoundationConfig

MORE = 12


def measure() -> list[dict]:
    """Resident memory of clients that have been on the device and came back, by client."""
    from lightning.fabric import Fabric

    from fedlscl.federated.engine import Engine, PrefixCache
    from fedlscl.federated.method import StreamShape

    shape = CollaboratorConfig(foundation=FoundationConfig(name="deit_tiny_patch16_224", weights="random"))
    method, data = FedLSCL(collaborator=shape), SpatialTemporalDataModule(num_clients=2, num_tasks=1)
    engine = Engine(Fabric(accelerator="auto", devices=1), PrefixCache(data, 0, torch.float32))
    clients: list[Client] = []

    def add() -> None:
        client = Client(id=len(clients), net=method.build_net(0, StreamShape(10)), data=data.stream(0), engine=engine)
        with engine.on_device(client):
            client.snapshot()
        clients.append(client)

    for _ in range(3):
        add()
    before, on_device = resident(), device_bytes()
    for _ in range(MORE):
        add()
    own = sum(value.nbytes for value in clients[0].net.state_dict().values())
    per_client = (resident() - before) / MORE
    row = {
        "small_model": "resnet18", "clients": MORE, "parameters_mb": own / 1e6, "client_mb": per_client / 1e6,
        "ratio": per_client / own, "device_mb": (device_bytes() - on_device) / MORE / 1e6,
    }  # fmt: skip
    return [row]


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def device_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
