from copy import deepcopy

import pytest
import torch

from fedlscl.modules import (
    ClassificationModule,
    CollaborativeModule,
    ConsolidationModule,
    ContinualFineTuningModule,
    DistillationModule,
    ProximalModule,
    trainable,
)
from fedlscl.nets.collaborator import Collaborator
from fedlscl.nets.net import SmallClassifier
from fedlscl.nets.vit import FoundationClassifier

NUM_CLASSES = 6


@pytest.fixture
def collaborator(collaborator_config):
    """One whose adapters do something."""
    torch.manual_seed(0)
    net = Collaborator(collaborator_config, NUM_CLASSES)
    torch.nn.init.normal_(net.generator.weight, std=0.1)
    return net


MODULES = {
    "classification": lambda small, vit, net: ClassificationModule(small),
    "classification-vit": lambda small, vit, net: ClassificationModule(vit),
    "proximal": lambda small, vit, net: ProximalModule(small, mu=0.1),
    "consolidation": lambda small, vit, net: ConsolidationModule(
        small,
        {name: p + 0.1 for name, p in trainable(small).items()},
        {name: torch.ones_like(p) for name, p in trainable(small).items()},
        strength=0.1,
    ),
    "distillation": lambda small, vit, net: DistillationModule(small, deepcopy(small), torch.tensor([0, 2]), 1.0, 2.0),
    "collaborative": lambda small, vit, net: CollaborativeModule(net),
    "continual": lambda small, vit, net: ContinualFineTuningModule(net, deepcopy(net)),
}


@pytest.fixture(params=MODULES)
def make_module(request, collaborator_config, foundation_config):
    """A function that builds the same module anew at every call."""

    def make():
        torch.manual_seed(0)
        small = SmallClassifier("test_resnet", NUM_CLASSES, image_size=16)
        vit = FoundationClassifier(foundation_config, NUM_CLASSES)
        return MODULES[request.param](small, vit, Collaborator(collaborator_config, NUM_CLASSES))

    return make
