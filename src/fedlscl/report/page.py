"""The HTML page of a report."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from fedlscl.callbacks.formatting import MASK_TITLES, in_bytes, in_hours, parameter_line, percent
from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.metrics import to_csv
from fedlscl.report.groups import Group, grouped, inequalities
from fedlscl.report.plots import Picture, against_cost, clients, for_page, looks, matrices, over_tasks
from fedlscl.report.runs import CONFIG, COSTS, MATRIX, RESULTS, Run, left_out, read_runs
from fedlscl.report.table import COLUMNS, cell, per_task_rows, table_latex, table_markdown, table_rows
from fedlscl.report.table import sections as in_sections

# The report as one page that needs nothing but itself.

TEMPLATE = Path(__file__).with_name("page.html.jinja")
BESIDE = (CONFIG, COSTS, MATRIX, "rounds.csv", "manifest.json")


class Section(NamedTuple):
    """Figures under one heading."""

    title: str
    text: str
    pictures: list[Picture]


class Source(NamedTuple):
    """Where the numbers of a run come from."""

    name: str
    seed: int
    facts: list[tuple[str, str]]
    links: list[tuple[str, str]]
    config: str | None


def page(
    groups: Sequence[Group], sections: Sequence[Section], files: Sequence[str], out: Path, unshown: Sequence[str] = ()
) -> str:
    """HTML with all figures inside; only links lead to other files, by paths relative to ``out``.

    ``unshown`` are sentences about runs that were left out.
    """
    # Takes a tenth of a second, which only a report has to spend.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        title=_title(groups),
        findings=_findings(groups),
        unshown=unshown,
        inequalities=inequalities(groups),
        columns=COLUMNS,
        tables=[(title, [_row(group) for group in found]) for title, found in in_sections(groups)],
        colours={name: look.colour for name, look in looks(groups).items()},
        has_spread=any(len(group.runs) > 1 for group in groups),
        has_single=any(len(group.runs) == 1 for group in groups),
        sections=sections,
        for_page=for_page,
        files=files,
        sources=[_source(group, run, out) for group in groups for run in group.runs],
    )


def _title(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    settings = f" in {len(groups)} setting{'s' * (len(groups) > 1)}" if len(runs) > len(groups) else ""
    return f"{count}{settings} on {', '.join(dict.fromkeys(run.results['data']['dataset'] for run in runs))}"


def _findings(groups: Sequence[Group]) -> list[str]:
    """For each set of comparable groups and each mask what `_finding` says; unfinished groups are in none."""
    finished = [group for group in groups if group.is_finished]
    if not finished:
        return ["No run is finished: nothing is ranked."]
    return [
        f"{name}. ".capitalize() * bool(name) + _finding([g for g in finished if g.heading == name], mask)
        for name in dict.fromkeys(group.heading for group in finished)
        for mask in MASK_TITLES
    ]


def _finding(groups: Sequence[Group], mask: str) -> str:
    """Who is first under a mask, by how much, at what cost, and what that is worth; and what oracles reach."""
    ordered = sorted(groups, key=lambda group: -group.known(f"{mask}/average").mean)
    oracles = [group for group in ordered if group.is_oracle]
    ranked = [group for group in ordered if group.is_ranked]
    if not ranked or not oracles:
        return _lead(ordered, mask)
    best = oracles[0].known(f"{mask}/average").mean
    return f"{_lead(ranked, mask)} With all data in one place {oracles[0].name} has {percent(best)} %."


def _lead(ranked: Sequence[Group], mask: str) -> str:
    first, *others = ranked
    best = first.known(f"{mask}/average")
    sentence = f"{MASK_TITLES[mask].capitalize()}: {first.name} reaches {percent(best.mean)} %"
    if not others:
        return f"{sentence}."
    second = others[0].known(f"{mask}/average")
    ahead = best.mean - second.mean
    sent, less = (in_bytes(group.known("up_bytes").mean) for group in (first, others[0]))
    sentence += f", {100 * ahead:.2f} points above {others[0].name}, with {sent} uploaded against {less}."
    if best.deviation is None or second.deviation is None:
        return f"{sentence} With one seed there is no telling what another would give."
    larger = max(best.deviation, second.deviation)
    compared = "larger" if ahead > larger else "not larger"
    return f"{sentence} The lead is {compared} than the standard deviation over seeds ({100 * larger:.2f})."


def _row(group: Group) -> dict[str, Any]:
    found = [(column, group.final(column.figure)) for column in COLUMNS]
    cells = [(cell(column, value), "" if value is None else repr(value.mean)) for column, value in found]
    return {"name": group.name, "seeds": group.seeds, "cells": cells}


def _source(group: Group, run: Run, out: Path) -> Source:
    results, costs = run.results, run.costs or {}
    data, foundation = results["data"], results["foundation"]
    trainer = results["trainer"]
    split = f"{data['num_clients']} clients, {run.tasks} of {run.planned} tasks finished"
    rounds = f"{trainer['rounds_per_task']} rounds per task, server every {trainer['server_every']}"
    sessions = [f"{session['started']} to {session['ended']}" for session in costs.get("sessions", [])]
    facts = {
        "method": results["method"]["name"],
        "seed": str(run.seed),
        "data": f"{data['dataset']}, SHA-256 {data['fingerprint']}",
        "split": split,
        "frozen ViT": foundation and f"{foundation['name']}, weights SHA-256 {foundation['fingerprint']}",
        "parameters": "parameters" in results and f"{parameter_line(results['parameters'])}, per client",
        "left out": _left_out(results.get("quarantined", [])),
        "training": f"{rounds}, precision {trainer['precision']}",
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "commit": ", ".join(run.commits) or "not recorded",
        "device": ", ".join(run.devices) or "not recorded",
        "time": "total_seconds" in costs and f"{in_hours(costs['total_seconds'])} ({'; '.join(sessions)})",
    }
    folder = run.path.parent
    paths = [run.path, *(folder / name for name in BESIDE if (folder / name).is_file())]
    links = [(RESULTS if path is run.path else path.name, _relative(path, out)) for path in paths]
    return Source(group.name, run.seed, [(k, v) for k, v in facts.items() if v], links, run.config)


def _left_out(rejected: list[dict[str, Any]]) -> str:
    """The first uploads that were refused at the door, and how many there were."""
    places = [(r["client"], f"task {r['task'] + 1}, round {r['round'] + 1}", r["reason"]) for r in rejected[:5]]
    shown = [f"client {client} in {place}: {reason}" for client, place, reason in places]
    more = f"; and {len(rejected) - 5} more" if len(rejected) > 5 else ""
    return "; ".join(shown) + more


def _relative(path: Path, out: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), out.resolve())).as_posix())


# ``fedlscl report RUN [RUN ...] --out DIR``: everything about some runs in one folder.

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
    masks = list(MASK_TITLES)
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
