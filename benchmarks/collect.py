"""Keep what a set of runs came to: results, matrices and one table, small enough to be committed.

python benchmarks/collect.py runs/benchmarks/table1_cpu benchmarks/results/table1_cpu
"""

import json
import shutil
import sys
from pathlib import Path

from fedlscl.federated.checkpoint import write_atomically
from fedlscl.report.finding import find_results
from fedlscl.report.groups import grouped
from fedlscl.report.numbers import table_markdown
from fedlscl.report.runs import read_runs

KEPT = ("results.json", "matrix.csv", "config.yaml")


def main(runs: Path, out: Path) -> None:
    """Copy the newest version of every finished run under ``runs`` to the same place under ``out``; write table.md."""
    for results in find_results([runs]):
        found = json.loads(results.read_text())
        if found["tasks_done"] < len(found["accuracy"]["after"]["seen"][0]):
            print(f"left out, not finished: {results}")
            continue
        folder = results.parent.parent if results.parent.name.startswith("version_") else results.parent
        folder = out / folder.relative_to(runs)
        folder.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(results.with_name(name), folder / name)
        costs = json.loads(results.with_name("costs.json").read_text())
        (folder / "costs.json").write_text(json.dumps(costs, indent=1) + "\n")
    write_atomically(out / "table.md", table_markdown(grouped(read_runs([out]))).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
