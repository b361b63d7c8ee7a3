import dataclasses

import pytest

from fedlscl.callbacks.formatting import percent
from fedlscl.report.groups import grouped
from fedlscl.report.plots import against_cost, over_tasks
from fedlscl.report.runs import read_runs


@pytest.mark.parametrize("course", ["average", "forgetting"])
def test_the_words_of_a_course_hold_its_last_values(groups, course):
    words = over_tasks(groups, course, "class_il").alt
    for group in groups:
        assert f"{group.name} {percent(group.known(f'class_il/{course}').mean)} %" in words


def test_a_method_that_uploads_nothing_is_kept(groups):
    words = against_cost(groups, "up_bytes", "task_il").alt
    assert "Local" in words and "at 0 B" in words


def test_a_cost_that_nobody_has_gives_no_figure(runs):
    local = [run for run in read_runs([runs]) if run.name == "Local"]
    assert against_cost(grouped(local), "up_bytes", "class_il") is None
    without_costs = grouped([dataclasses.replace(run, costs={}) for run in local])
    assert against_cost(without_costs, "total_seconds", "class_il") is None


def test_one_run_of_one_task_can_be_drawn(runs):
    run = read_runs([runs])[0]
    results = {**run.results, "tasks_done": 1, "summary": run.results["summary"][:1]}
    (group,) = grouped([dataclasses.replace(run, results=results)])
    assert over_tasks([group], "forgetting", "class_il").svg
