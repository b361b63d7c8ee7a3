"""``fedlscl report RUN [RUN ...] --out DIR``: tables, figures, and an HTML page that loads no other file."""

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from fedlscl.callbacks.formatting import MASK_TITLES, in_bytes, in_hours, parameter_line, percent
from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.metrics import to_csv
from fedlscl.report.groups import Group, classifier, grouped, inequalities, readouts
from fedlscl.report.plots import Picture, against_cost, clients, for_page, looks, matrices, over_tasks
from fedlscl.report.runs import CONFIG, COSTS, MATRIX, RESULTS, ROUNDS, Run, left_out, read_runs
from fedlscl.report.table import per_task_rows, table, table_latex, table_markdown, table_rows

PAGE = "index.html"
TEMPLATE = Path(__file__).with_name("page.html.jinja")
BESIDE = (CONFIG, COSTS, MATRIX, ROUNDS, "manifest.json")
"""Files of a run that the page links to."""


class Section(NamedTuple):
    """Figures under one heading."""

    title: str
    text: str
    pictures: list[Picture]


def write_report(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write tables, figures and the page if all runs can be read; returns their paths, the page first."""
    runs = read_runs(paths)
    groups, unshown = grouped(runs), left_out(paths, runs)
    notes = inequalities(groups) + unshown
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {str(out)!r} cannot be written ({error.strerror}): choose another folder.") from error
    files = {
        "table.md": table_markdown(groups, notes).encode(),
        "table.csv": to_csv(table_rows(groups)).encode(),
        "table.tex": table_latex(groups, notes).encode(),
        "per_task.csv": to_csv(per_task_rows(groups)).encode(),
    }
    sections = figures(groups)
    html = page(groups, sections, list(files), out, unshown)
    for picture in (picture for section in sections for picture in section.pictures):
        files |= {f"{picture.name}.svg": picture.svg, f"{picture.name}.png": picture.png}
    # The page comes last, after the files that it links to.
    for name, content in (files | {PAGE: html.encode()}).items():
        write_atomically(out / name, content)
    return [out / name for name in (PAGE, *files)]


def figures(groups: Sequence[Group]) -> list[Section]:
    """All figures in the page's order; those of costs only if costs are known."""
    drawn: dict[str, tuple[Callable[..., Picture | None], str]] = {
        "Accuracy after each task": (
            partial(over_tasks, course="average"),
            "Mean over clients and over all tasks so far. Bands are one standard deviation over seeds. "
            "The axes do not begin at zero.",
        ),
        "Forgetting": (
            partial(over_tasks, course="forgetting"),
            "Best earlier accuracy minus the current one, mean over earlier tasks and clients. Below zero, earlier "
            "tasks gained.",
        ),
        "Clients": (
            clients,
            "Final accuracy of every client, mean over tasks. Over several seeds bars are means of equal ranks, since "
            "client 0 of another seed has other classes; a dot is a seed.",
        ),
        "Accuracy against uploaded bytes": (
            partial(against_cost, cost="up_bytes"),
            "Bytes of all clients in all rounds, on a logarithmic axis. The accuracy of a method that uploads nothing "
            "is a dashed line.",
        ),
        **{
            f"Accuracy of {name} against uploaded bytes": (
                partial(against_cost, cost="up_bytes", readout=name),
                "Hollow: the own head, at the bytes of the method. Filled: the same classifier on the features "
                "of every method that has them, with the bytes of all readouts of the run on top.",
            )
            for name in readouts(groups)
        },
        "Accuracy against seconds": (
            partial(against_cost, cost="total_seconds"),
            "Seconds of the whole run on its device, evaluation included, on a logarithmic axis. Compare only runs "
            "on the same device with the same number of epochs.",
        ),
        "Accuracy matrices": (
            matrices,
            "Row: after learning that task. Column: accuracy on that task. Mean over clients and seeds.",
        ),
    }
    sections = [
        Section(title, text, [p for mask in MASK_TITLES if (p := draw(groups, mask=mask))])
        for title, (draw, text) in drawn.items()
    ]
    return [section for section in sections if section.pictures]


def page(
    groups: Sequence[Group], sections: Sequence[Section], files: Sequence[str], out: Path, unshown: Sequence[str] = ()
) -> str:
    """HTML with all figures inside; links to other files are relative to ``out``.

    ``unshown`` are sentences about runs that were left out.
    """
    # Imported here because it takes a tenth of a second.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        title=_title(groups),
        findings=_findings(groups),
        unshown=unshown,
        inequalities=inequalities(groups),
        table=table(groups),
        has_readouts=bool(readouts(groups)),
        colours={name: colour for name, (colour, *_) in looks(groups).items()},
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
    """`_finding` for each set of comparable finished groups and each mask."""
    finished = [group for group in groups if group.is_finished]
    sets = {heading: list(found) for heading, found in groupby(finished, key=lambda group: group.heading)}
    sentences = [
        f"{heading}. ".capitalize() * bool(heading) + _finding(found, mask)
        for heading, found in sets.items()
        for mask in MASK_TITLES
    ]
    return sentences or ["No run is finished: nothing is ranked."]


def _finding(groups: Sequence[Group], mask: str) -> str:
    """The best group under a mask, how it differs from the second, and the best centralised one."""
    figure = f"{mask}/average"
    ordered = sorted(groups, key=lambda group: -group.known(figure).mean)
    ranked = [group for group in ordered if not group.is_centralised] or ordered
    first, best = ranked[0], ranked[0].known(figure)
    text = f"{MASK_TITLES[mask].capitalize()}: {first.name} reaches {percent(best.mean)} %"
    if len(ranked) == 1:
        text += "."
    else:
        second, next_best = ranked[1], ranked[1].known(figure)
        lead = best.mean - next_best.mean
        sent, other = (in_bytes(group.known("up_bytes").mean) for group in (first, second))
        text += f", {100 * lead:.2f} points above {second.name}, with {sent} uploaded against {other}."
        if best.deviation is None or next_best.deviation is None:
            text += " Each has one seed: the difference may be chance."
        else:
            larger = max(best.deviation, next_best.deviation)
            compared = "larger" if lead > larger else "not larger"
            text += f" The difference is {compared} than the standard deviation over seeds ({100 * larger:.2f})."
        heads = [classifier(group.runs[0]) for group in (first, second)]
        if heads[0] != heads[1]:
            text += f" They do not have the same classifier: {first.name} has {heads[0]}, {second.name} {heads[1]}."
    if len(ranked) < len(ordered):
        pooled = next(group for group in ordered if group.is_centralised)
        reached = percent(pooled.known(figure).mean)
        text += f" Trained on the pooled data of all clients, {pooled.name} has {reached} %."
    return text


def _source(group: Group, run: Run, out: Path) -> dict[str, Any]:
    """Origin of a run's numbers."""
    results, costs, folder = run.results, run.costs, run.path.parent
    data, foundation, trainer = (results[name] for name in ("data", "foundation", "trainer"))
    rejected = [
        f"client {upload['client']} in task {upload['task'] + 1}, round {upload['round'] + 1}: {upload['reason']}"
        for upload in results.get("quarantined", [])
    ]
    if len(rejected) > 5:
        rejected[5:] = [f"and {len(rejected) - 5} more"]
    sessions = "; ".join(f"{session['started']} to {session['ended']}" for session in costs.get("sessions", []))
    facts = {
        "method": results["method"]["name"],
        "seed": str(run.seed),
        "data": f"{data['dataset']}, SHA-256 {data['fingerprint']}",
        "split": f"{data['num_clients']} clients, {run.tasks} of {run.planned} tasks finished",
        "frozen ViT": foundation and f"{foundation['name']}, weights SHA-256 {foundation['fingerprint']}",
        "parameters": "parameters" in results and f"{parameter_line(results['parameters'])}, per client",
        "rejected": "; ".join(rejected),
        "training": f"{trainer['rounds_per_task']} rounds per task, server every {trainer['server_every']}, "
        f"precision {trainer['precision']}",
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "commit": ", ".join(run.recorded("commit")) or "not recorded",
        "device": ", ".join(run.recorded("device")) or "not recorded",
        "time": "total_seconds" in costs and f"{in_hours(costs['total_seconds'])} ({sessions})",
    }
    files = {RESULTS: run.path} | {name: folder / name for name in BESIDE if (folder / name).is_file()}
    links = {name: quote(os.path.relpath(path.resolve(), out.resolve())) for name, path in files.items()}
    return {"group": group, "run": run, "facts": facts, "links": links}
