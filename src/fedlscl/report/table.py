"""The comparison on the terminal."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlscl.report.conditions import inequalities
from fedlscl.report.groups import grouped
from fedlscl.report.numbers import cells, header, sections, table_markdown
from fedlscl.report.runs import left_out, read_runs


def print_comparison(paths: Sequence[Path]) -> None:
    """Print the table and what is not equal in its rows; Markdown where the output goes elsewhere.

    Raises:
        ValueError: if a run cannot be read.
    """
    runs = read_runs(paths)
    groups = grouped(runs)
    notes = inequalities(groups) + left_out(paths, runs)
    if not sys.stdout.isatty():
        print(table_markdown(groups, notes), end="")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    titles = header()
    table = Table(title="After the last finished task: all tasks, mean over clients, mean ± deviation over n seeds")
    for title in titles:
        table.add_column(title, justify="left" if title == "run" else "right")
    for title, found in sections(groups):
        if title:
            table.add_row(Text(title, style="italic"), *[""] * (len(titles) - 1))
        for group in found:
            table.add_row(Text(group.name), *cells(group))
        table.add_section()
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
