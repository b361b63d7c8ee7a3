"""Tables over runs for the terminal, Markdown, LaTeX and CSV."""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from fedlscl.federated.metrics import MASKS
from fedlscl.report.groups import NOT_CONVERGED, READOUTS, Group, grouped, inequalities, readouts
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
UNKNOWN = "–"
TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
TEX |= {"\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}", "†": r"$^\dagger$"}


class Table(NamedTuple):
    """What every format shows."""

    columns: list[Column]
    header: list[str]
    bodies: list[tuple[str, list[tuple[Group, list[str]]]]]
    """Rows under one heading, usually the only one and empty: each group, and its figures as text."""
    footnotes: list[str]


def table(groups: Sequence[Group]) -> Table:
    """One row per group in the order of ``groups``: number of seeds, and mean ± standard deviation of each figure.

    Accuracies of each readout stand beside those of the own heads, and their bytes beside the method's.
    """
    names, shown = readouts(groups), []
    for column in COLUMNS:
        mask, _, name = column.figure.partition("/")
        has_readouts = bool(names) and name == "average"
        shown.append(column._replace(title=f"own {column.title}") if has_readouts else column)
        if has_readouts:
            shown += [Column(f"{READOUTS}{n}/{mask}", f"{n} {column.title}", 100, 1) for n in names]
        if names and column.figure == "up_bytes":
            shown.append(Column("readout_up_bytes", "readouts up MB", 1e-6, 2))
    bodies = [
        (title, [(group, cells(group, shown)) for group in found])
        for title, found in groupby(groups, key=lambda group: group.section)
    ]
    footnotes = [NOT_CONVERGED] if any(group.mark for group in groups) else []
    return Table(shown, ["run", "n", *(column.title for column in shown)], bodies, footnotes)


def table_markdown(groups: Sequence[Group], notes: Sequence[str] = ()) -> str:
    """The table in Markdown; a row in italics begins a section with a heading."""
    made = table(groups)
    rows = [made.header]
    for title, body in made.bodies:
        rows += [[f"*{title}*", *[""] * (len(made.header) - 1)]] if title else []
        rows += [[f"{group.name}{group.mark}".replace("\\", "\\\\").replace("|", "\\|"), *c] for group, c in body]
    below = [*made.footnotes, *(f"- {note}" for note in notes)]
    return "\n".join([markdown(rows), *([""] if below else []), *below]) + "\n"


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
    figures = [*(column.figure for column in table(groups).columns), "images"]
    for group in groups:
        row: dict[str, Any] = {"run": group.name, "method": group.runs[0].results["method"]["name"]}
        row |= {"n": len(group.runs), "seeds": " ".join(map(str, group.seeds)), "tasks": group.tasks}
        row |= {"tasks of data": group.runs[0].planned, "section": group.section, "converged": group.is_converged}
        for figure in figures:
            row[f"{figure} mean"], row[f"{figure} std"] = group.final(figure) or (None, None)
        yield row


def table_latex(groups: Sequence[Group], notes: Sequence[str] = ()) -> str:
    """The same in LaTeX; needs the package booktabs."""
    made, rows = table(groups), []
    width = len(made.header)
    for title, body in made.bodies:
        rows.append(r"\midrule")
        rows += [rf"\multicolumn{{{width}}}{{l}}{{\emph{{{tex(title)}}}}} \\"] if title else []
        for group, found in body:
            texts = ["--" if text == UNKNOWN else f"${text}$".replace("±", r"\pm") for text in found]
            rows.append(" & ".join([tex(group.name + group.mark), *texts]) + r" \\")
    lines = [
        r"% Accuracies in percent, mean over clients; mean $\pm$ sample standard deviation over n seeds.",
        *(f"% {' '.join(note.split())}" for note in notes),
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
        " & ".join(map(tex, made.header)) + r" \\",
        *rows,
        r"\bottomrule",
        *(rf"\multicolumn{{{width}}}{{p{{0.9\linewidth}}}}{{{tex(note)}}} \\" for note in made.footnotes),
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def cells(group: Group, shown: Sequence[Column] = COLUMNS) -> list[str]:
    """Number of seeds, and of each figure mean ± deviation, the mean alone for one seed, a dash if a run lacks it."""
    texts = [str(len(group.runs))]
    for column in shown:
        numbers = [column.scale * value for value in group.final(column.figure) or () if value is not None]
        texts.append(" ± ".join(f"{number:z.{column.digits}f}" for number in numbers) or UNKNOWN)
    return texts


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
    """Print the table and the differences between its rows; Markdown if the output is not a terminal."""
    runs = read_runs(paths)
    groups = grouped(runs)
    notes = inequalities(groups) + left_out(paths, runs)
    if not sys.stdout.isatty():
        print(table_markdown(groups, notes), end="")
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    made = table(groups)
    shown = RichTable(title="After the last finished task: all tasks, mean over clients, mean ± deviation over n seeds")
    for title in made.header:
        shown.add_column(title, justify="left" if title == "run" else "right")
    for title, body in made.bodies:
        if title:
            shown.add_row(Text(title, style="italic"))
        for group, found in body:
            shown.add_row(Text(group.name + group.mark), *found)
        shown.add_section()
    console = Console()
    console.print(shown)
    for note in made.footnotes + notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
