"""Every public method with nets that learn in a tenth of a second, for the contract and for kills."""

from dataclasses import asdict, fields

from fedlscl import methods
from fedlscl.nets.collaborator import CollaboratorConfig
from fedlscl.nets.vit import FoundationConfig

LOCAL = {"local_epochs": 1, "batch_size": 8}
SMALL = {"small_model": "test_resnet", "small_image_size": 16, **LOCAL}
VIT = FoundationConfig(name="test_vit", weights="random", image_size=32)
GLYPH = FoundationConfig(name="vit_glyph_patch4_32", weights="bundled")
SYNTHESIS = {"noise_dim": 8, "synthesis_size": 16, "synthesis_channels": (8, 4), "synthesis_batch": 8, **SMALL}
PROMPTS = {"foundation": GLYPH, "lr": 0.01, **LOCAL}
COLLABORATOR = CollaboratorConfig(foundation=VIT, small_model="test_resnet", small_image_size=16, feature_dim=16)

METHODS = {
    "EWC": lambda: methods.EWC(**SMALL, fisher_samples=4),
    "FedAvg": lambda: methods.FedAvg(**SMALL),
    "FedBE": lambda: methods.FedBE(foundation=VIT, num_expanded=3, **LOCAL),
    "FedDualP": lambda: methods.FedDualP(general_length=1, expert_length=1, **PROMPTS),
    "FedL2P": lambda: methods.FedL2P(length=2, top=2, **PROMPTS),
    "FedLSCL": lambda: methods.FedLSCL(collaborator=COLLABORATOR, buffer_per_class=3, **LOCAL),
    "FedMGP": lambda: methods.FedMGP(length=2, fine_length=2, fine_blocks=(10,), hidden=16, **PROMPTS),
    "FedNCM": lambda: methods.FedNCM(foundation=VIT),
    "FedProx": lambda: methods.FedProx(**SMALL),
    "FedRidge": lambda: methods.FedRidge(foundation=VIT),
    "FedWeIT": lambda: methods.FedWeIT(**SMALL, lr=0.01),
    "GLFC": lambda: methods.GLFC(**SMALL, oracle_signal=True, perturbation_steps=2, reconstruction_steps=2),
    "Joint": lambda: methods.Joint(**SMALL),
    "JointLSCL": lambda: methods.JointLSCL(collaborator=COLLABORATOR, **LOCAL),
    "LoRM": lambda: methods.LoRM(foundation=VIT, rank=2, lr=0.01, **LOCAL),
    "Local": lambda: methods.Local(**SMALL),
    "LwF": lambda: methods.LwF(**SMALL),
    "MFCL": lambda: methods.MFCL(synthesis_steps=3, replay_size=8, **SYNTHESIS),
    "PILoRA": lambda: methods.PILoRA(foundation=VIT, lr=0.05, **LOCAL),
    "TARGET": lambda: methods.TARGET(
        synthesis_rounds=3, synthesis_steps=2, warmup_rounds=1, student_steps=2, **SYNTHESIS
    ),
}
"""A function for every public method that builds it."""


def configuration(name):
    """The same method as a ``method:`` group."""
    method = METHODS[name]()
    values = asdict(method)
    return {"class_path": name, "init_args": {field.name: values[field.name] for field in fields(method) if field.init}}
