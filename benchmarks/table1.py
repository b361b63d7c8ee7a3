"""Table 1 of the paper: every method on the same split, budget and seeds.

    python benchmarks/table1.py --preset cpu --data_root DATA

The rows are the files in configs/method, on a data set of configs/data (`presets.configuration`).
"""

import argparse
import sys

from presets import SEEDS, Run, configuration, methods, once
from sweep import drive

REPEATED = ("fedlscl", "lorm", "fedncm", "fedridge")
"""What the cpu preset repeats over all seeds: Fed-LSCL, LoRM and the controls."""


def experiments(options: argparse.Namespace) -> dict[str, list[Run]]:
    """A row for each method of the preset, Fed-LSCL first."""
    return {
        "table1": [
            Run(name, configuration(options.data, name), seeds=SEEDS if name in REPEATED else once(options))
            for name in sorted(methods(options.data), key=lambda name: name != "fedlscl")
        ]
    }


if __name__ == "__main__":
    sys.exit(drive("Every method of Table 1, and the controls.", experiments))
