"""Fig. 4: clients with small models of different architectures.

python benchmarks/heterogeneous.py --preset cpu --data_root DATA
"""

import json
import sys

from sweep import Run, parse, sweep

MIXTURES = {
    "resnet18": ["resnet18"],
    "mobilenetv3": ["mobilenetv3_small_100"],
    "mixed_2": ["resnet18", "mobilenetv3_small_100"],
    "mixed_3": ["resnet18", "mobilenetv3_small_100", "resnet10t"],
}
"""Handed out to the clients in turn (architectures of ours: timm's small ones)."""


def main() -> int:
    """Run what is missing; 0 when all is there."""
    options = parse("Small models of one and of several architectures, with and without One-by-One Distillation.")
    rows = []
    for name, models in MIXTURES.items():
        changes = ["--method.small_models", json.dumps(models)]
        rows.append(Run(name, options.base, changes))
        rows.append(Run(f"{name}_no_distillation", options.base, [*changes, "--method.distill", "false"]))
    return 0 if sweep("heterogeneous", rows, options) else 1


if __name__ == "__main__":
    sys.exit(main())
