"""Table 2 of the paper, and what every choice of ours is worth.

python benchmarks/ablation.py --preset cpu --data_root DATA
"""

import argparse
import sys

from presets import Run, once, variant
from sweep import drive

TABLE_2 = {
    "full": [],
    "no_distillation": ["--method.distill", "false"],
    "no_stage_2": ["--method.continual", "none"],
    "neither": ["--method.distill", "false", "--method.continual", "none"],
}
"""The paper's rows: Stage 2 and One-by-One Distillation on and off."""
REPLACED = {
    "stage_2_ewc": ["--method.continual", "ewc"],
    "stage_2_lwf": ["--method.continual", "lwf"],
}
"""Another method in Stage 2's place (end of Sec. 4.3)."""
OURS = {
    "full": {},
    "no_collaboration": {"collaborator__collaboration": False},
    "batch_statistics": {"freeze_norm": False},
    "no_imprinting": {"imprint": False},
    "linear_head": {"collaborator__head": "linear"},
    "no_balance": {"balance": False},
    "buffer_alone": {"replay_current": False},
    "own_initialisation": {"shared_initialisation": False},
}
"""One choice of ours taken back at a time, over as many tasks as the figures."""


def experiments(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Table 2, and a table of our choices."""
    rows = [Run(name, options.base, changes) for name, changes in TABLE_2.items()]
    rows += [Run(name, options.base, changes, once(options)) for name, changes in REPLACED.items()]
    return {"ablation": rows, "choices": [variant(name, options, **changes) for name, changes in OURS.items()]}


if __name__ == "__main__":
    sys.exit(drive("Ablation of Fed-LSCL.", experiments))
