import copy
import dataclasses

import pytest

from fedlscl.report.groups import SETS, grouped, inequalities
from fedlscl.report.runs import read_runs


def test_runs_under_equal_conditions_need_no_notice(groups):
    assert inequalities(groups) == []


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("trainer", "rounds_per_task"), 9, "Rounds per task: 1 (FedAvg) and 9 (Local)."),
        (("trainer", "precision"), "bf16-mixed", "Precision: 32-true (FedAvg) and bf16-mixed (Local)."),
        (("data", "num_clients"), 3, "Clients: 2 (FedAvg) and 3 (Local)."),
        (("data", "classes"), [], "Split of seed 1: "),
        (("data", "fingerprint"), "f" * 64, "Data set: fake "),
    ],
)
def test_a_condition_that_differs_is_named_with_its_runs(runs, place, value, sentence):
    fedavg, _, local, _ = read_runs([runs])
    results = copy.deepcopy(local.results)
    results[place[0]][place[1]] = value
    found = inequalities(grouped([fedavg, dataclasses.replace(local, results=results)]))
    is_comparable = place == ("trainer", "precision")
    assert found[:-1] == ([] if is_comparable else [SETS]) and found[-1].startswith(sentence)


def test_other_seeds_are_named(runs):
    fedavg, second, local, _ = read_runs([runs])
    assert inequalities(grouped([fedavg, second, local])) == ["Seeds: 1, 2 (FedAvg) and 1 (Local)."]
