"""Table 1 of the paper: every method on the same split, budget and seeds.

    python benchmarks/table1.py --preset cpu --data_root DATA

The rows are configs/<folder>.yaml and configs/<folder>/*.yaml; `fedlscl fit --config FILE` runs one alone.
"""

import sys

from sweep import Run, parse, sweep

VARIANTS = ("fedlscl_no_", "fedlscl_only_")
"""Rows of the ablation, not of this table."""


REPEATED = ("fedlscl", "fedbe", "feddualp", "fedavg_vit", "lorm", "pilora", "fedncm", "fedridge")
"""Rows that the cpu preset repeats over all seeds; the others would cost hours, and end far behind."""


def main() -> int:
    """Run what is missing; 0 when the table is whole."""
    options = parse("Every method of Table 1, and the controls.")
    files = sorted(path for path in options.folder.glob("*.yaml") if not path.name.startswith(VARIANTS))
    rows = [Run("fedlscl", options.base), *(Run(path.stem, path) for path in files)]
    if options.preset != "cpu":
        return 0 if sweep("table1", rows, options) else 1
    repeated, seeds = [row for row in rows if row.name in REPEATED], options.seeds
    options.seeds = seeds[:1]
    first = sweep("table1", rows, options)
    options.seeds = seeds[1:]
    return 0 if sweep("table1", repeated, options) and first else 1


if __name__ == "__main__":
    sys.exit(main())
