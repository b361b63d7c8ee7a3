"""Fig. 4: clients with small models of different architectures.

python benchmarks/heterogeneous.py --preset cpu --data_root DATA
"""

import argparse
import sys

from presets import Run, variant
from sweep import drive

MIXTURES = {
    "resnet18": ["resnet18"],
    "mobilenetv3": ["mobilenetv3_small_100"],
    "mixed": ["mobilenetv3_small_100", "resnet18", "resnet10t"],
}
"""Handed out to the clients in turn (architectures of ours: timm's small ones)."""


def experiments(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Each mixture with One-by-One Distillation and without."""
    rows = []
    for name, models in MIXTURES.items():
        changes = {"small_models": models} if len(models) > 1 else {"collaborator__small_model": models[0]}
        rows.append(variant(name, options, **changes))
        rows.append(variant(f"{name}_no_distillation", options, **changes, distill=False))
    return {"heterogeneous": rows}


if __name__ == "__main__":
    sys.exit(drive("Fig. 4: small models of one and of several architectures.", experiments))
