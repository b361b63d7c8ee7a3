import csv
import json
import re
import statistics

import pytest

from fedlscl.report.table import COLUMNS, tex


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def table(report):
    return {row["run"]: row for row in rows(report / "table.csv")}


def expected(runs, method, figure):
    """Mean and deviation straight from the files."""
    values = []
    for version in sorted((runs / method).iterdir()):
        results = json.loads((version / "results.json").read_text())
        costs = json.loads((version / "costs.json").read_text())
        values.append({**results["summary"][-1], **results["traffic"], **costs}[figure])
    return statistics.mean(values), statistics.stdev(values)


def test_csv_parses_back_to_the_results(runs, table):
    assert table.keys() == {"FedAvg", "Local"}
    for method, row in table.items():
        assert (row["n"], row["seeds"], row["tasks"]) == ("2", "1 2", "2")
        for column in COLUMNS:
            found = [float(row[f"{column.figure} {of}"]) for of in ("mean", "std")]
            assert found == pytest.approx(expected(runs, method, column.figure), rel=1e-12, abs=1e-12)


def unrounded(row, column):
    return [column.scale * float(row[f"{column.figure} {of}"]) for of in ("mean", "std")]


def test_latex_and_markdown_hold_the_rounded_numbers_of_the_csv(report, table):
    latex = [line for line in (report / "table.tex").read_text().splitlines() if line.startswith(tuple(table))]
    markdown = [line for line in (report / "table.md").read_text().splitlines()[2:] if line.startswith("|")]
    assert len(latex) == len(markdown) == 2
    for tex_line, md_line in zip(latex, markdown, strict=True):
        name, _, *tex_cells = [cell.strip() for cell in tex_line.removesuffix("\\\\").split("&")]
        md_name, _, *md_cells = [cell.strip() for cell in md_line.strip("|").split("|")]
        assert name == md_name
        for column, tex_cell, md_cell in zip(COLUMNS, tex_cells, md_cells, strict=True):
            assert re.fullmatch(r"\$(\S+) \\pm (\S+)\$", tex_cell).groups() == tuple(md_cell.split(" ± "))
            for text, exact in zip(md_cell.split(" ± "), unrounded(table[name], column), strict=True):
                assert abs(float(text) - exact) <= 10.0**-column.digits / 2 + 1e-9


def test_per_task_has_every_run_after_every_task_under_both_masks(runs, report):
    found = rows(report / "per_task.csv")
    assert len(found) == 2 * 2 * 2 * 2
    for row in found:
        run = runs / row["run"] / f"version_{int(row['seed']) - 1}" / "results.json"
        results = json.loads(run.read_text())
        task = int(row["after_task"])
        assert float(row["forgetting"]) == results["summary"][task][f"{row['mask']}/forgetting"]
        assert int(row["up_bytes_so_far"]) == sum(
            map(sum, (c[t] for c in results["traffic"]["up"] for t in range(task + 1)))
        )


def test_latex_prints_every_special_character():
    assert tex(r"a_b & 50% of $x^2$ #1 {~\<>}") == (
        r"a\_b \& 50\% of \$x\textasciicircum{}2\$ \#1 \{\textasciitilde{}\textbackslash{}\textless{}\textgreater{}\}"
    )
