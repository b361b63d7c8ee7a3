import dataclasses
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedlscl.report.groups import classifier, final, grouped, inequalities
from fedlscl.report.runs import read_runs


@pytest.fixture
def four(runs):
    return read_runs([runs])


def with_option(run, old, new):
    assert old in run.config
    return dataclasses.replace(run, config=run.config.replace(old, new))


def test_groups_are_the_methods_best_first(groups):
    assert {group.name for group in groups} == {"FedAvg", "Local"}
    assert all(group.seeds == [1, 2] for group in groups)
    means = [group.known("class_il/average").mean for group in groups]
    assert means == sorted(means, reverse=True)


def test_mean_and_deviation_are_those_over_seeds(groups, four):
    for group in groups:
        values = [final(run, "class_il/average") for run in four if run.name == group.name]
        found = group.known("class_il/average")
        assert found.mean == pytest.approx(statistics.mean(values), abs=1e-15)
        assert found.deviation == pytest.approx(statistics.stdev(values), abs=1e-15)


def test_one_seed_has_no_deviation(four):
    (group,) = grouped(four[:1])
    assert group.known("class_il/average").deviation is None


def test_a_figure_that_one_run_lacks_has_no_mean(four):
    (group,) = grouped([four[0], dataclasses.replace(four[1], costs={})])
    assert group.final("total_seconds") is None and group.final("up_bytes") is not None


def test_runs_of_one_name_in_two_settings_are_kept_apart_and_named_after_the_difference(four):
    other = with_option(four[1], "local_epochs: 1", "local_epochs: 7")
    assert {group.name for group in grouped([four[0], other])} == {"FedAvg (local_epochs=1)", "FedAvg (local_epochs=7)"}


def test_where_a_run_was_made_is_no_setting(four):
    moved = with_option(four[1], "default_root_dir: ", "default_root_dir: /elsewhere")
    moved = with_option(moved, "class_path: fedlscl.", "class_path: fedlscl.methods.fedavg.")
    assert [group.seeds for group in grouped([four[0], moved])] == [[1, 2]]


def test_machines_of_other_precision_repeat_the_same_setting(four):
    elsewhere = with_option(four[1], "precision: 32-true", "precision: auto")
    assert [group.seeds for group in grouped([four[0], elsewhere])] == [[1, 2]]


def test_an_unfinished_run_does_not_join_the_finished_ones(four):
    results = {**four[1].results, "tasks_done": 1, "summary": four[1].results["summary"][:1]}
    stopped = dataclasses.replace(four[1], results=results)
    assert [len(group.runs) for group in grouped([four[0], stopped])] == [1, 1]


def test_the_same_run_twice_is_refused(four, tmp_path):
    copy = dataclasses.replace(four[0], path=tmp_path / "FedAvg" / "results.json")
    with pytest.raises(ValueError, match="the same seed 1"):
        grouped([four[0], copy])


def test_the_worst_rank_is_the_worst_client_of_the_table(groups):
    for group in groups:
        for mask in ("task_il", "class_il"):
            ranked = group.ranked_clients(mask)
            assert ranked[:, 0].mean() == pytest.approx(group.known(f"{mask}/worst_client").mean)
            assert (np.diff(ranked, axis=1) >= 0).all()


@pytest.mark.parametrize(
    ("name", "collaborator", "expected"),
    [
        ("FedLSCL", {"analytic_weight": 2.0, "adapted_weight": 0.0}, "trained and closed-form heads"),
        ("FedLSCL", {"analytic_weight": 0.0, "adapted_weight": 2.0}, "trained and closed-form heads"),
        ("FedLSCL", {"analytic_weight": 0.0, "adapted_weight": 0.0}, "a trained head"),
        ("LoRM", None, "a trained head"),
        ("FedRidge", None, "a closed-form head"),
    ],
)
def test_the_classifier_of_a_run_is_a_condition(name, collaborator, expected):
    fields = {} if collaborator is None else {"collaborator": collaborator}
    assert classifier(SimpleNamespace(results={"method": {"name": name, "fields": fields}})) == expected


def test_the_published_table_says_that_its_classifiers_differ():
    page = (Path(__file__).parents[2] / "benchmarks/results/table1_cpu/report.html").read_text()
    assert (
        "They do not have the same classifier: fedlscl has trained and closed-form heads, lorm a trained head." in page
    )


def test_accuracies_on_validation_and_on_test_images_are_not_ranked_together(four):
    other = dataclasses.replace(
        four[2], results={**four[2].results, "data": {**four[2].results["data"], "evaluated_on": "validation"}}
    )
    groups = grouped([four[0], other])
    assert {group.heading for group in groups} == {"set 1", "set 2"}
    notes = inequalities(groups)
    assert any("Accuracy on: test images" in note and "validation images" in note for note in notes)


def test_a_run_of_a_version_without_an_option_repeats_one_at_its_default(four):
    lines = four[1].config.splitlines(keepends=True)
    older = dataclasses.replace(
        four[1],
        config="".join(
            line for line in lines if not re.match(r" *(evaluate_on|validation_per_class|max_tasks):", line)
        ),
    )
    assert older.config != four[1].config
    assert [group.seeds for group in grouped([four[0], older])] == [[1, 2]]
