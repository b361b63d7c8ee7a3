import json
import shutil

import numpy as np
import pytest

from fedlscl.__main__ import main
from fedlscl.cli import raised_here
from fedlscl.report.groups import grouped, inequalities
from fedlscl.report.page import page
from fedlscl.report.runs import read_run, read_runs
from fedlscl.report.table import per_task_rows, table_latex, table_rows


@pytest.fixture
def copied(runs, tmp_path):
    """A run that a test may damage."""
    return shutil.copytree(runs / "FedAvg" / "version_0", tmp_path / "FedAvg")


def change(folder, **values):
    file = folder / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_all_seeds_of_a_run_folder_are_read_and_the_newest_version_of_each(runs, tmp_path):
    assert [(run.name, run.seed) for run in read_runs([runs])] == [
        ("FedAvg", 1),
        ("FedAvg", 2),
        ("Local", 1),
        ("Local", 2),
    ]
    for version in (0, 1, 2):
        shutil.copytree(runs / "FedAvg" / "version_0", tmp_path / "FedAvg" / f"version_{version}")
    assert [run.path.parent.name for run in read_runs([tmp_path])] == ["version_2"]


def test_a_folder_named_after_its_seed_is_a_repetition(runs, tmp_path):
    for version, name in enumerate(("FedAvg-seed1", "FedAvg_seed_2")):
        shutil.copytree(runs / "FedAvg" / f"version_{version}", tmp_path / name / "version_0")
    assert [run.name for run in read_runs([tmp_path])] == ["FedAvg", "FedAvg"]
    (tmp_path / "FedAvg-seed1").rename(tmp_path / "FedAvg-seed7")
    assert {run.name for run in read_runs([tmp_path])} == {"FedAvg", "FedAvg-seed7"}


def test_matrix_and_averages_are_those_of_the_summary(runs):
    for run in read_runs([runs]):
        for mask in ("task_il", "class_il"):
            assert run.client_averages(mask).mean() == pytest.approx(run.results["summary"][-1][f"{mask}/average"])
            assert np.isnan(run.matrix(mask)[:, 0, 1]).all() and not np.isnan(run.matrix(mask)[:, 1]).any()


def test_names_of_schema_1_are_understood(copied):
    """Committed results have them: the masks were 'seen' and 'task'."""
    new = read_run(copied / "results.json")
    for name in ("results.json", "matrix.csv"):
        text = (copied / name).read_text().replace("class_il", "seen").replace("task_il", "task")
        (copied / name).write_text(text.replace('"schema": 2', '"schema": 1'))
    assert '"seen/average"' in (copied / "results.json").read_text()
    old = read_run(copied / "results.json")
    assert old.results == new.results | {"schema": 1}
    assert [group.final("class_il/average") for group in grouped([old])] == [
        grouped([new])[0].final("class_il/average")
    ]


def test_a_run_may_come_without_costs_and_configuration(copied):
    for name in ("costs.json", "config.yaml", "matrix.csv"):
        (copied / name).unlink()
    run = read_run(copied / "results.json")
    assert run.costs == {} and run.recorded("commit") == [] == run.recorded("device")
    assert run.options["method.fields.local_epochs"] == 1


DAMAGES = {
    "results.json' cannot be read (Expecting": lambda folder: (folder / "results.json").write_text('{"seed": 1'),
    "must be dict, got []": lambda folder: (folder / "results.json").write_text("[]"),
    "method must be given": lambda folder: (folder / "results.json").write_text('{"seed": 1}'),
    "schema must be at most 2, got 3: update fedlscl": lambda folder: change(folder, schema=3),
    "summary must have 2 entries (tasks_done), got 0": lambda folder: change(folder, summary=[]),
    "holds no finished task": lambda folder: change(
        folder, tasks_done=0, summary=[], traffic={"up_bytes": 0, "down_bytes": 0, "up": [[], []]}
    ),
    "matrix.csv' does not fit the results.json beside it": lambda folder: (folder / "matrix.csv").write_text(
        "phase,mask\nafter,task\n"
    ),
    "is not a configuration in YAML": lambda folder: (folder / "config.yaml").write_text("a: [1"),
    "costs.json' cannot be read (Expecting": lambda folder: (folder / "costs.json").write_text(""),
}


@pytest.mark.parametrize("message", DAMAGES)
@pytest.mark.parametrize("has_out", [False, True])
def test_a_damaged_run_is_one_line_and_nothing_is_written(copied, message, has_out, tmp_path, capsys):
    DAMAGES[message](copied)
    assert main(["report", str(copied), *(["--out", str(tmp_path / "out")] if has_out else [])]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "out").exists()


def places(value, at=()):
    """Every place in a results.json down to four names deep."""
    if isinstance(value, dict) and len(at) < 4:
        for name, entry in value.items():
            yield (*at, name)
            yield from places(entry, (*at, name))


@pytest.mark.parametrize("name", ["results.json", "costs.json"])
def test_any_wrong_entry_is_harmless_or_refused_when_it_is_read(copied, name, tmp_path):
    """Every entry in turn is absent or of another type, as in files of other tools and of other versions."""
    (copied / "matrix.csv").unlink()
    text = (copied / name).read_text()
    rejected = 0
    for place in places(json.loads(text)):
        for wrong in (None, "absent", [], {}, "text", -1, 1e400, [{}]):
            values = json.loads(text)
            inner = values
            for part in place[:-1]:
                inner = inner[part]
            if wrong == "absent":
                del inner[place[-1]]
            else:
                inner[place[-1]] = wrong
            (copied / name).write_text(json.dumps(values))
            try:
                groups = grouped(read_runs([copied]))
            except ValueError as error:
                assert raised_here(error) and name in str(error), place
                rejected += 1
                continue
            assert page(groups, [], [], tmp_path) and table_latex(groups, inequalities(groups))
            assert list(per_task_rows(groups)) and list(table_rows(groups))
    assert rejected > 10
