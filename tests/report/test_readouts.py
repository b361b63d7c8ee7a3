"""Readouts beside own heads, wherever results are shown."""

import csv
import json
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from chromium import browser, find_browser
from fedlscl.callbacks.formatting import in_bytes, readout_table
from fedlscl.callbacks.results import results, write_results
from fedlscl.callbacks.tensorboard import TensorBoard
from fedlscl.federated.loggers import task_scalars
from fedlscl.federated.readout import ReadoutConfig
from fedlscl.report.groups import grouped, inequalities
from fedlscl.report.page import write_report
from fedlscl.report.plots import against_cost
from fedlscl.report.runs import read_runs
from fedlscl.report.table import table, table_markdown
from tiny_methods import METHODS

CONFIG = ReadoutConfig(heads=("lda", "ncm"), features=("adapted",))


@pytest.fixture(scope="module")
def with_readouts(federate):
    return federate(METHODS["LoRM"](), readouts=CONFIG)


@pytest.fixture(scope="module")
def folder(with_readouts, federate, tmp_path_factory):
    """A run with readouts, and one without."""
    out = tmp_path_factory.mktemp("runs")
    for name, trainer in (("LoRM", with_readouts), ("FedNCM", federate(METHODS["FedNCM"]()))):
        trainer.run.run_dir = out / name / "version_0"
        trainer.run.run_dir.mkdir(parents=True)
        write_results(trainer.run)
    return out


def expected(trainer, name, mask):
    return 100 * trainer.run.readouts.values[name][mask, :, -1].mean().item()


def test_results_have_every_readout_and_its_bytes_apart(folder, with_readouts):
    found = json.loads((folder / "LoRM/version_0/results.json").read_bytes())
    assert list(found["readouts"]) == ["adapted/lda", "adapted/ncm"]
    last = [client[1] for client in found["readouts"]["adapted/ncm"]["class_il"]]
    assert last == with_readouts.run.readouts.values["adapted/ncm"][1, :, 1].tolist()
    assert found["traffic"]["readout_up_bytes"] == int(with_readouts.run.readouts.traffic["up"].sum()) > 0
    assert found["traffic"]["up_bytes"] == int(with_readouts.run.traffic["up"].sum())
    plain = json.loads((folder / "FedNCM/version_0/results.json").read_bytes())
    assert "readouts" not in plain and "readout_up_bytes" not in plain["traffic"]


def test_tables_show_own_and_readouts_side_by_side(folder, with_readouts):
    groups = grouped(read_runs([folder]))
    titles = table(groups).header
    at = titles.index("own class-IL %")
    assert titles[at : at + 3] == ["own class-IL %", "adapted/lda class-IL %", "adapted/ncm class-IL %"]
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in
            table_markdown(groups).splitlines()[2:]}  # fmt: skip
    assert rows["LoRM"][at + 2] == f"{expected(with_readouts, 'adapted/ncm', 1):.1f}"
    assert rows["FedNCM"][at + 1 : at + 3] == ["–", "–"]


def test_without_readouts_tables_are_as_they_were(folder):
    groups = grouped(read_runs([folder / "FedNCM"]))
    assert not any(title.startswith("own ") or "readout" in title for title in table(groups).header)


def test_the_report_draws_accuracy_against_bytes_for_every_readout(folder, tmp_path):
    write_report([folder], tmp_path)
    drawn = {path.stem for path in tmp_path.glob("*_adapted_*.svg")}
    assert {stem.split("_adapted_")[1] for stem in drawn} == {
        f"{head}_{mask}" for head in ("lda", "ncm") for mask in ("class_il", "task_il")
    }
    with (tmp_path / "table.csv").open() as file:
        by_run = {row["run"]: row for row in csv.DictReader(file)}
    assert float(by_run["LoRM"]["readouts/adapted/lda/task_il mean"]) <= 1
    assert by_run["FedNCM"]["readouts/adapted/lda/task_il mean"] == ""
    assert "Accuracy of adapted/lda against uploaded bytes" in (tmp_path / "index.html").read_text()


def test_the_terminal_and_loggers_show_them(with_readouts):
    rows = readout_table(results(with_readouts.run))
    assert rows[0] == ["average", "task", "own", "adapted/lda", "adapted/ncm"]
    assert rows[-1][4] == f"{expected(with_readouts, 'adapted/ncm', 1):.1f}"
    scalars = task_scalars(with_readouts.run)
    assert scalars["readout_class_il/adapted/ncm"] == pytest.approx(expected(with_readouts, "adapted/ncm", 1) / 100)


def test_damaged_readouts_are_refused(folder, tmp_path):
    found = json.loads((folder / "LoRM/version_0/results.json").read_bytes())
    del found["readouts"]["adapted/lda"]["task_il"]
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"readouts.adapted/lda.task_il must be given"):
        read_runs([tmp_path])


def test_rows_with_different_readouts_are_named(folder):
    assert "Readouts: none (FedNCM) and adapted/lda, adapted/ncm (LoRM)." in inequalities(grouped(read_runs([folder])))


def test_a_readout_is_drawn_beside_the_own_head_at_the_bytes_of_both(folder, with_readouts):
    words = against_cost(grouped(read_runs([folder])), "up_bytes", "class_il", readout="adapted/ncm").alt
    sent = int(with_readouts.run.traffic["up"].sum())
    both = sent + int(with_readouts.run.readouts.traffic["up"].sum())
    own = 100 * with_readouts.run.matrix.of("class_il")[:, -1].mean().item()
    assert f"LoRM {own:.1f} % at {in_bytes(sent)}, " in words
    assert f"LoRM with the readout {expected(with_readouts, 'adapted/ncm', 1):.1f} % at {in_bytes(both)}" in words
    assert "FedNCM " in words and "FedNCM with the readout" not in words


def test_tensorboard_has_a_chart_of_the_readouts(with_readouts, tmp_path):
    """Its patterns match tags of the run; a run without readouts has no such chart."""
    run, writer = with_readouts.run, TensorBoard()
    folder, position = run.run_dir, run.progress
    run.run_dir, run.progress = tmp_path, type(position)(0, 0)
    try:
        writer.on_fit_start(run)
        run.progress = position
        writer.log(task_scalars(run), 1)
        writer.writer.close()
    finally:
        run.run_dir, run.progress = folder, position
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (charts,) = [category.chart for category in layout.category if category.title == "Own head and readouts"]
    tags = events.Tags()["scalars"]
    for chart in charts:
        found = [[tag for tag in tags if re.match(pattern, tag)] for pattern in chart.multiline.tag]
        assert list(map(len, found)) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_the_pictures_of_readouts(folder, tmp_path, width):
    if (path := find_browser()) is None:
        pytest.skip("neither Chromium nor Chrome is on the PATH")
    write_report([folder], tmp_path)
    with browser(path) as tab:
        tab.open((tmp_path / "index.html").as_uri(), width)
        found = tab.run("""({
            sizes: [...document.querySelectorAll('figure svg')].map(p => p.getBoundingClientRect().width),
            headings: [...document.querySelectorAll('h2')].map(h => h.textContent),
            titles: [...document.querySelectorAll('#comparison thead th')].map(h => h.textContent),
            overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        })""")
        assert tab.complaints == [] and found["overflow"] <= 0 and np.min(found["sizes"]) > 150
        assert "Accuracy of adapted/ncm against uploaded bytes" in found["headings"]
        assert {"own class-IL %", "adapted/ncm task-IL %", "readouts up MB"} <= set(found["titles"])
