"""Table 1 of the paper: every method on the same split, budget and seeds.

    python benchmarks/table1.py --preset cpu --data_root DATA

The rows are configs/<folder>.yaml and configs/<folder>/*.yaml; `fedlscl fit --config FILE` runs one alone.
"""

import sys

from sweep import Run, parse, sweep

VARIANTS = ("fedlscl_no_", "fedlscl_only_")
"""Rows of the ablation, not of this table."""


def main() -> int:
    """Run what is missing; 0 when the table is whole."""
    options = parse("Every method of Table 1, and the controls.")
    files = sorted(path for path in options.folder.glob("*.yaml") if not path.name.startswith(VARIANTS))
    rows = [Run("fedlscl", options.base), *(Run(path.stem, path) for path in files)]
    return 0 if sweep("table1", rows, options) else 1


if __name__ == "__main__":
    sys.exit(main())
