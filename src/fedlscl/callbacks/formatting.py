"""Quantities and tables as text."""

import json
from itertools import groupby, product
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
    data, foundation, augment = run.data, describe_foundation(run), run.clients[0].data.augment
    sizes = [len(classes) for client in data["classes"] for classes in client]
    classes = " to ".join(map(str, dict.fromkeys((min(sizes), max(sizes)))))
    tasks, rounds = run.num_tasks, run.rounds_per_task
    train, test = (sum(map(sum, data[name])) for name in ("train_samples", "test_samples"))
    facts = {
        "images": f"{train:,} for training, {test:,} for testing, of all clients",
        "parameters": f"{parameter_line(parameter_counts(run))}, per client",
    }
    if foundation is not None:
        mean, std = (" ".join(f"{value:g}" for value in foundation[name]) for name in ("mean", "std"))
        facts["foundation"] = f"{foundation['name']}, weights {foundation['fingerprint'][:12]}, mean {mean}, std {std}"
    if augment != "none":
        facts["augment"] = augment if foundation is None else f"{augment}: no cached ViT tokens in training"
    slow = run.precision == "bf16-mixed" and run.device.type == "cpu" and not fast_bf16()
    note = " (slow: this processor has no bf16 instructions; use 32-true or auto)" if slow else ""
    facts["device"] = f"{run.device}, precision {run.precision}{note}, seed {run.seed}"
    if run.run_dir is not None:
        facts["run"] = str(run.run_dir)
    if run.step:
        facts["resuming"] = "after the last task" if run.progress.task >= tasks else f"from {position(run)}"
    title = f"{type(run.method).__name__} on {data['dataset']}: {len(run.clients)} clients, {tasks} tasks of {classes} "
    title += f"classes per client, {rounds} round{'s' * (rounds > 1)} per task"
    return [title, *(f"  {name:<12}{text}" for name, text in facts.items())]


def in_all(up: float, down: float, seconds: float) -> str:
    """The estimate for a whole run.

    Example:
        >>> in_all(58.4e6, 47.4e6, 76)
        '  estimate    58.4 MB up, 47.4 MB down, 0:01:16 for the whole run'
    """
    return f"  estimate    {in_bytes(up)} up, {in_bytes(down)} down, {in_hours(seconds)} for the whole run"


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
        >>> in_bytes(999), in_bytes(171356), in_bytes(1e9)
        ('999 B', '171.4 kB', '1.0 GB')
    """
    power = sum(count >= 1000**power for power in range(1, 5))
    return f"{count / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


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

    console, done = console or Console(), results(run)
    traffic, data, rounds = done["traffic"], done["data"], done["tasks_done"] * run.rounds_per_task
    up, down = in_bytes(traffic["up_bytes"]), in_bytes(traffic["down_bytes"])
    lines = [*aligned(results_table(done)), "", LEGEND, ""]
    facts = {"sent": f"{up} up, {down} down by all clients in {rounds} rounds"}
    if run.readouts.names:
        lines += [*aligned(readout_table(done)), "", READOUT_LEGEND, ""]
        facts["readouts"] = f"{in_bytes(traffic['readout_up_bytes'])} of sums up"
    facts["parameters"] = f"{parameter_line(done['parameters'])}, per client"
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
    lines += [f"{name:<12}{text}" for name, text in facts.items()]
    title = f"{done['method']['name']} on {data['dataset']}: accuracy in percent, mean over {run.num_clients} clients"
    console.print()
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def results_table(results: dict[str, Any]) -> list[list[str]]:
    """Rows of text from results.json, the header first: for each mask and task the summary in percent."""
    return [["", "task", *COLUMNS.values()]] + [
        [MASK_NAMES[mask], str(task), *(percent(figures[f"{mask}/{name}"]) for name in COLUMNS)]
        for mask, (task, figures) in product(MASKS, enumerate(results["summary"], start=1))
    ]


def readout_table(results: dict[str, Any]) -> list[list[str]]:
    """Rows of text, the header first: average accuracies of the own head and of each readout, by task."""
    rows = [["average", "task", "own", *results["readouts"]]]
    for mask, (task, figures) in product(MASKS, enumerate(results["summary"])):
        found = [average_after(matrices[mask], task) for matrices in results["readouts"].values()]
        rows.append([MASK_NAMES[mask], str(task + 1), *map(percent, [figures[f"{mask}/average"], *found])])
    return rows


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a plain table: the first column left-aligned, numbers right-aligned, a rule between groups of it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines: list[str] = []
    for _, group in groupby(rows, key=lambda row: row[0]):
        lines.append(rule)
        for first, *others in group:
            lines.append("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    return lines[1:]
