"""The committed results are those of the drivers' cpu presets: every row, every seed, from today's configurations."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from presets import Run, parse  # noqa: E402
from sweep import planned  # noqa: E402

pytestmark = pytest.mark.publish
DRIVERS = ("readouts",)
"""Results of the other drivers are of the version before readouts (docs/results.md#earlier-tables)."""
PINNED_ELSEWHERE = {
    "data.root",
    "data.dataset",
    "trainer.precision",
    "trainer.default_root_dir",
    "trainer.name",
    "seed_everything",
}
"""What a machine or a driver decides."""


def cpu_rows() -> list[Any]:
    tables = [
        (f"{name}_cpu", run, seed)
        for driver in DRIVERS
        for name, rows in import_module(driver).experiments(parse("", [])).items()
        for run, seed in planned(rows, None)
    ]
    return [pytest.param(*row, id=f"{row[0]}-{row[1].name}-{row[2]}") for row in tables]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Values of a nested mapping by dotted path, without jsonargparse's init_args."""
    if not isinstance(tree, dict):
        yield path.removeprefix("."), tree
        return
    for key, value in tree.items():
        yield from leaves(value, path if key == "init_args" else f"{path}.{key}")


def asked(run: Run) -> dict[str, Any]:
    wanted = dict(leaf for file in run.configs for leaf in leaves(yaml.safe_load(file.read_text())))
    names, values = run.options[::2], run.options[1::2]
    wanted |= {name.removeprefix("--"): yaml.safe_load(value) for name, value in zip(names, values, strict=True)}
    return {name: value for name, value in wanted.items() if name not in PINNED_ELSEWHERE}


@pytest.mark.parametrize("table, run, seed", cpu_rows())
def test_every_row_was_run_to_its_end_as_it_is_asked_for(table, run, seed):
    folder = ROOT / "benchmarks/results" / table / f"seed{seed}" / run.name
    results = json.loads((folder / "results.json").read_text())
    assert results["tasks_done"] == results["data"]["num_tasks"]
    used = dict(leaves(yaml.safe_load((folder / "config.yaml").read_text())))
    used["method.class_path"] = used["method.class_path"].rpartition(".")[2]
    assert used["seed_everything"] == seed
    differing = {
        name: (used.get(name), value)
        for name, value in asked(run).items()
        if used.get(name) != value and not name.endswith("foundation.weights")
    }
    assert not differing, "used, asked for now"
