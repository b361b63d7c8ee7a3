"""Keep what a set of runs came to: results, matrices and one table, small enough to be committed.

python benchmarks/collect.py runs/cifar100_deit_tiny benchmarks/results/cifar100_deit_tiny
"""

import json
import shutil
import sys
from pathlib import Path

from fedlscl.report.table import comparison, find_results, markdown


def main(runs: Path, out: Path) -> None:
    """Copy the newest version of every run under ``runs`` to ``out`` and write table.md."""
    for results in find_results([runs]):
        folder = out / results.parent.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "matrix.csv", "config.yaml"):
            shutil.copy(results.with_name(name), folder / name)
        costs = json.loads(results.with_name("costs.json").read_text())
        (folder / "costs.json").write_text(json.dumps(costs, indent=1) + "\n")
    (out / "table.md").write_text(markdown(comparison([runs])) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
