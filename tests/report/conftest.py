import pytest

import tiny
from fedlscl.__main__ import main
from fedlscl.report.groups import grouped
from fedlscl.report.runs import read_runs

SEEDS = (1, 2)
METHODS = ("FedAvg", "Local")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Two methods and two seeds, as fit leaves them: two versions in each method's folder."""
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        for seed in SEEDS:
            words = ["--method", method, *tiny.options("method", tiny.SMALL), *tiny.COMMON, *tiny.inside(folder)]
            assert main(["fit", "--seed_everything", str(seed), *words]) == 0
    return folder


@pytest.fixture(scope="session")
def groups(runs):
    """The same, read."""
    return grouped(read_runs([runs]))


@pytest.fixture(scope="session")
def report(runs, tmp_path_factory):
    """The folder of a report over them."""
    out = tmp_path_factory.mktemp("out") / "report"
    assert main(["report", str(runs), "--out", str(out)]) == 0
    return out
