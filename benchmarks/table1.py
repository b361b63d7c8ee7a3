"""Table 1 of the paper: every method on the same split, budget and seeds.

    python benchmarks/table1.py --preset cpu --data_root DATA

The rows are configs/<folder>.yaml and configs/<folder>/*.yaml; `fedlscl fit --config FILE` runs one alone.
"""

import argparse
import sys

from presets import SEEDS, Run, once
from sweep import drive

VARIANTS = ("fedlscl_no_", "fedlscl_only_")
"""Rows of the ablation, not of this table."""
REPEATED = ("fedlscl", "lorm", "fedncm", "fedridge")
"""What the cpu preset repeats over all seeds: Fed-LSCL, LoRM and the controls."""


def experiments(options: argparse.Namespace) -> dict[str, list[Run]]:
    """A row for each configuration of the preset."""
    files = sorted(path for path in options.folder.glob("*.yaml") if not path.name.startswith(VARIANTS))
    rows = [("fedlscl", options.base), *((path.stem, path) for path in files)]
    return {
        "table1": [Run(name, path, seeds=SEEDS if name in REPEATED else once(options)) for name, path in rows],
    }


if __name__ == "__main__":
    sys.exit(drive("Every method of Table 1, and the controls.", experiments))
