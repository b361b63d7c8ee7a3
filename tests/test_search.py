"""The search driver ranks finished trials on validation images only, and its committed results are of such trials."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import tiny
from fedlscl.__main__ import main
from fedlscl.report.runs import read_runs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import search  # noqa: E402
from presets import parse  # noqa: E402
from search import SPACES, TASKS, trial, trials  # noqa: E402

RESULTS = ROOT / "benchmarks/results/search_cpu.json"
TRIED = {"lr": 0.01}
VALIDATION = ["--data.validation_per_class", "2", "--data.evaluate_on", "validation"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains FedAvg on two tasks; returns the run's folder."""

    def fit(name, *words):
        out = tmp_path_factory.mktemp(name)
        assert (
            main(["fit", "--seed_everything", "7", *tiny.FEDAVG, "--method.lr", "0.01", *tiny.inside(out), *words]) == 0
        )
        return out

    return fit


@pytest.fixture(scope="module")
def finished(run):
    return run("finished", *VALIDATION)


def test_a_finished_trial_is_scored_after_its_last_task(finished):
    (read,) = read_runs([finished])
    first, last = read.results["summary"]
    row = trial(finished, TRIED)
    assert row == {"values": TRIED, **{name: last[name] for name in ("class_il/average", "task_il/average")}}
    assert TASKS == 2 and first != last


def test_a_trial_that_was_stopped_has_no_score(finished, tmp_path):
    """After one task there are fewer classes, so that its accuracy does not compare with those after two."""
    stopped = shutil.copytree(finished, tmp_path / "stopped")
    (file,) = stopped.rglob("results.json")
    results = json.loads(file.read_text())
    results |= {"tasks_done": 1, "summary": results["summary"][:1]}
    results["traffic"]["up"] = [client[:1] for client in results["traffic"]["up"]]
    file.with_name("matrix.csv").unlink()
    file.write_text(json.dumps(results))
    assert read_runs([stopped])[0].tasks == 1
    assert trial(stopped, TRIED) is None
    assert trial(tmp_path / "absent", TRIED) is None


def test_a_run_of_fewer_tasks_has_no_score(run):
    assert trial(run("short", *VALIDATION, "--trainer.max_tasks", "1"), TRIED) is None


def test_runs_with_other_values_or_on_test_images_are_refused(run, finished):
    with pytest.raises(ValueError, match=re.escape("must be a run with {'lr': 0.03}, got {'lr': 0.01}: remove it")):
        trial(finished, {"lr": 0.03})
    with pytest.raises(ValueError, match="must be evaluated on validation images, got test: remove it"):
        trial(run("test_images"), TRIED)


def test_every_method_has_equally_many_trials_and_none_twice():
    options = parse("", [])
    options.base_data = ROOT / "configs/data/cifar100_small.yaml"
    planned = trials(options)
    assert len({len(runs) for runs in planned.values()}) == 1
    for runs in planned.values():
        assert len({json.dumps(tried, sort_keys=True) for _, tried in runs}) == len(runs)
        for run, _ in runs:
            assert run.options[run.options.index("--data.evaluate_on") + 1] == "validation"


def test_a_call_keeps_the_choices_of_methods_that_it_has_no_trial_of(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "__file__", str(tmp_path / "search.py"))
    monkeypatch.setattr(search, "sweep", lambda *_: False)
    monkeypatch.setattr(sys, "argv", ["search.py", "--out", str(tmp_path / "runs")])
    path = tmp_path / "results/search_cpu.json"
    path.parent.mkdir()
    path.write_text(RESULTS.read_text())
    assert search.main() == 1
    assert json.loads(path.read_text()) == json.loads(RESULTS.read_text())


def test_committed_choices_are_the_best_of_the_trials_that_the_spaces_file_has():
    spaces = yaml.safe_load(SPACES.read_text())
    methods = json.loads(RESULTS.read_text())["methods"]
    assert methods
    for name, method in methods.items():
        assert [row["values"] for row in method["trials"]] == spaces[name]
        best = max(method["trials"], key=lambda row: row["class_il/average"])
        assert method["chosen"] == best["values"]
