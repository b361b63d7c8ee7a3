import csv
import json
import re
import shutil

import pytest

from fedlscl.__main__ import main
from fedlscl.report.table import table_markdown


def change(version, seen=None, tasks=None, goal=None, **places):
    """Give a run another final accuracy, fewer finished tasks, another goal, or other values by dotted names."""
    file = version / "results.json"
    results = json.loads(file.read_text())
    if tasks is not None:
        results |= {"tasks_done": tasks, "summary": results["summary"][:tasks]}
        results["traffic"]["up"] = [client[:tasks] for client in results["traffic"]["up"]]
        (version / "matrix.csv").unlink()
    if goal is not None:
        results["data"]["num_tasks"] = goal
        for of_phase in results["accuracy"].values():
            for mask, matrix in of_phase.items():
                of_phase[mask] = [[row[:goal] for row in client[:goal]] for client in matrix]
    if seen is not None:
        results["summary"][-1] |= {"class_il/average": seen, "task_il/average": seen}
    for place, value in places.items():
        group, name = place.split("__")
        results[group][name] = value
    file.write_text(json.dumps(results))


@pytest.fixture
def two(runs, tmp_path):
    """One seed of each method; Local is better."""
    for method, seen in (("FedAvg", 0.25), ("Local", 0.75)):
        folder = shutil.copytree(runs / method / "version_0", tmp_path / "runs" / method / "version_0")
        change(folder, seen)
    return tmp_path / "runs"


def outputs(folder, out, capsys, monkeypatch):
    """Section headings and names of groups in their order, by the output."""
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["report", str(folder)]) == 0
    drawn = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    monkeypatch.undo()
    assert main(["report", str(folder), "--out", str(out)]) == 0
    capsys.readouterr()
    lines = {
        "printed": [line.split("|")[1].strip() for line in printed.split("\n\n")[0].splitlines()[2:]],
        "terminal": [line.strip(" │┃").split("│")[0].strip() for line in drawn.splitlines() if line.startswith("│")],
        "table.md": [
            line.split("|")[1].strip() for line in (out / "table.md").read_text().split("\n\n")[0].splitlines()[2:]
        ],
        "table.tex": [
            re.sub(
                r"\\multicolumn\{\d+\}\{l\}\{\\emph\{(.*)\}\}", r"\1", line.removesuffix(r" \\").split(" & ")[0]
            ).replace(r"\_", "_")
            for line in (out / "table.tex").read_text().split("\\midrule", 1)[1].splitlines()
            if line.endswith(r" \\")
        ],
        "index.html": [
            found[1] or found[0]
            for found in re.findall(
                r'<tr class="section"><th[^>]*>(.*?)</th>|<th scope="row"><span[^>]*></span>(.*?)</th>',
                (out / "index.html").read_text(),
            )
        ],
    }
    with (out / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines["table.csv"] = []
    for before, row in zip([{"section": ""}, *rows], rows, strict=False):
        lines["table.csv"] += [row["section"]] if row["section"] not in ("", before["section"]) else []
        lines["table.csv"].append(row["run"])
    return {name: [row.strip("*") for row in rows] for name, rows in lines.items()}


UNFINISHED, CENTRALISED = "unfinished runs, not ranked", "all data (centralised), not ranked"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ["Local", "FedAvg"]),
        ({"tasks": 1}, ["FedAvg", UNFINISHED, "Local (1 of 2 tasks)"]),
        ({"tasks": 1, "goal": 1}, ["set 1", "FedAvg", "set 2, 1 of 2 tasks", "Local (1 of 2 tasks)"]),
        ({"method__name": "Joint"}, ["FedAvg", CENTRALISED, "Local"]),
        ({"trainer__rounds_per_task": 9}, ["set 1", "Local", "set 2", "FedAvg"]),
        ({"data__fingerprint": "f" * 64}, ["set 1", "Local", "set 2", "FedAvg"]),
        ({"data__classes": [[[0, 1], [4, 5]], [[0, 1], [4, 5]]]}, ["set 1", "Local", "set 2", "FedAvg"]),
        ({"data__train_samples": [[1]]}, ["set 1", "Local", "set 2", "FedAvg"]),
        ({"trainer__precision": "bf16-mixed"}, ["Local", "FedAvg"]),
    ],
)
def test_every_output_lists_the_same_rows_in_the_same_sections(two, changed, expected, tmp_path, capsys, monkeypatch):
    change(two / "Local" / "version_0", seen=0.75, **changed)
    for name, rows in outputs(two, tmp_path / "out", capsys, monkeypatch).items():
        assert rows == expected, name


def test_only_ranked_groups_are_compared_in_words(two, tmp_path, capsys):
    change(two / "Local" / "version_0", tasks=1)
    assert main(["report", str(two), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "FedAvg reaches" in page and "Local (1 of 2 tasks) reaches" not in page and "points above" not in page
    assert "Finished tasks: 2 of 2 (FedAvg) and 1 of 2 (Local (1 of 2 tasks))." in page
    change(two / "FedAvg" / "version_0", tasks=1)
    assert main(["report", str(two), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "No run is finished: nothing is ranked." in page and "reaches" not in page.split("<h2")[0]


def test_seeds_of_one_run_are_one_row_with_their_number(runs, capsys):
    assert main(["report", str(runs)]) == 0
    printed = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split("|")[1:3] for line in printed[2:]] == [
        [f" {line.split('|')[1].strip()} ", " 2 "] for line in printed[2:]
    ]
    assert len(printed) == 4 and all("±" in line for line in printed[2:])


def test_the_terminal_shows_the_figures_of_the_markdown_table(runs, groups, capsys):
    assert main(["report", str(runs)]) == 0
    assert capsys.readouterr().out == table_markdown(groups)


def test_what_is_left_out_is_named(runs, tmp_path, capsys):
    for version in (0, 1):
        shutil.copytree(runs / "FedAvg" / "version_0", tmp_path / "FedAvg" / f"version_{version}")
    (tmp_path / "FedAvg" / "version_2").mkdir()
    shutil.copy(runs / "FedAvg/version_0/config.yaml", tmp_path / "FedAvg" / "version_2")
    shutil.copytree(tmp_path / "FedAvg" / "version_1", tmp_path / "copy" / "version_0")
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    files = [(tmp_path / "out" / name).read_text() for name in ("table.md", "table.tex", "index.html")]
    for text in (printed, *files):
        assert "Older versions of the same seed, left out: FedAvg/version_0." in text
        assert "Runs without a finished task so far, left out: FedAvg/version_2." in text
        assert "Identical results (copies of one run?): FedAvg seed 1, copy seed 1." in text


def test_nothing_to_report_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("as_file", [False, True])
def test_a_run_is_named_by_its_folder_or_its_file(two, as_file, capsys):
    path = two / "Local" / "version_0"
    assert main(["report", str(path / "results.json" if as_file else path)]) == 0
    assert "| Local | 1 | 75.0 |" in capsys.readouterr().out
