"""The comparison as Markdown, CSV and LaTeX, and every run's figures after every task."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fedlscl.federated.metrics import MASKS
from fedlscl.report.groups import Group, Spread
from fedlscl.report.table import markdown


class Column(NamedTuple):
    """A figure after the last task."""

    figure: str
    title: str
    scale: float
    digits: int


COLUMNS = (
    Column("seen/average", "seen %", 100, 1),
    Column("seen/worst_client", "worst client %", 100, 1),
    Column("seen/forgetting", "forgetting %", 100, 1),
    Column("task/average", "task %", 100, 1),
    Column("task/current", "current task %", 100, 1),
    Column("up_bytes", "up MB", 1e-6, 2),
    Column("down_bytes", "down MB", 1e-6, 2),
    Column("total_seconds", "seconds", 1, 0),
)
"""Accuracies are means over clients; bytes are those of all clients in all rounds."""
UNKNOWN = "–"
PER_TASK = ("average", "worst_client", "current", "forgetting", "backward_transfer", "average_before_aggregation")
TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
TEX |= {"\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}"}


def table_markdown(groups: Sequence[Group]) -> str:
    """One row per group; mean ± standard deviation over n seeds."""
    names = [group.name.replace("\\", "\\\\").replace("|", "\\|") for group in groups]
    rows = [[name, *cells(group)] for name, group in zip(names, groups, strict=True)]
    return markdown([["run", "n", *(column.title for column in COLUMNS)], *rows]) + "\n"


def table_rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """The same unrounded, accuracies as fractions, for CSV; a deviation is empty where there is one seed."""
    for group in groups:
        row: dict[str, Any] = {"run": group.name, "method": group.runs[0].results["method"]["name"]}
        row |= {"n": len(group.runs), "seeds": " ".join(map(str, group.seeds)), "tasks": group.tasks}
        for figure in (*(column.figure for column in COLUMNS), "images"):
            found = group.final(figure)
            row[f"{figure} mean"], row[f"{figure} std"] = (None, None) if found is None else found
        yield row


def table_latex(groups: Sequence[Group]) -> str:
    """The same for a paper; needs the package booktabs."""
    header = ["run", "n", *(column.title for column in COLUMNS)]
    lines = [
        "% Accuracies in percent, mean over clients; mean $\\pm$ sample standard deviation over n seeds.",
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        "\\toprule",
        " & ".join(map(tex, header)) + " \\\\",
        "\\midrule",
        *(" & ".join([tex(group.name), *(_tex_cell(cell) for cell in cells(group))]) + " \\\\" for group in groups),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def cells(group: Group) -> list[str]:
    """Number of seeds, and the figures as text."""
    return [str(len(group.runs)), *(cell(column, group.final(column.figure)) for column in COLUMNS)]


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
    """Every run after every task under both masks; tasks count from 0, accuracies are fractions, bytes add up."""
    for group in groups:
        for run in group.runs:
            sent = 0
            for task, figures in enumerate(run.results["summary"]):
                sent += sum(sum(client[task]) for client in run.results["traffic"]["up"])
                for mask in MASKS:
                    place = {"run": group.name, "seed": run.seed, "mask": mask, "after_task": task}
                    yield place | {name: figures[f"{mask}/{name}"] for name in PER_TASK} | {"up_bytes_so_far": sent}


def tex(text: str) -> str:
    r"""Text that LaTeX prints as it stands.

    Example:
        >>> print(tex("FedAvg_50%"))
        FedAvg\_50\%
    """
    return "".join(TEX.get(character, character) for character in text)


def _tex_cell(text: str) -> str:
    if text == UNKNOWN:
        return "--"
    return f"${text.replace('±', chr(92) + 'pm')}$"
