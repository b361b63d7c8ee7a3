"""One table over several runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlscl.report.finding import find_results, run_folder
from fedlscl.report.runs import read_json

COLUMNS = {
    "seen/average": "seen %",
    "seen/worst_client": "worst client %",
    "seen/forgetting": "forgetting %",
    "task/average": "task %",
    "task/current": "current task %",
}
"""Figures after the last task, by their names in results.json; accuracies are means over clients and tasks."""


def comparison(paths: Sequence[Path]) -> list[list[str]]:
    """Header and one row per run under its folder's name, best final ``seen`` accuracy first."""
    runs = [(run_folder(path).name, read_json(path)) for path in find_results(paths)]
    runs.sort(key=lambda run: -final(run[1])["seen/average"])
    header = ["run", *COLUMNS.values(), "up MB", "down MB", "seed"]
    return [header] + [_row(*run) for run in runs]


def final(run: dict[str, Any]) -> dict[str, float]:
    """The figures after the last task that the run has finished."""
    return run["summary"][-1]


def print_comparison(paths: Sequence[Path]) -> None:
    """Print the table to the terminal, or as Markdown where the output goes elsewhere."""
    import sys

    header, *rows = comparison(paths)
    if not sys.stdout.isatty():
        print(markdown([header, *rows]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="After the last task: all tasks, mean over clients")
    for column in header:
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def markdown(rows: list[list[str]], rule: str = "---:") -> str:
    """A Markdown table whose first row is the header; ``rule`` aligns all columns but the first.

    Example:
        >>> print(markdown([["run", "seen %"], ["FedAvg", "41.0"]]))
        | run | seen % |
        |---|---:|
        | FedAvg | 41.0 |
    """
    rules = ["---", *[rule] * (len(rows[0]) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join(rules) + "|", *lines[1:]])


def _row(name: str, run: dict[str, Any]) -> list[str]:
    figures = final(run)
    traffic = [f"{run['traffic'][direction] / 1e6:.2f}" for direction in ("up_bytes", "down_bytes")]
    return [name, *(f"{100 * figures[name]:.1f}" for name in COLUMNS), *traffic, str(run["seed"])]
