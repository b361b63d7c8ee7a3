"""The report as one page that needs nothing but itself."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from fedlscl.federated.wording import in_bytes, in_hours, parameter_line, percent
from fedlscl.report.conditions import inequalities
from fedlscl.report.finding import RESULTS
from fedlscl.report.groups import Group
from fedlscl.report.numbers import COLUMNS, cell
from fedlscl.report.numbers import sections as in_sections
from fedlscl.report.runs import CONFIG, COSTS, MATRIX, Run
from fedlscl.report.style import AMONG, Picture, for_page, looks

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
        for mask in AMONG
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
    sentence = f"{AMONG[mask].capitalize()}, {first.name} reaches {percent(best.mean)} %"
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


def _left_out(refusals: list[dict[str, Any]]) -> str:
    """The first uploads that were refused at the door, and how many there were."""
    places = [(r["client"], f"task {r['task'] + 1}, round {r['round'] + 1}", r["reason"]) for r in refusals[:5]]
    shown = [f"client {client} in {place}: {reason}" for client, place, reason in places]
    more = f"; and {len(refusals) - 5} more" if len(refusals) > 5 else ""
    return "; ".join(shown) + more


def _relative(path: Path, out: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), out.resolve())).as_posix())
