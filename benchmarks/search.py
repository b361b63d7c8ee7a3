"""Choose hyper-parameters on validation images, with equally many trials for every method.

    python benchmarks/search.py --preset cpu --data_root DATA [--only fedridge-1 ...]

The trials of each method, and of variants of Fed-LSCL (`readouts.CONTROLS`), are in search.yaml. A trial is a run of
the first two tasks at one seed, evaluated on training images that no client trains on (`data.validation_per_class`); as
many images are left for training as in the table, and no test image is read. All trials and the values with the highest
class-incremental accuracy of the method's own head go to benchmarks/results/search_PRESET.json; a method is in it once
all its trials have finished both tasks, and its entry is kept if `--out` holds none of them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from presets import Run, configuration, parse
from readouts import CONTROLS
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
        method = "fedlscl" if name in CONTROLS else name
        for number, tried in enumerate(values):
            changes = {**CONTROLS.get(name, {}), **tried}
            words = [word for key, value in changes.items() for word in (f"--method.{key}", str(value))]
            run = Run(f"{name}-{number}", configuration(options.data, method), [*held_out, *words], [SEED])
            found.setdefault(name, []).append((run, tried))
    return found


def trial(folder: Path, tried: dict[str, Any]) -> dict[str, Any] | None:
    """Accuracies of one trial, or None if its run has not finished all its tasks.

    Raises:
        ValueError: if the run in the folder had other values or was evaluated on test images.
    """
    if not folder.is_dir() or not any(folder.rglob("results.json")):
        return None
    (run,) = read_runs([folder])
    if run.tasks < run.goal or run.goal != TASKS:
        return None
    used = {name: run.options.get(f"method.init_args.{name}") for name in tried}
    if used != tried:
        raise ValueError(f"{folder} must be a run with {tried}, got {used}: remove it, and call again.")
    if (images := run.results["data"].get("evaluated_on", "test")) != "validation":
        raise ValueError(f"{folder} must be evaluated on validation images, got {images}: remove it, and call again.")
    figures = run.results["summary"][-1]
    return {"values": tried, **{name: figures[name] for name in ("class_il/average", "task_il/average")}}


def main() -> int:
    options = parse(__doc__.splitlines()[0])
    options.seeds = [SEED]
    options.base_data = options.base[0].parent / "data" / f"{options.data}.yaml"
    planned = trials(options)
    done = sweep("search", [run for runs in planned.values() for run, _ in runs], options)
    out = options.out / f"search_{options.preset}"
    path = Path(__file__).parent / "results" / f"search_{options.preset}.json"
    before = json.loads(path.read_text())["methods"] if path.is_file() else {}
    summary: dict[str, Any] = {"seed": SEED, "tasks": TASKS, "validation_per_class": VALIDATION, "methods": {}}
    for name, runs in planned.items():
        rows = [row for run, tried in runs if (row := trial(out / place(run, SEED), tried))]
        if len(rows) == len(runs):
            best = max(rows, key=lambda row: row["class_il/average"])
            summary["methods"][name] = {"chosen": best["values"], "trials": rows}
            print(f"{name}: {best['values']} {100 * best['class_il/average']:.1f} %", flush=True)
        elif not rows and name in before:
            summary["methods"][name] = before[name]
        else:
            print(f"{name}: {len(rows)} of {len(runs)} trials have finished, nothing is chosen", flush=True)
    write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
