"""Whether every method learns its first task at all: a baseline that does not is broken, and wins nothing for others.

    python benchmarks/floors.py

Digits, three clients, the two classes that each meets first: guessing gives 50 %.
"""

import sys

from presets import Run, configuration, methods, parse
from sweep import place, planned, sweep

from fedlscl.report.runs import read_runs

ON_VIT, FROM_SCRATCH = 0.85, 0.6
"""Floors of methods on the frozen ViT and of CNNs from scratch (ours: FedNCM stands at 94 %)."""


def main() -> int:
    """Run what is missing; 0 when every method stands above its floor."""
    options = parse("First task of every method on digits.")
    rows = [
        Run(name, configuration("digits", name), ["--trainer.max_tasks", "1"])
        for name in methods("digits")
        if name != "fedlscl_paper"  # a variant of Fed-LSCL for one table
    ]
    whole, above = sweep("floors", rows, options), True
    for row, seed in planned([row for row in rows if not options.only or row.name in options.only], options.seeds):
        folder = options.out / f"floors_{options.preset}" / place(row, seed)
        results = read_runs([folder])[0].results
        floor = FROM_SCRATCH if results["foundation"] is None else ON_VIT
        accuracy = results["summary"][0]["class_il/average"]
        above &= accuracy >= floor
        note = "" if accuracy >= floor else " MISSED"
        print(f"{row.name:12} seed {seed}: {accuracy:6.1%}, floor {floor:.0%}{note}")
    return 0 if whole and above else 1


if __name__ == "__main__":
    sys.exit(main())
