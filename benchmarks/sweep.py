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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from presets import Run, parse

Experiments = Callable[[argparse.Namespace], dict[str, list[Run]]]
"""The tables that a driver makes, by name."""


def drive(description: str, experiments: Experiments) -> int:
    """Run what is missing of a driver's tables; 0 when they are whole."""
    options = parse(description)
    ended = [sweep(name, rows, options) for name, rows in experiments(options).items()]
    return 0 if all(ended) else 1


def sweep(name: str, runs: Sequence[Run], options: argparse.Namespace) -> bool:
    """Run all that is not finished; seed by seed, so that an interrupted table has whole columns. True when all is."""
    out = options.out / f"{name}_{options.preset}"
    wanted = planned([run for run in runs if not options.only or run.name in options.only], options.seeds)
    todo = [(run, seed) for run, seed in wanted if not finished(out / place(run, seed), run)]
    deadline = None if options.limit_s is None else time.monotonic() + options.limit_s
    print(f"{len(wanted)} runs, {len(todo)} to do, in {out}", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        ended = list(pool.map(lambda task: execute(*task, out, options, deadline), todo))
    return all(ended)


def planned(runs: Sequence[Run], seeds: Sequence[int] | None) -> list[tuple[Run, int]]:
    """Every row with each of its seeds, or with each of ``seeds``; those of the first seed first."""
    order = seeds or dict.fromkeys(seed for run in runs for seed in run.seeds)
    return [(run, seed) for seed in order for run in runs if seeds or seed in run.seeds]


def execute(run: Run, seed: int, out: Path, options: argparse.Namespace, deadline: float | None) -> bool:
    """One run in a process of its own, single-threaded beside others; whether it finished."""
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        return False
    command = [sys.executable, "-m", "fedlscl", "fit"]
    command += [word for file in run.configs for word in ("--config", str(file))]
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
    """What a row is, whatever the seed: the text of its configurations and the options after them."""
    return hashlib.sha256("\0".join([*(file.read_text() for file in run.configs), *run.options]).encode()).hexdigest()


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
    return results["tasks_done"] == results["data"]["num_tasks"]
