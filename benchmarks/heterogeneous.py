"""Fig. 4: clients with small models of different architectures.

python benchmarks/heterogeneous.py --preset cpu --data_root DATA
"""

import sys

from sweep import parse, sweep, variant

MIXTURES = {
    "resnet18": ["resnet18"],
    "mobilenetv3": ["mobilenetv3_small_100"],
    "mixed": ["mobilenetv3_small_100", "resnet18", "resnet10t"],
}
"""Handed out to the clients in turn (architectures of ours: timm's small ones)."""


def main() -> int:
    """Run what is missing; 0 when all is there."""
    options = parse("Small models of one and of several architectures, with and without One-by-One Distillation.")
    rows = []
    for name, models in MIXTURES.items():
        changes = {"small_models": models} if len(models) > 1 else {"collaborator__small_model": models[0]}
        rows.append(variant(name, options, **changes))
        rows.append(variant(f"{name}_no_distillation", options, **changes, distill=False))
    return 0 if sweep("heterogeneous", rows, options) else 1


if __name__ == "__main__":
    sys.exit(main())
