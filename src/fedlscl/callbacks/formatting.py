"""Quantities and tables as text."""

import json
import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fedlscl.callbacks.results import describe_foundation, parameter_counts, results
from fedlscl.federated.engine import fast_bf16
from fedlscl.federated.metrics import MASKS

if TYPE_CHECKING:
    from rich.console import Console

    from fedlscl.federated.state import RunState


# Figures of a run in words, for the terminal.


def introduction(run: "RunState") -> list[str]:
    """What is about to be done, in a few lines."""
    data, foundation = run.data, describe_foundation(run)
    sizes = sorted({len(classes) for client in data["classes"] for classes in client})
    classes = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    tasks, rounds = run.num_tasks, run.rounds_per_task
    train, test = (sum(map(sum, data[name])) for name in ("train_samples", "test_samples"))
    lines = [
        f"{type(run.method).__name__} on {data['dataset']}: {len(run.clients)} clients, {tasks} tasks of "
        f"{classes} classes per client, {rounds} rounds per task",
        f"  images      {train:,} for training, {test:,} for testing, of all clients",
        f"  parameters  {parameter_line(parameter_counts(run))}, per client",
    ]
    if foundation is not None:
        mean, std = (" ".join(f"{value:g}" for value in foundation[name]) for name in ("mean", "std"))
        weights = foundation["fingerprint"][:12]
        lines.append(f"  foundation  {foundation['name']}, weights {weights}, mean {mean}, std {std}")
    if (augment := run.clients[0].data.augment) != "none":
        alone = "" if foundation is None else ": no cached ViT tokens in training"
        lines.append(f"  augment     {augment}{alone}")
    slow = run.precision == "bf16-mixed" and run.device.type == "cpu" and not fast_bf16()
    note = " (slow: this processor has no bf16 instructions; take 32-true or auto)" if slow else ""
    lines.append(f"  device      {run.device}, precision {run.precision}{note}, seed {run.seed}")
    if run.run_dir is not None:
        lines.append(f"  run         {run.run_dir}")
    if run.step:
        where = "after the last task" if run.progress.task >= tasks else f"from {place(run)}"
        lines.append(f"  goes on     {where}")
    return lines


def in_all(up: float, down: float, seconds: float) -> str:
    """The estimate for a whole run in one line.

    Example:
        >>> in_all(58.4e6, 47.4e6, 76)
        '  in all      about 58.4 MB up, 47.4 MB down, 0:01:16'
    """
    return f"  in all      about {in_bytes(up)} up, {in_bytes(down)} down, {in_hours(seconds)}"


def accuracies(figures: dict[str, float]) -> str:
    """The summary after a task in one line."""
    names = {"average": "average", "current": "current task", "forgetting": "forgetting"}
    parts = [f"{words} {percent(figures[f'seen/{name}'])} %" for name, words in names.items()]
    return f"{', '.join(parts)}; among the task's own classes {percent(figures['task/average'])} %"


def place(run: "RunState") -> str:
    """Where the run is, counted from 1."""
    task, round_ = run.progress.position
    return f"task {task + 1}/{run.num_tasks}, round {round_ + 1}/{run.rounds_per_task}"


def percent(value: float | None) -> str:
    """A fraction in percent; a dash where nothing was measured.

    Example:
        >>> percent(0.12345), percent(-0.0001), percent(None)
        ('12.3', '0.0', '-')
    """
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"


def in_bytes(count: float) -> str:
    """A size in decimal units.

    Example:
        >>> in_bytes(999), in_bytes(171356)
        ('999 B', '171.4 kB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1000)), 4)
    return f"{count / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def in_hours(seconds: float) -> str:
    """A duration as h:mm:ss.

    Example:
        >>> in_hours(3725.4)
        '1:02:05'
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def parameter_line(parameters: dict[str, Any]) -> str:
    """Trainable and total parameters in words; a range where clients differ."""
    trainable, total = (_range(parameters[name]) for name in ("trainable", "total"))
    shared = f" ({parameters['foundation']:,} in the shared frozen ViT)" if parameters["foundation"] else ""
    return f"{trainable} trainable of {total}{shared}"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# The result table that a run ends with.

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


def print_table(run: "RunState", console: "Console | None" = None) -> None:
    """Print the result table, what the run cost and where its files are: coloured on a terminal, else plain text."""
    from rich.console import Console

    console = console or Console()
    done = results(run)
    costs, places = None, []
    if run.run_dir is not None:
        path = run.run_dir / "costs.json"
        costs = json.loads(path.read_bytes()) if path.is_file() else None
        places = [
            ("results", str(run.run_dir / "results.json")),
            ("TensorBoard", f"tensorboard --logdir {run.run_dir / 'tensorboard'}"),
            ("checkpoint", str(run.run_dir / "checkpoint.pt")),
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
