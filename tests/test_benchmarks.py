"""The benchmarks of robustness and size run on today's package, at a tiny size."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scale
from robustness_sections.checkpoints import damage
from robustness_sections.failures import failures
from robustness_sections.growth import growth
from robustness_sections.kills import kills
from robustness_sections.notes import Notes
from robustness_sections.uploads import uploads

pytestmark = pytest.mark.slow


def test_runs_end_in_one_of_two_ways_when_clients_fail():
    (found,) = failures(Notes(), rates=(0.0,), seeds=1, rounds=1).values()
    assert found["finished"] == 1 and 0 < found["accuracies"][0] <= 1


def test_a_killed_run_is_equal_to_the_byte(tmp_path):
    for found in kills(tmp_path, Notes(), share=0.02).values():
        assert found["kills"] == found["equal"] > 0


def test_damaged_checkpoints_are_noticed(tmp_path):
    found = damage(tmp_path, number=3, runs=1)
    assert found and all(sum(counts.values()) for counts in found.values())


def test_malformed_uploads_change_nothing():
    for counts in uploads(Notes(), number=2, clients=4).values():
        assert counts["sent"] == counts["refused"] == counts["equal"] == 2


def test_memory_is_followed_over_rounds(tmp_path):
    assert growth(tmp_path, rounds=12, warm_up=2)


def test_rounds_of_many_clients_are_measured():
    small = {**scale.DATA, "num_clients": 4, "train_per_class": 16}
    found = scale.federation({"rounds_per_task": 1}, dict(scale.FEDLSCL), small)
    assert len(found["rounds"]) == 2 and found["client_mb"] > 0
