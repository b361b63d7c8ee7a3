"""The result table that a run ends with."""

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fedlscl.federated.metrics import MASKS
from fedlscl.federated.results import results
from fedlscl.federated.wording import in_bytes, in_hours, parameter_line, percent

if TYPE_CHECKING:
    from rich.console import Console

    from fedlscl.federated.trainer import FederatedTrainer

HEADER = ("classes", "task", "current", "average", "before agg.", "forgetting", "worst client")
FIGURES = ("current", "average", "average_before_aggregation", "forgetting", "worst_client")
LEGEND = {"task": "task's own", "seen": "all seen"}
"""Which classes compete under each mask."""


def results_table(results: dict[str, Any]) -> list[list[str]]:
    """Rows of text, the header first: for each mask and task the summary in percent; tasks count from 1.

    Args:
        results: what results.json holds.
    """
    rows: list[list[str]] = [list(HEADER)]
    for mask in MASKS:
        for task, figures in enumerate(results["summary"], start=1):
            values = [percent(figures[f"{mask}/{name}"]) for name in FIGURES]
            rows.append([LEGEND[mask], str(task), *values])
    return rows


def facts(results: dict[str, Any], costs: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Bytes, parameters and time of a run in words, by name."""
    traffic, parameters = results["traffic"], results["parameters"]
    rounds = results["tasks_done"] * results["trainer"]["rounds_per_task"]
    up, down = in_bytes(traffic["up_bytes"]), in_bytes(traffic["down_bytes"])
    sent = f"{up} up, {down} down by all clients in {rounds} rounds"
    lines = [("sent", sent), ("parameters", f"{parameter_line(parameters)}, per client")]
    if costs is not None:
        speed = costs["images_per_second"]
        rate = "" if speed is None else f", {speed:,.0f} images/s in training"
        lines.append(("time", in_hours(costs["total_seconds"]) + rate))
    return lines


def print_table(trainer: "FederatedTrainer", console: "Console | None" = None) -> None:
    """Print the result table, what the run cost and where its files are: coloured on a terminal, else plain text."""
    from rich.console import Console

    console = console or Console()
    done = results(trainer)
    costs, places = None, []
    if trainer.run_dir is not None:
        path = trainer.run_dir / "costs.json"
        costs = json.loads(path.read_bytes()) if path.is_file() else None
        places = [
            ("results", str(trainer.run_dir / "results.json")),
            ("TensorBoard", f"tensorboard --logdir {trainer.run_dir / 'tensorboard'}"),
            ("checkpoint", str(trainer.run_dir / "checkpoint.pt")),
        ]
    method, dataset, clients = done["method"]["name"], done["data"]["dataset"], done["data"]["num_clients"]
    title = f"{method} on {dataset}: accuracy in percent, mean over {clients} clients"
    rows = results_table(done)
    if console.is_terminal:
        _print_rich(console, title, rows)
    else:
        _print(console, "\n".join(["", title, *aligned(rows), ""]))
    for name, text in [*facts(done, costs), *places]:
        _print(console, f"{name:<12}{text}")


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a plain table: the first column to the left, numbers to the right, groups of the first apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for _, group in groupby(rows, key=lambda row: row[0]):
        lines.append("  ".join("-" * width for width in widths))
        for row in group:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells))
    return lines[1:]


def _print(console: "Console", text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_rich(console: "Console", title: str, rows: list[list[str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", style="bold" if name == "average" else None)
    for _, group in groupby(rows[1:], key=lambda row: row[0]):
        for row in group:
            table.add_row(*row)
        table.add_section()
    console.print(table)
