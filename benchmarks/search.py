"""Choose hyper-parameters on validation images, with equally many trials for every method.

    python benchmarks/search.py --preset cpu --data_root DATA [--only fedridge-1 ...]

The trials of each method are in search.yaml. A trial is a run of the first two tasks at one seed, evaluated on training
images that no client trains on (`data.validation_per_class`); as many images are left for training as in the table, and
no test image is read. All trials and the values with the highest class-incremental accuracy of the method's own head go
to benchmarks/results/search_PRESET.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from presets import Run, configuration, parse
from sweep import place, sweep

from fedlscl.federated.checkpoint import write_atomically
from fedlscl.report.runs import read_runs

SEED, TASKS = 7, 2
"""Of the trials: no seed of a table, and the first tasks."""
VALIDATION = 10
"""Images of each class."""
SPACES = Path(__file__).with_name("search.yaml")


def trials(options: argparse.Namespace) -> dict[str, list[tuple[Run, dict[str, Any]]]]:
    """Runs of each method with the values that they try."""
    spaces: dict[str, list[dict[str, Any]]] = yaml.safe_load(SPACES.read_text())
    if len(numbers := {len(values) for values in spaces.values()}) != 1:
        raise ValueError(f"{SPACES.name} must have equally many trials for every method, got {sorted(numbers)}.")
    data = yaml.safe_load(options.base_data.read_text())["data"]
    held_out = ["--data.validation_per_class", str(VALIDATION), "--data.evaluate_on", "validation"]
    held_out += (
        ["--data.train_per_class", str(data["train_per_class"] + VALIDATION)] if "train_per_class" in data else []
    )
    held_out += ["--trainer.max_tasks", str(TASKS)]
    found: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for name, values in spaces.items():
        for number, tried in enumerate(values):
            words = [word for key, value in tried.items() for word in (f"--method.{key}", str(value))]
            run = Run(f"{name}-{number}", configuration(options.data, name), [*held_out, *words], [SEED])
            found.setdefault(name, []).append((run, tried))
    return found


def main() -> int:
    options = parse(__doc__.splitlines()[0])
    options.seeds = [SEED]
    options.base_data = options.base[0].parent / "data" / f"{options.data}.yaml"
    planned = trials(options)
    done = sweep("search", [run for runs in planned.values() for run, _ in runs], options)
    out = options.out / f"search_{options.preset}"
    summary: dict[str, Any] = {"seed": SEED, "tasks": TASKS, "validation_per_class": VALIDATION, "methods": {}}
    for name, runs in planned.items():
        rows = []
        for run, tried in runs:
            folder = out / place(run, SEED)
            if folder.is_dir() and any(folder.rglob("results.json")):
                (read,) = read_runs([folder])
                assert read.results["data"]["evaluated_on"] == "validation"
                figures = read.results["summary"][-1]
                rows.append({"values": tried, **{n: figures[n] for n in ("class_il/average", "task_il/average")}})
        if len(rows) == len(runs):
            best = max(rows, key=lambda row: row["class_il/average"])
            summary["methods"][name] = {"chosen": best["values"], "trials": rows}
            print(f"{name}: {best['values']} {100 * best['class_il/average']:.1f} %", flush=True)
    path = Path(__file__).parent / "results" / f"search_{options.preset}.json"
    write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
