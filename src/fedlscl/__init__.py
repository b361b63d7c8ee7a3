"""Large-small model collaboration for federated continual learning (Fed-LSCL, arXiv 2508.09489)."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedlscl.data import SpatialTemporalDataModule
    from fedlscl.federated.method import Method
    from fedlscl.federated.trainer import FederatedTrainer
    from fedlscl.functional.distillation import one_by_one_distill
    from fedlscl.methods.fedlscl import FedLSCL
    from fedlscl.modules import CollaborativeModule, ContinualFineTuningModule
    from fedlscl.nets.collaborator import Collaborator, CollaboratorConfig
    from fedlscl.nets.vit import FoundationConfig

_MODULES = {
    "Collaborator": "fedlscl.nets.collaborator",
    "CollaboratorConfig": "fedlscl.nets.collaborator",
    "CollaborativeModule": "fedlscl.modules",
    "ContinualFineTuningModule": "fedlscl.modules",
    "FedLSCL": "fedlscl.methods.fedlscl",
    "FederatedTrainer": "fedlscl.federated.trainer",
    "FoundationConfig": "fedlscl.nets.vit",
    "Method": "fedlscl.federated.method",
    "SpatialTemporalDataModule": "fedlscl.data",
    "one_by_one_distill": "fedlscl.functional.distillation",
}

__all__ = ["CollaborativeModule", "Collaborator", "CollaboratorConfig", "ContinualFineTuningModule", "FedLSCL"]
__all__ += ["FederatedTrainer", "FoundationConfig", "Method", "SpatialTemporalDataModule", "one_by_one_distill"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch, lightning and timm take seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fedlscl' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
