"""Net and training of the stock app."""

import torch

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.method import StreamShape
from fedlscl.methods import FedAvg
from fedlscl.modules import ClassificationModule


def build():
    torch.manual_seed(42)
    return FedAvg(small_model="test_resnet", small_image_size=32).build_net(0, StreamShape(10))


def train(net, client):
    data = SpatialTemporalDataModule(dataset="digits").stream(client)
    module = ClassificationModule(net, data.classes(0), lr=1e-3)
    optimizer = module.configure_optimizers()
    module.train()
    for step, batch in enumerate(data.loader(data.train_ids(0), 16, shuffle=True)):
        module.training_step(batch, step)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return len(data.train_ids(0))
