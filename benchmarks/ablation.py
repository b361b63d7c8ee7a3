"""Table 2 of the paper, and what every choice of ours is worth.

python benchmarks/ablation.py --preset cpu --data_root DATA
"""

import sys

from sweep import Run, parse, sweep, variant

TABLE_2 = {
    "full": [],
    "no_distillation": ["--method.distill", "false"],
    "no_stage_2": ["--method.continual", "none"],
    "neither": ["--method.distill", "false", "--method.continual", "none"],
    "stage_2_ewc": ["--method.continual", "ewc"],
    "stage_2_lwf": ["--method.continual", "lwf"],
}
"""The paper's rows: Stage 2 and One-by-One Distillation on and off, and Stage 2 replaced (end of Sec. 4.3)."""
OURS = {
    "full": {},
    "no_collaboration": {"collaborator__collaboration": False},
    "no_frozen_head": {"collaborator__analytic_weight": 0},
    "no_adapted_head": {"collaborator__adapted_weight": 0},
    "batch_statistics": {"freeze_norm": False},
    "no_imprinting": {"imprint": False},
    "linear_head": {"collaborator__head": "linear"},
    "no_balance": {"balance": False},
    "buffer_alone": {"replay_current": False},
    "own_initialisation": {"shared_initialisation": False},
}
"""One choice of ours taken back at a time, over as many tasks as the figures."""


def main() -> int:
    """Run what is missing; 0 when all is there."""
    options = parse("Ablation of Fed-LSCL.")
    rows = [Run(name, options.base, changes) for name, changes in TABLE_2.items()]
    ours = [variant(name, options, **changes) for name, changes in OURS.items()]
    ended = [sweep("ablation", rows, options), sweep("choices", ours, options)]
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
