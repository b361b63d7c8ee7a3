"""Fill the tables in README.md and docs/ from benchmarks/results, so that pages cannot drift from runs.

    python benchmarks/publish.py

A table stands between <!-- table NAME --> and <!-- end -->; <!-- table NAME: ROW ROW --> takes some rows only.
<!-- readouts NAME --> has own heads and one readout side by side, without other figures.
<!-- costs NAME: ROW ROW --> is what runs of one seed cost, <!-- figure NAME --> a picture of final accuracies.
The whole report over each of REPORTS goes to benchmarks/results/NAME/report.html.
"""

import argparse
import json
import re
from pathlib import Path

from figures import figure

from fedlscl.federated.checkpoint import write_atomically
from fedlscl.report.groups import NOT_CONVERGED, READOUTS, Group, grouped
from fedlscl.report.page import Section, figures, page
from fedlscl.report.runs import read_runs
from fedlscl.report.table import Column, cells, markdown, table_markdown

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/costs.md")
PICTURES = ROOT / "docs/pictures"
REPORTS = ("readouts_cpu", "table1_cpu", "ablation_cpu")
EARLIER = Section(
    "How to read this comparison",
    "These runs are of an earlier version, in which only Fed-LSCL added closed-form heads to a trained net. So the "
    "order of the rows does not rank the methods. docs/results.md has the comparison with the same readout for all.",
    [],
)
READING = Section(
    "How to read this comparison",
    "Methods have different heads, so the order of the rows, by own heads, does not rank their features: compare own "
    "heads with own heads, and a readout with the same readout. See docs/results.md.",
    [],
)
"""Stands before the figures of the reports, the other one before those of earlier versions."""
START = r"(?P<start><!-- (?P<kind>table|costs|figure|readouts) (?P<name>\w+)(: (?P<rows>[\w ,-]+))? -->\n)"
TABLE = re.compile(START + r".*?(?P<end><!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables as the results now are.

    Raises:
        ValueError: if a row is asked for that is not there.
    """
    kinds = {"table": table, "costs": costs, "figure": shown, "readouts": side_by_side}
    return TABLE.sub(
        lambda found: found["start"] + kinds[found["kind"]](found["name"], found["rows"]) + found["end"], text
    )


def table(name: str, rows: str | None) -> str:
    """The table over benchmarks/results/NAME, best first; of the named rows only, where some are named."""
    groups = results(name)
    if rows is None:
        return table_markdown(groups)
    wanted = rows.split()
    missing = set(wanted) - {group.name for group in groups}
    if missing:
        raise ValueError(f"rows {sorted(missing)} are not in benchmarks/results/{name}: run and collect them first.")
    return table_markdown([group for group in groups if group.name in wanted])


READOUT = "adapted/lda"
BOTH = (
    Column("class_il/average", "own class-IL %", 100, 1),
    Column(f"{READOUTS}{READOUT}/class_il", f"{READOUT} class-IL %", 100, 1),
    Column("task_il/average", "own task-IL %", 100, 1),
    Column(f"{READOUTS}{READOUT}/task_il", f"{READOUT} task-IL %", 100, 1),
    Column("up_bytes", "up MB", 1e-6, 1),
    Column("readout_up_bytes", "readouts up MB", 1e-6, 1),
)


def side_by_side(name: str, rows: str | None) -> str:
    """Own heads and the readout of each run of benchmarks/results/NAME, best readout first."""
    wanted = None if rows is None else rows.split()
    groups = [group for group in results(name) if wanted is None or group.name in wanted]
    groups.sort(key=lambda group: -group.known(BOTH[1].figure).mean)
    lines = [[f"{group.name}{group.mark}", *cells(group, BOTH)] for group in groups]
    notes = f"\n{NOT_CONVERGED}\n" if any(group.mark for group in groups) else ""
    return markdown([["run", "n", *(column.title for column in BOTH)], *lines]) + "\n" + notes


def results(name: str) -> list[Group]:
    """What is kept under benchmarks/results/NAME."""
    return grouped(read_runs([ROOT / "benchmarks/results" / name]))


def shown(name: str, rows: str | None) -> str:
    """A figure by its file, with its numbers in words."""
    return f"![{figure(name, results(name)).alt}](pictures/{name}.svg)\n"


def costs(name: str, rows: str | None) -> str:
    """What the named runs of the first seed cost, in the order of their names."""
    lines = [
        "| run | trained values per client | values up per client and round | up MB | seconds | peak memory GB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    seed = min((ROOT / "benchmarks/results" / name).glob("seed*"), key=lambda path: int(path.name[4:]))
    for row in (rows or "").split():
        result, cost = (json.loads((seed / row / f"{file}.json").read_text()) for file in ("results", "costs"))
        trained, sent = (max(result["parameters"][key]) for key in ("trainable", "uploaded_per_round"))
        numbers = f"{result['traffic']['up_bytes'] / 1e6:.2f} | {cost['total_seconds']:.0f}"
        lines.append(f"| {row} | {trained:,} | {sent:,} | {numbers} | {cost['peak_memory_bytes']['host'] / 1e9:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Pages, pictures and reports."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in PAGES:
        for found in TABLE.finditer(text := path.read_text()):
            if found["kind"] == "figure":
                drawn = figure(found["name"], results(found["name"]))
                write_atomically(PICTURES / f"{drawn.name}.svg", drawn.svg)
        write_atomically(path, filled(text).encode())
    for name in REPORTS:
        folder = ROOT / "benchmarks/results" / name
        groups = results(name)
        write_atomically(
            folder / "report.html",
            page(groups, [READING if name == REPORTS[0] else EARLIER, *figures(groups)], [], folder).encode(),
        )


if __name__ == "__main__":
    main()
