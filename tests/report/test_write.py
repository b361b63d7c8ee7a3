import shutil

import pytest

from fedlscl.__main__ import main
from fedlscl.report.groups import grouped
from fedlscl.report.plots import against_cost
from fedlscl.report.runs import read_runs
from fedlscl.report.table import table_markdown

FIGURES = ("accuracy", "forgetting", "clients", "bytes", "seconds", "matrix")
TABLES = {"index.html", "table.md", "table.csv", "table.tex", "per_task.csv"}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_report_holds_tables_figures_and_the_page_and_nothing_else(report):
    figures = {
        f"{name}_{mask}.{kind}" for name in FIGURES for mask in ("class_il", "task_il") for kind in ("svg", "png")
    }
    assert contents(report).keys() == TABLES | figures


def test_a_second_call_writes_the_same_bytes_and_prints_what_it_wrote(runs, report, capsys):
    before = contents(report)
    assert main(["report", str(runs / "Local"), str(runs / "FedAvg"), "--out", str(report)]) == 0
    assert contents(report) == before
    assert {line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()} == before.keys()


def test_without_costs_there_is_no_figure_of_seconds_and_with_one_seed_no_deviation(runs, tmp_path):
    shutil.copytree(runs / "FedAvg" / "version_0", tmp_path / "A")
    (tmp_path / "A" / "costs.json").unlink()
    groups = grouped(read_runs([tmp_path / "A"]))
    assert against_cost(groups, "total_seconds", "class_il") is None
    last = table_markdown(groups).splitlines()[-1]
    assert last.startswith("| A | 1 |") and last.endswith("| – |") and "±" not in last


@pytest.mark.parametrize("options", [["--out"], ["--ou", "x"], []])
def test_options_that_make_no_sense_are_one_line(options, capsys):
    assert main(["report", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", str(runs), "--out", str(tmp_path / "file")]) == 2
    assert "choose another folder" in capsys.readouterr().err
