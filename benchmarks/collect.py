"""Keep what a set of runs came to: results, matrices and one table, small enough to be committed.

    python benchmarks/collect.py runs/benchmarks/table1_cpu benchmarks/results/table1_cpu

Folders of the machine that ran them are left out of what is kept: data sets and weights are named by file.
"""

import json
import re
import sys
from pathlib import Path

from fedlscl.federated.checkpoint import write_atomically
from fedlscl.report.groups import grouped
from fedlscl.report.runs import read_runs
from fedlscl.report.table import table_markdown

KEPT = ("results.json", "matrix.csv", "rounds.csv", "config.yaml", "costs.json")
ROOT = re.compile(r"(?<=\s|\")/[^\s\"]*?/(?=(\w+\.safetensors|\w+\.npz))")
FOLDER = re.compile(r"(?m)^( *(?:root|default_root_dir|cache_dir): )/\S+/")
"""Absolute folders in configurations and results."""


def main(runs: Path, out: Path) -> None:
    """Copy the newest version of every finished run under ``runs`` to the same place under ``out``; write table.md."""
    for results in [run.path for run in read_runs([runs])]:
        found = json.loads(results.read_text())
        if found["tasks_done"] < found["data"]["num_tasks"]:
            print(f"left out, not finished: {results}")
            continue
        folder = results.parent.parent if results.parent.name.startswith("version_") else results.parent
        folder = out / folder.relative_to(runs)
        folder.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            (folder / name).write_text(without_places(results.with_name(name).read_text()))
    write_atomically(out / "table.md", table_markdown(grouped(read_runs([out]))).encode())


def without_places(text: str) -> str:
    """A file of a run without the folders of its machine."""
    return FOLDER.sub(r"\1", ROOT.sub("data/", text))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
