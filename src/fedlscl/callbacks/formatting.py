"""Quantities and tables as text."""

import json
import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fedlscl.callbacks.results import describe_foundation, parameter_counts, results
from fedlscl.federated.engine import fast_bf16
from fedlscl.federated.metrics import MASKS, average_after
from fedlscl.federated.state import RunState

if TYPE_CHECKING:
    from rich.console import Console

MASK_NAMES = {"task_il": "task-IL", "class_il": "class-IL"}
"""In tables."""
MASK_TITLES = {"class_il": "class-incremental", "task_il": "task-incremental"}
"""In titles and sentences."""
READOUT_LEGEND = "own: the method's head; others: the same closed-form classifier for every method, on its features."
LEGEND = "class-incremental: all classes seen so far compete; task-incremental: only the classes of the image's task."
COLUMNS = {
    "current": "current",
    "average": "average",
    "average_before_aggregation": "before agg.",
    "forgetting": "forgetting",
    "worst_client": "worst client",
}
"""Titles of the result table by the summary's names."""


def introduction(run: RunState) -> list[str]:
    """Description of a run whose clients exist, in a few lines."""
    data, foundation = run.data, describe_foundation(run)
    sizes = sorted({len(classes) for client in data["classes"] for classes in client})
    classes = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    tasks, rounds = run.num_tasks, run.rounds_per_task
    train, test = (sum(map(sum, data[name])) for name in ("train_samples", "test_samples"))
    lines = [
        f"{type(run.method).__name__} on {data['dataset']}: {len(run.clients)} clients, {tasks} tasks of "
        f"{classes} classes per client, {rounds} round{'s' * (rounds > 1)} per task",
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
    note = " (slow: this processor has no bf16 instructions; use 32-true or auto)" if slow else ""
    lines.append(f"  device      {run.device}, precision {run.precision}{note}, seed {run.seed}")
    if run.run_dir is not None:
        lines.append(f"  run         {run.run_dir}")
    if run.step:
        where = "after the last task" if run.progress.task >= tasks else f"from {position(run)}"
        lines.append(f"  resuming    {where}")
    return lines


def in_all(up: float, down: float, seconds: float) -> str:
    """The estimate for a whole run.

    Example:
        >>> in_all(58.4e6, 47.4e6, 76)
        '  estimate    58.4 MB up, 47.4 MB down, 0:01:16 for the whole run'
    """
    return f"  estimate    {in_bytes(up)} up, {in_bytes(down)} down, {in_hours(seconds)} for the whole run"


def accuracies(figures: dict[str, float]) -> str:
    """The summary after a task in one line."""
    names = {"average": "average", "current": "current task", "forgetting": "forgetting"}
    parts = [f"{words} {percent(figures[f'class_il/{name}'])} %" for name, words in names.items()]
    return f"class-IL {', '.join(parts)}; task-IL average {percent(figures['task_il/average'])} %"


def position(run: RunState) -> str:
    """Task and round, counted from 1."""
    task, round_ = run.progress.position
    return f"task {task + 1}/{run.num_tasks}, round {round_ + 1}/{run.rounds_per_task}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent; a dash for None.

    Example:
        >>> percent(0.12345), percent(-0.0001), percent(None)
        ('12.3', '0.0', '-')
    """
    return "-" if value is None else f"{100 * value:z.{digits}f}"


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
    """Trainable and total parameters; a range if clients differ."""
    trainable, total = (
        " to ".join(f"{count:,}" for count in dict.fromkeys((min(counts), max(counts))))
        for counts in (parameters["trainable"], parameters["total"])
    )
    shared = f" ({parameters['foundation']:,} in the shared frozen ViT)" if parameters["foundation"] else ""
    return f"{trainable} trainable of {total}{shared}"


def print_table(run: RunState, console: "Console | None" = None) -> None:
    """Print the result table, the costs of the run and the paths of its files."""
    from rich.console import Console

    console = console or Console()
    done = results(run)
    traffic, rounds = done["traffic"], done["tasks_done"] * run.rounds_per_task
    up, down = in_bytes(traffic["up_bytes"]), in_bytes(traffic["down_bytes"])
    facts = {
        "sent": f"{up} up, {down} down by all clients in {rounds} rounds",
        **({"readouts": f"{in_bytes(traffic['readout_up_bytes'])} of sums up"} if run.readouts.names else {}),
        "parameters": f"{parameter_line(done['parameters'])}, per client",
    }
    if run.run_dir is not None:
        path = run.run_dir / "costs.json"
        if path.is_file():
            costs = json.loads(path.read_bytes())
            speed = costs["images_per_second"]
            rate = "" if speed is None else f", {speed:,.0f} images/s in training"
            facts["time"] = in_hours(costs["total_seconds"]) + rate
        facts["results"] = str(run.run_dir / "results.json")
        facts["TensorBoard"] = f"tensorboard --logdir {run.run_dir / 'tensorboard'}"
        facts["checkpoint"] = str(run.run_dir / "checkpoint.pt")
    method, dataset, clients = done["method"]["name"], done["data"]["dataset"], done["data"]["num_clients"]
    title = f"{method} on {dataset}: accuracy in percent, mean over {clients} clients"
    lines = [*aligned(results_table(done)), "", LEGEND, ""]
    if "readouts" in done:
        lines += [*aligned(readout_table(done)), "", READOUT_LEGEND, ""]
    lines += [f"{name:<12}{text}" for name, text in facts.items()]
    console.print()
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def results_table(results: dict[str, Any]) -> list[list[str]]:
    """Rows of text, the header first: for each mask and task the summary in percent; tasks count from 1.

    Args:
        results: contents of results.json.
    """
    rows = [["", "task", *COLUMNS.values()]]
    for mask in MASKS:
        for task, figures in enumerate(results["summary"], start=1):
            rows.append([MASK_NAMES[mask], str(task), *(percent(figures[f"{mask}/{name}"]) for name in COLUMNS)])
    return rows


def readout_table(results: dict[str, Any]) -> list[list[str]]:
    """Rows of text, the header first: average accuracies of the own head and of each readout, by task."""
    names = list(results["readouts"])
    rows = [["average", "task", "own", *names]]
    for mask in MASKS:
        for task, figures in enumerate(results["summary"]):
            found = [average_after(results["readouts"][name][mask], task) for name in names]
            rows.append([MASK_NAMES[mask], str(task + 1), *map(percent, [figures[f"{mask}/average"], *found])])
    return rows


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a plain table: the first column left-aligned, numbers right-aligned, a rule between groups of it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for _, group in groupby(rows, key=lambda row: row[0]):
        lines.append("  ".join("-" * width for width in widths))
        for row in group:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells))
    return lines[1:]
