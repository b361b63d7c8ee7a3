import re

import pytest

import tiny
from fedlscl.__main__ import main


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("options", [tiny.FEDAVG, tiny.FEDLSCL], ids=["FedAvg", "FedLSCL"])
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(options, tmp_path, capsys):
    assert main(["fit", "--dry_run", *options, *tiny.inside(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    name = "FedAvg" if options is tiny.FEDAVG else "FedLSCL"
    assert text.startswith(f"{name} on fake: 2 clients, 2 tasks of 2 classes per client, 1 round per task\n")
    assert re.search(r"^  estimate    [\d.]+ [kM]B up, [\d.]+ [kM]B down, \d:\d\d:\d\d for the whole run$", text, re.M)
    assert text.endswith("Dry run: nothing was written. Leave out --dry_run to begin.\n")
    assert files(tmp_path) == []


def test_a_dry_run_of_a_run_that_was_begun_says_where_it_goes_on(tmp_path, capsys):
    options = [*tiny.FEDAVG, *tiny.inside(tmp_path)]
    assert main(["fit", *options]) == 0
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    capsys.readouterr()
    assert main(["fit", *options, "--ckpt_path", "last", "--dry_run"]) == 0
    assert "  resuming    after the last task" in capsys.readouterr().out
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)} == before


def test_a_saved_configuration_is_none_of_a_dry_run(tmp_path):
    assert main(["fit", *tiny.FEDAVG, *tiny.inside(tmp_path), "--dry_run=false"]) == 0
    assert "dry_run" not in (tmp_path / "FedAvg/version_0/config.yaml").read_text()


def test_a_dry_run_is_refused_what_a_run_is(tmp_path, capsys):
    options = [*tiny.FEDAVG, *tiny.inside(tmp_path)]
    assert main(["fit", *options, "--dry_run", "--data.num_clients", "40"]) == 2
    assert "num_clients" in capsys.readouterr().err and files(tmp_path) == []
