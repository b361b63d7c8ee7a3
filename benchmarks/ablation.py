"""Table 2 of the paper, and what every choice of ours is worth.

python benchmarks/ablation.py --preset cpu --data_root DATA
"""

import sys

from sweep import Run, parse, sweep

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
    "no_collaboration": ["--method.collaborator.collaboration", "false"],
    "no_frozen_head": ["--method.collaborator.analytic_weight", "0"],
    "no_adapted_head": ["--method.collaborator.adapted_weight", "0"],
    "batch_statistics": ["--method.freeze_norm", "false"],
    "no_imprinting": ["--method.imprint", "false"],
    "linear_head": ["--method.collaborator.head", "linear"],
    "no_balance": ["--method.balance", "false"],
    "buffer_alone": ["--method.replay_current", "false"],
    "own_initialisation": ["--method.shared_initialisation", "false"],
}
"""One choice of ours taken back at a time; the cpu preset runs them with the first seed alone."""


def main() -> int:
    """Run what is missing; 0 when all is there."""
    options = parse("Ablation of Fed-LSCL.")
    rows = [Run(name, options.base, changes) for name, changes in TABLE_2.items()]
    ours = [Run(name, options.base, changes) for name, changes in OURS.items()]
    done = sweep("ablation", rows, options)
    options.seeds = options.seeds[: 1 if options.preset == "cpu" else None]
    return 0 if sweep("ablation", ours, options) and done else 1


if __name__ == "__main__":
    sys.exit(main())
