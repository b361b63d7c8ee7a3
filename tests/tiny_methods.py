"""Every public method with nets that train in a tenth of a second, for the contract and for resumed runs."""

from dataclasses import asdict, fields
from functools import partial

import pytest

from fedlscl import methods
from fedlscl.nets.collaborator import CollaboratorConfig
from fedlscl.nets.vit import FoundationConfig

LOCAL = {"local_epochs": 1, "batch_size": 8}
SMALL = {"small_model": "test_resnet", "small_image_size": 16, **LOCAL}
VIT = FoundationConfig(name="test_vit", weights="random", image_size=32)
GLYPH = FoundationConfig(name="vit_glyph_patch4_32", weights="bundled")
SYNTHESIS = {"noise_dim": 8, "synthesis_size": 16, "synthesis_channels": (8, 4), "synthesis_batch": 8, **SMALL}
COLLABORATOR = CollaboratorConfig(foundation=VIT, small_model="test_resnet", small_image_size=16, feature_dim=16)
PROMPTS = {"foundation": GLYPH, "lr": 0.01}

TINY = {
    **SYNTHESIS,
    **{"foundation": VIT, "collaborator": COLLABORATOR, "buffer_per_class": 3, "fisher_samples": 4, "num_expanded": 3},
    **{"length": 2, "general_length": 1, "expert_length": 1, "fine_length": 2, "hidden": 16},
    **{"fine_blocks": (10,), "oracle_signal": True, "perturbation_steps": 2},
    **{"reconstruction_steps": 2, "synthesis_rounds": 3, "synthesis_steps": 2, "warmup_rounds": 1, "student_steps": 2},
    **{"replay_size": 8},
}
"""Small values of options, whichever method has them; one that is not here keeps its default."""
OWN = {
    "FedDualP": PROMPTS, "FedL2P": {"top": 2, **PROMPTS}, "FedMGP": PROMPTS, "FedWeIT": {"lr": 0.01}, 
    "LoRM": {"rank": 2, "lr": 0.01}, "PILoRA": {"lr": 0.05}, "MFCL": {"synthesis_steps": 3},
}  # fmt: skip
"""What one method needs for itself to train in a few steps."""


def build(name):
    """A public method; one that trains a small model has no ViT."""
    method = getattr(methods, name)
    options = {field.name for field in fields(method) if field.init}
    options -= {"foundation"} if "small_model" in options else set()
    return method(**{option: TINY[option] for option in options & TINY.keys()} | OWN.get(name, {}))


METHODS = {name: partial(build, name) for name in methods.__all__}
"""A function for every public method that builds it."""
QUICK = ("FedAvg", "FedLSCL", "GLFC", "LoRM")
"""One method of each kind: a CNN, the paper's, with training on the server, LoRA."""
MOSTLY_SLOW = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in methods.__all__]
"""All methods for a costly test, which runs those of QUICK by default."""


def configuration(name):
    """The same method as a ``method:`` group."""
    method = METHODS[name]()
    values = asdict(method)
    return {"class_path": name, "init_args": {field.name: values[field.name] for field in fields(method) if field.init}}
