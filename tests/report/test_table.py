import json

import pytest

from fedlscl.__main__ import main
from fedlscl.report.table import COLUMNS, comparison, find_results


def write(folder, seen, seed=42):
    """A run's results with the same figure in every column but one."""
    folder.mkdir(parents=True)
    figures = dict.fromkeys(COLUMNS, 0.5) | {"seen/average": seen}
    run = {"summary": [{}, figures], "traffic": {"up_bytes": 2_500_000, "down_bytes": 0}, "seed": seed}
    (folder / "results.json").write_text(json.dumps(run))


def test_best_run_comes_first_with_its_last_task(tmp_path):
    write(tmp_path / "Worse" / "version_0", 0.25)
    write(tmp_path / "Better" / "version_0", 0.75, seed=7)
    header, first, second = comparison([tmp_path])
    assert header[0] == "run" and [first[0], second[0]] == ["Better", "Worse"]
    assert first[1:3] == ["75.0", "50.0"] and first[-3:] == ["2.50", "0.00", "7"]


def test_the_newest_version_stands_for_a_run(tmp_path):
    write(tmp_path / "A" / "version_0", 0.1)
    write(tmp_path / "A" / "version_1", 0.9)
    assert find_results([tmp_path]) == [tmp_path / "A" / "version_1" / "results.json"]


def test_nothing_to_report_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("as_file", [False, True])
def test_report_prints_markdown_where_there_is_no_terminal(tmp_path, capsys, as_file):
    write(tmp_path / "A" / "version_0", 0.5)
    path = tmp_path / "A" / "version_0" / "results.json" if as_file else tmp_path
    assert main(["report", str(path)]) == 0
    assert "| A | 50.0 | 50.0 |" in capsys.readouterr().out
