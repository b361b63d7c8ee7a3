"""``fedlscl report RUN [RUN ...] --out DIR``: everything about some runs in one folder."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.export import to_csv
from fedlscl.report.conditions import inequalities
from fedlscl.report.curves import against_cost, over_tasks
from fedlscl.report.groups import Group, grouped
from fedlscl.report.numbers import per_task_rows, table_latex, table_markdown, table_rows
from fedlscl.report.page import Section, page
from fedlscl.report.panels import clients, matrices
from fedlscl.report.runs import left_out, read_runs
from fedlscl.report.style import AMONG

PAGE = "index.html"


def write_report(paths: Sequence[Path], out: Path) -> list[Path]:
    """Tables, figures and the page; returns their paths, the page first. Nothing is made unless all runs can be read.

    Raises:
        ValueError: if a run cannot be read, or the folder not be written.
    """
    runs = read_runs(paths)
    groups, unshown = grouped(runs), left_out(paths, runs)
    notes = inequalities(groups) + unshown
    _check_writable(out)
    tables = {
        "table.md": table_markdown(groups, notes),
        "table.csv": to_csv(table_rows(groups)),
        "table.tex": table_latex(groups, notes),
        "per_task.csv": to_csv(per_task_rows(groups)),
    }
    sections = figures(groups)
    html = page(groups, sections, list(tables), out, unshown)
    files = {name: text.encode() for name, text in tables.items()}
    for picture in (picture for section in sections for picture in section.pictures):
        files |= {f"{picture.name}.svg": picture.svg, f"{picture.name}.png": picture.png}
    # The page comes last: what it links to is there before it.
    for name, content in (files | {PAGE: html.encode()}).items():
        write_atomically(out / name, content)
    return [out / name for name in (PAGE, *files)]


def figures(groups: Sequence[Group]) -> list[Section]:
    """All figures in the page's order; those of costs only where costs are known."""
    masks = list(AMONG)
    costs = {name: [against_cost(groups, name, mask) for mask in masks] for name in ("up_bytes", "total_seconds")}
    sections = [
        Section(
            "Accuracy after each task",
            "Mean over clients and over all tasks so far. Bands are one standard deviation over seeds. "
            "The axes do not begin at zero.",
            [over_tasks(groups, "average", mask) for mask in masks],
        ),
        Section(
            "Forgetting",
            "Best earlier accuracy minus the present one, mean over earlier tasks and clients. Below zero, earlier "
            "tasks gained.",
            [over_tasks(groups, "forgetting", mask) for mask in masks],
        ),
        Section(
            "Clients",
            "Final accuracy of every client, mean over tasks. Over several seeds bars are means of equal ranks, since "
            "client 0 of another seed has other classes; a dot is a seed.",
            [clients(groups, mask) for mask in masks],
        ),
        Section(
            "Accuracy against uploaded bytes",
            "Bytes of all clients in all rounds, on a logarithmic axis. A method that uploads nothing has no place on "
            "it: its accuracy is a dashed line.",
            [picture for picture in costs["up_bytes"] if picture is not None],
        ),
        Section(
            "Accuracy against seconds",
            "Seconds of the whole run on its device, evaluation included, on a logarithmic axis. Compare only what ran "
            "on the same device with the same number of epochs.",
            [picture for picture in costs["total_seconds"] if picture is not None],
        ),
        Section(
            "Accuracy matrices",
            "Row: after learning that task. Column: accuracy on that task. Mean over clients and seeds.",
            [matrices(groups, mask) for mask in masks],
        ),
    ]
    return [section for section in sections if section.pictures]


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {str(out)!r} cannot be written ({error.strerror}): choose another folder.") from error
