"""The rows of an experiment at each size: configurations, options, and how often a row is repeated."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CONFIGS = Path(__file__).parent.parent / "configs"
FOLDERS = {"cpu": "cifar100_small", "gpu": "cifar100_deit_tiny", "paper": "imagenet_r"}
"""The data set of a preset, a name in configs/data; `--configs` names another one."""
KINDS = {"collaborator": "collaborative", "small_model": "cnn", "lr": "vit"}
"""Files that methods share, by an option that shows the kind of net."""
SEEDS = (42, 1999, 2024)
"""The paper's."""
ONCE = {"cpu": SEEDS[:1]}
"""Seeds of rows that a preset does not repeat, since two cores have no time for it."""
FIGURE_TASKS = {"cpu": 3}
"""Tasks of the runs behind Figs. 3 to 5 and of our choices, where they are not all."""


class Run(NamedTuple):
    """One row of a table before it is run: ``seeds`` are those that the preset asks for."""

    name: str
    configs: Sequence[Path]
    options: Sequence[str] = ()
    seeds: Sequence[int] = SEEDS


def parse(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options that all drivers share, from the command line where none are given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=FOLDERS, default="cpu", help="size of the experiment")
    parser.add_argument("--configs", help="a name in configs/data instead of the preset's own")
    parser.add_argument("--data_root", default="data", help="where datasets and weights are")
    parser.add_argument("--seeds", type=int, nargs="+", help="for all rows; else those of the preset, row by row")
    parser.add_argument("--only", nargs="+", help="names of the rows to run")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of all runs")
    parser.add_argument("--jobs", type=int, help="processes at once; on a CPU one for each core, else 1")
    parser.add_argument("--limit_s", type=float, help="stop after so many seconds; call again to go on")
    options = parser.parse_args(arguments)
    options.data = options.configs or FOLDERS[options.preset]
    options.base = [CONFIGS / f"{options.data}.yaml"]
    options.jobs = options.jobs or (os.cpu_count() if options.preset == "cpu" else 1)
    return options


def methods(data: str) -> list[str]:
    """The rows of a data set: where it has nets of its own, the methods that have a configuration with these nets."""
    names = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
    has_own_nets = (CONFIGS / data / "collaborative.yaml").is_file()
    return [name for name in names if not has_own_nets or len(configuration(data, name)) == 3]


def configuration(data: str, method: str) -> list[Path]:
    """The files of a run in the order of ``--config``: data set, method, and what differs for this pair.

    The last one is configs/DATA/METHOD.yaml, or else one that methods with the same kind of net share; a data set
    without changes has neither.
    """
    base = CONFIGS / "method" / f"{method}.yaml"
    settings = yaml.safe_load(base.read_text())["method"]["init_args"]
    kind = next((kind for name, kind in KINDS.items() if name in settings), "training_free")
    changes = [CONFIGS / data / f"{name}.yaml" for name in (method, kind)]
    return [CONFIGS / "data" / f"{data}.yaml", base, *[path for path in changes if path.is_file()][:1]]


def once(options: argparse.Namespace) -> Sequence[int]:
    """Seeds of a row that the small preset does not repeat."""
    return ONCE.get(options.preset, SEEDS)


def variant(name: str, options: argparse.Namespace, **changes: Any) -> Run:
    """A row for a figure: the base configuration with other values of the method; what it has anyway is left out.

    Args:
        name: of the row.
        options: of the driver.
        changes: by option, with __ for a dot.
    """
    known = yaml.safe_load(options.base[0].read_text())["method"]["init_args"]
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
    return Run(name, options.base, arguments, once(options))
