"""Tables over runs for the terminal, Markdown, LaTeX and CSV."""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from fedlscl.federated.metrics import MASKS
from fedlscl.report.groups import READOUTS, Group, Spread, grouped, inequalities, readouts, unconverged
from fedlscl.report.runs import PER_TASK, left_out, read_runs


class Column(NamedTuple):
    """A figure after the last task."""

    figure: str
    title: str
    scale: float
    digits: int


COLUMNS = (
    Column("class_il/average", "class-IL %", 100, 1),
    Column("class_il/worst_client", "worst client %", 100, 1),
    Column("class_il/forgetting", "forgetting %", 100, 1),
    Column("task_il/average", "task-IL %", 100, 1),
    Column("task_il/current", "current task %", 100, 1),
    Column("up_bytes", "up MB", 1e-6, 2),
    Column("down_bytes", "down MB", 1e-6, 2),
    Column("total_seconds", "seconds", 1, 0),
)
"""Accuracies are means over clients; bytes are those of all clients in all rounds."""
UNKNOWN, PM = "–", r"\pm"
TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
TEX |= {"\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}"}


def columns(groups: Sequence[Group]) -> list[Column]:
    """`COLUMNS`, with the accuracies of each readout beside those of the own heads, and the bytes of readouts."""
    found: list[Column] = []
    names = readouts(groups)
    for column in COLUMNS:
        mask, _, name = column.figure.partition("/")
        titles = {"class_il": "class-IL %", "task_il": "task-IL %"}
        found.append(column._replace(title=f"own {column.title}") if names and name == "average" else column)
        if name == "average":
            found += [Column(f"{READOUTS}{readout}/{mask}", f"{readout} {titles[mask]}", 100, 1) for readout in names]
        if names and column.figure == "up_bytes":
            found.append(Column("readout_up_bytes", "readouts up MB", 1e-6, 2))
    return found


def header(groups: Sequence[Group]) -> list[str]:
    """Titles of all columns."""
    return ["run", "n", *(column.title for column in columns(groups))]


def sections(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Groups by section, in their order; usually one section without a heading."""
    return [(title, list(found)) for title, found in groupby(groups, key=lambda group: group.section)]


def table_markdown(groups: Sequence[Group], notes: Sequence[str] = ()) -> str:
    """One row per group; mean ± standard deviation over n seeds; a row in italics begins a section with a heading."""
    shown, titles = columns(groups), header(groups)
    rows = [titles]
    for title, found in sections(groups):
        rows += [[f"*{title}*", *[""] * (len(titles) - 1)]] if title else []
        rows += [[group.name.replace("\\", "\\\\").replace("|", "\\|"), *cells(group, shown)] for group in found]
    return "\n".join([markdown(rows), *(["", *(f"- {note}" for note in notes)] if notes else [])]) + "\n"


def markdown(rows: list[list[str]], rule: str = "---:") -> str:
    """A Markdown table whose first row is the header; ``rule`` aligns all columns but the first.

    Example:
        >>> print(markdown([["run", "class-IL %"], ["FedAvg", "41.0"]]))
        | run | class-IL % |
        |---|---:|
        | FedAvg | 41.0 |
    """
    rules = ["---", *[rule] * (len(rows[0]) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join(rules) + "|", *lines[1:]])


def table_rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """The same for CSV, unrounded, accuracies as fractions; the deviation of one seed is empty."""
    shown = columns(groups)
    for group in groups:
        row: dict[str, Any] = {"run": group.name, "method": group.runs[0].results["method"]["name"]}
        row |= {"n": len(group.runs), "seeds": " ".join(map(str, group.seeds)), "tasks": group.tasks}
        row |= {"tasks of data": group.runs[0].planned, "section": group.section}
        for figure in (*(column.figure for column in shown), "images"):
            found = group.final(figure)
            row[f"{figure} mean"], row[f"{figure} std"] = (None, None) if found is None else found
        yield row


def table_latex(groups: Sequence[Group], notes: Sequence[str] = ()) -> str:
    """The same in LaTeX; needs the package booktabs."""
    rows, shown, titles = [], columns(groups), header(groups)
    for number, (title, found) in enumerate(sections(groups)):
        rows += ["\\midrule"] if number else []
        rows += [f"\\multicolumn{{{len(titles)}}}{{l}}{{\\emph{{{tex(title)}}}}} \\\\"] if title else []
        for group in found:
            texts = ["--" if text == UNKNOWN else f"${text.replace('±', PM)}$" for text in cells(group, shown)]
            rows.append(" & ".join([tex(group.name), *texts]) + " \\\\")
    lines = [
        "% Accuracies in percent, mean over clients; mean $\\pm$ sample standard deviation over n seeds.",
        *(f"% {' '.join(note.split())}" for note in notes),
        f"\\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}",
        "\\toprule",
        " & ".join(map(tex, titles)) + " \\\\",
        "\\midrule",
        *rows,
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def cells(group: Group, shown: Sequence[Column]) -> list[str]:
    """Number of seeds, and the figures as text."""
    return [str(len(group.runs)), *(cell(column, group.final(column.figure)) for column in shown)]


def cell(column: Column, found: Spread | None) -> str:
    """Mean ± deviation, the mean alone for one seed.

    Example:
        >>> cell(COLUMNS[0], Spread(0.75, 0.01)), cell(COLUMNS[0], Spread(0.75, None)), cell(COLUMNS[0], None)
        ('75.0 ± 1.0', '75.0', '–')
    """
    if found is None:
        return UNKNOWN
    # Adding zero turns -0.0 into 0.0.
    numbers = [round(column.scale * value, column.digits) + 0.0 for value in found if value is not None]
    return " ± ".join(f"{number:.{column.digits}f}" for number in numbers)


def per_task_rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Every run after every task, per mask; tasks count from 0, accuracies are fractions, bytes add up."""
    for group in groups:
        for run in group.runs:
            sent = 0
            for task, figures in enumerate(run.results["summary"]):
                sent += sum(sum(client[task]) for client in run.results["traffic"]["up"])
                for mask in MASKS:
                    row = {"run": group.name, "seed": run.seed, "mask": mask, "after_task": task}
                    yield row | {name: figures[f"{mask}/{name}"] for name in PER_TASK} | {"up_bytes_so_far": sent}


def tex(text: str) -> str:
    r"""Text escaped for LaTeX.

    Example:
        >>> print(tex("FedAvg_50%"))
        FedAvg\_50\%
    """
    return "".join(TEX.get(character, character) for character in text)


def print_comparison(paths: Sequence[Path]) -> None:
    """Print the table and the differences between its rows; Markdown if the output is not a terminal.

    Raises:
        ValueError: if a run cannot be read.
    """
    runs = read_runs(paths)
    groups = grouped(runs)
    notes = unconverged(groups) + inequalities(groups) + left_out(paths, runs)
    if not sys.stdout.isatty():
        print(table_markdown(groups, notes), end="")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="After the last finished task: all tasks, mean over clients, mean ± deviation over n seeds")
    shown, titles = columns(groups), header(groups)
    for title in titles:
        table.add_column(title, justify="left" if title == "run" else "right")
    for title, found in sections(groups):
        if title:
            table.add_row(Text(title, style="italic"), *[""] * (len(titles) - 1))
        for group in found:
            table.add_row(Text(group.name), *cells(group, shown))
        table.add_section()
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
