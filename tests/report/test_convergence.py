"""The mark of runs that have not converged at their budget."""

import csv
import json
import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.__main__ import main
from fedlscl.report.groups import NOT_CONVERGED, grouped
from fedlscl.report.page import page
from fedlscl.report.runs import MAX_LEFT, MIN_FALL, has_converged, read_run, read_runs
from fedlscl.report.table import table_latex, table_markdown, table_rows

GUESS = math.log(8)
"""Cross-entropy of guessing among the eight classes of `CLASSES`."""
CLASSES = [[range(8)] * 5] * 2


def rows(losses, stage="train", clients=2):
    """Rows of rounds.csv for losses by task and round, the same for every client."""
    return [
        {"client": str(client), "task": str(task), "round": str(number), f"{stage}/cross_entropy": str(loss)}
        for task, of_task in enumerate(losses)
        for number, loss in enumerate(of_task)
        for client in range(clients)
    ]


MEASURED = {
    # Training cross-entropy by task and round, mean over clients: cpu preset, seed 42, two rounds per task.
    "LoRM": (True, [[0.496, 0.144], [0.635, 0.175], [0.232, 0.0554], [0.6, 0.137], [0.27, 0.0918]]),
    "FedBE": (True, [[0.423, 0.0674], [0.336, 0.0505], [0.215, 0.0417], [0.237, 0.0491], [0.213, 0.0216]]),
    "FedDualP": (True, [[0.446, 0.116], [0.515, 0.127], [0.294, 0.064], [0.431, 0.114], [0.299, 0.0637]]),
    "FedL2P": (False, [[1.48, 1.09], [1.44, 1.05], [1.34, 0.854], [1.39, 0.983], [1.27, 0.862]]),
    "FedMGP": (False, [[2, 1.71], [1.9, 1.72], [1.82, 1.67], [1.84, 1.71], [1.8, 1.71]]),
}


@pytest.mark.parametrize("method", MEASURED)
def test_measured_losses_are_judged_as_their_pages_do(method):
    expected, losses = MEASURED[method]
    assert has_converged(rows(losses), CLASSES) is expected


@given(st.lists(st.floats(0.01, 3), min_size=2, max_size=5), st.integers(1, 4))
def test_a_stage_is_judged_by_its_last_two_rounds(losses, tasks):
    *_, before, last = losses
    expected = 1 - last / before <= MIN_FALL or last / GUESS <= MAX_LEFT
    assert has_converged(rows([losses] * tasks), CLASSES) is expected
    assert has_converged(rows([losses[-2:]]), CLASSES) is expected


def test_one_stage_that_has_not_converged_is_enough():
    good, bad = rows([[2.0, 0.1]], "first"), rows([[2.0, 1.0]], "second")
    assert has_converged(good, CLASSES) is True
    assert has_converged([*good, *bad], CLASSES) is False


@pytest.mark.parametrize(
    "unknown",
    [
        [],
        rows([[2.0]]),
        [{"client": "0", "task": "0", "round": str(n), "train/loss": "2.0"} for n in range(2)],
        [row | {"client": "-1"} for row in rows([[2.0, 1.0]])],
    ],
    ids=["nothing", "one round", "no cross-entropy", "server"],
)
def test_nothing_is_said_without_two_rounds_of_a_clients_cross_entropy(unknown):
    assert has_converged(unknown, CLASSES) is None


def test_guessing_is_among_all_classes_met_so_far():
    """0.6 nats are more than a quarter of ln 8 = 2.08, and less than a quarter of ln 16 = 2.77."""
    again, new = [[range(8)] * 2] * 2, [[range(8), range(8, 16)]] * 2
    last_task = [row | {"task": "1"} for row in rows([[1.0, 0.6]])]
    assert has_converged(last_task, again) is False
    assert has_converged(last_task, new) is True


def test_a_task_of_one_class_has_no_loss_of_guessing():
    assert has_converged(rows([[2.0, 1.0]]), [[[0]], [[1]]]) is None


@pytest.fixture
def marked(runs, tmp_path):
    """A run whose loss stays at that of guessing, and one that says nothing."""
    for name in ("FedAvg", "Local"):
        shutil.copytree(runs / name / "version_0", tmp_path / "runs" / name)
    classes = json.loads((tmp_path / "runs/FedAvg/results.json").read_text())["data"]["classes"]
    guess = math.log(len(classes[0][0]))
    with (tmp_path / "runs/FedAvg/rounds.csv").open("w", newline="") as file:
        found = rows([[1.2 * guess, guess]] * 2)
        writer = csv.DictWriter(file, found[0].keys())
        writer.writeheader()
        writer.writerows(found)
    return tmp_path / "runs"


def test_every_table_has_the_mark_and_its_footnote(marked, tmp_path, capsys):
    groups = grouped(read_runs([marked]))
    text = table_markdown(groups, ["a note"])
    assert "| FedAvg† | 1 |" in text and "| Local | 1 |" in text
    assert text.endswith(f"\n\n{NOT_CONVERGED}\n- a note\n")
    latex = table_latex(groups)
    assert r"FedAvg$^\dagger$ &" in latex and r"linewidth}}{$^\dagger$ not converged" in latex
    assert {row["run"]: row["converged"] for row in table_rows(groups)} == {"FedAvg": False, "Local": None}
    html = page(groups, [], [], tmp_path)
    assert "FedAvg†</th>" in html and f"<p>{NOT_CONVERGED}</p>" in html
    assert main(["report", str(marked)]) == 0
    assert NOT_CONVERGED in capsys.readouterr().out


def test_without_a_mark_there_is_no_footnote(runs, tmp_path):
    groups = grouped(read_runs([runs]))
    assert all("†" not in text for text in (table_markdown(groups), table_latex(groups)))
    assert "†" not in page(groups, [], [], tmp_path)


@pytest.mark.parametrize("text", ["task,round\n0,0\n", "task,round,client,train/cross_entropy\n0,0,9,1\n"])
def test_a_damaged_file_of_rounds_is_refused(marked, text):
    (marked / "FedAvg/rounds.csv").write_text(text)
    with pytest.raises(ValueError, match=r"rounds\.csv' does not fit the results\.json beside it"):
        read_run(marked / "FedAvg/results.json")
