"""Run a list of configurations over seeds, one process each, and keep what they came to.

A call goes on where the last one stopped: finished runs are skipped, begun ones continue from their checkpoint, and
those whose configuration has changed since begin anew. What another sweep has run already, with the same configuration
and seed, is copied.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CONFIGS = Path(__file__).parent.parent / "configs"
FOLDERS = {"cpu": "cifar100_small", "gpu": "cifar100_deit_tiny", "paper": "imagenet_r"}
"""Where the configurations of a preset are; `--configs` names another folder."""
FIGURE_TASKS = {"cpu": 3}
"""Tasks of the runs behind Figs. 3 to 5, where they are not all."""
SEEDS = (42, 1999, 2024)
"""The paper's."""


class Run(NamedTuple):
    """One row of a table before it is run with a seed."""

    name: str
    config: Path
    options: Sequence[str] = ()


def parse(description: str) -> argparse.Namespace:
    """The options that all drivers share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=FOLDERS, default="cpu", help="size of the experiment")
    parser.add_argument("--configs", help="folder of configurations, in place of the preset's own")
    parser.add_argument("--data_root", default="data", help="where datasets and weights are")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", nargs="+", help="names of the rows to run")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of all runs")
    parser.add_argument("--jobs", type=int, help="processes at once; on a CPU one for each core, else 1")
    parser.add_argument("--limit_s", type=float, help="stop after so many seconds; call again to go on")
    options = parser.parse_args()
    options.folder = CONFIGS / (options.configs or FOLDERS[options.preset])
    options.base = options.folder.with_suffix(".yaml")
    options.jobs = options.jobs or (os.cpu_count() if options.preset == "cpu" else 1)
    return options


def variant(name: str, options: argparse.Namespace, **changes: Any) -> Run:
    """A row for a figure: the base configuration with other values of the method; what it has anyway is left out.

    Args:
        name: of the row.
        options: of the driver.
        changes: by option, with __ for a dot.
    """
    known = yaml.safe_load(options.base.read_text())["method"]["init_args"]
    arguments: list[str] = []
    for key, value in changes.items():
        path, here = key.split("__"), known
        for part in path:
            here = here.get(part, {}) if isinstance(here, dict) else {}
        if here != value:
            text = json.dumps(value) if isinstance(value, list | bool) else str(value)
            arguments += [f"--method.{'.'.join(path)}", text]
    if options.preset in FIGURE_TASKS:
        arguments += ["--trainer.max_tasks", str(FIGURE_TASKS[options.preset])]
    return Run(name, options.base, arguments)


def sweep(name: str, runs: Iterable[Run], options: argparse.Namespace) -> bool:
    """Run all that is not finished; seed by seed, so that an interrupted table has whole columns. True when all is."""
    out = options.out / f"{name}_{options.preset}"
    chosen = [run for run in runs if not options.only or run.name in options.only]
    todo = [(run, seed) for seed in options.seeds for run in chosen if not finished(out / place(run, seed), run)]
    deadline = None if options.limit_s is None else time.monotonic() + options.limit_s
    print(f"{len(chosen) * len(options.seeds)} runs, {len(todo)} to do, in {out}", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        ended = list(pool.map(lambda task: execute(*task, out, options, deadline), todo))
    return all(ended)


def execute(run: Run, seed: int, out: Path, options: argparse.Namespace, deadline: float | None) -> bool:
    """One run in a process of its own, single-threaded beside others; whether it finished."""
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        return False
    command = [sys.executable, "-m", "fedlscl", "fit", "--config", str(run.config)]
    command += ["--seed_everything", str(seed), "--data.root", options.data_root]
    folder = out / place(run, seed)
    if copied(run, seed, folder, out):
        return True
    command += ["--trainer.default_root_dir", str(folder.parent), "--trainer.name", run.name, *run.options]
    folder.parent.mkdir(parents=True, exist_ok=True)
    if asked(run) == known(folder):
        command += ["--ckpt_path", "last"]
    note(folder).write_text(asked(run))
    environment = dict(os.environ, **({"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {}))
    started = time.monotonic()
    with note(folder, "log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
    state = "done" if process.returncode == 0 else f"stopped ({process.returncode}), see {log.name}"
    print(f"{run.name}, seed {seed}: {state} after {time.monotonic() - started:.0f} s", flush=True)
    return process.returncode == 0


def copied(run: Run, seed: int, folder: Path, out: Path) -> bool:
    """Take over the finished run of another sweep of the same preset that asked for the same; whether there is one."""
    preset = out.name.rsplit("_", 1)[1]
    for other in sorted(out.parent.glob(f"*_{preset}/seed{seed}/*.asked")):
        found = other.with_name(other.name.removesuffix(".asked"))
        if found != folder and finished(found, run):
            shutil.copytree(
                found, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint*", "tensorboard")
            )
            note(folder).write_text(asked(run))
            print(f"{run.name}, seed {seed}: the run {found.parent.parent.name}/{found.name}", flush=True)
            return True
    return False


def place(run: Run, seed: int) -> Path:
    """A run's folder below that of all; reports group what has the same name."""
    return Path(f"seed{seed}", run.name)


def asked(run: Run) -> str:
    """What a row is, whatever the seed: its configuration's text and the options after it."""
    return hashlib.sha256("\0".join([run.config.read_text(), *run.options]).encode()).hexdigest()


def note(folder: Path, kind: str = "asked") -> Path:
    """A file beside a run's folder, whose name may hold a dot."""
    return folder.with_name(f"{folder.name}.{kind}")


def known(folder: Path) -> str | None:
    """What was asked for when the run in a folder began."""
    file = note(folder)
    return file.read_text() if file.is_file() else None


def finished(folder: Path, run: Run) -> bool:
    """Whether the newest version in a folder is of this row and has learned all its tasks."""
    files = sorted(folder.glob("version_*/results.json"), key=lambda file: file.stat().st_mtime)
    if not files or known(folder) != asked(run):
        return False
    results = json.loads(files[-1].read_text())
    return results["tasks_done"] == len(results["accuracy"]["after"]["seen"][0])
