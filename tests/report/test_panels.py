import dataclasses

import numpy as np
import pytest

from fedlscl.callbacks.formatting import percent
from fedlscl.report.groups import Group
from fedlscl.report.plots import clients, matrices


class Shaped(Group):
    """Any matrix, of any number of clients."""

    def matrix(self, mask):
        size = int(self.name)
        return np.where(np.tri(size, dtype=bool), np.linspace(0, 1, size), np.nan)

    def ranked_clients(self, mask):
        return np.linspace(0, 1, int(self.name))[None]


def test_the_words_name_the_worst_client_and_the_last_row(groups):
    for group in groups:
        assert f"{group.name} {percent(group.known('class_il/worst_client').mean)} %" in clients(groups, "class_il").alt
        row = ", ".join(map(percent, group.matrix("task_il")[-1]))
        assert f"{group.name} {row}" in matrices(groups, "task_il").alt


@pytest.mark.parametrize("size", ["1", "25"])
def test_any_number_of_tasks_can_be_drawn(groups, size):
    shaped = Shaped(size, groups[0].runs)
    assert matrices([shaped], "class_il").svg
    assert dataclasses.is_dataclass(shaped) and clients([shaped], "class_il").svg
