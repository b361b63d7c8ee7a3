import csv
import io
import json
import math

import pytest
import torch
from rich.console import Console

from fedlscl.callbacks.formatting import aligned, print_table, results_table
from fedlscl.callbacks.results import results
from fedlscl.federated.metrics import plain, round_rows, to_csv, to_json
from fedlscl.methods import FedAvg, FedNCM

FILES = ("results.json", "matrix.csv", "rounds.csv")


@pytest.fixture(scope="session")
def record(whole):
    return json.loads((whole.folder / "results.json").read_text())


def rows(folder, name):
    return list(csv.DictReader(io.StringIO((folder / name).read_text())))


def test_results_say_what_was_run(record, whole, collaborator_config):
    assert record["method"]["name"] == "FedLSCL"
    assert record["method"]["fields"]["collaborator"]["foundation"]["name"] == collaborator_config.foundation.name
    assert record["seed"] == 42 and record["tasks_done"] == 2
    assert record["data"]["fingerprint"] == whole.trainer.clients[0].data.data.fingerprint
    assert record["data"]["classes"][1][0] == whole.trainer.clients[1].data.classes(0).tolist()
    assert record["foundation"]["fingerprint"] == whole.trainer.clients[0].net.foundation.fingerprint
    assert set(record["versions"]) == {"fedlscl", "torch", "lightning", "timm"}


def test_parameters_count_the_foundation_once(record, whole):
    net = whole.trainer.clients[0].net
    own = sum(p.numel() for p in net.parameters())
    foundation = sum(p.numel() for p in net.foundation.vit.parameters())
    assert record["parameters"]["foundation"] == foundation
    assert record["parameters"]["trainable"] == [own, own]
    assert record["parameters"]["total"] == [foundation + own] * 2


def test_uploaded_parameters_are_counted(foundation_config, observe):
    trainer = observe(FedAvg(foundation=foundation_config, local_epochs=1)).trainer
    head = trainer.clients[0].net.head
    assert results(trainer.run)["parameters"]["uploaded_per_round"] == [head.weight.numel() + head.bias.numel()] * 2


def test_results_hold_matrix_summary_and_traffic(record, whole):
    after = torch.tensor(
        [[[v if v is not None else math.nan for v in n] for n in c] for c in record["accuracy"]["after"]["class_il"]]
    )
    torch.testing.assert_close(after.double(), whole.trainer.matrix.of("class_il").float().double(), equal_nan=True)
    assert record["schema"] == 2
    assert len(record["summary"]) == 2 and record["summary"][1]["class_il/average"] <= 1
    assert record["clients"]["class_il"]["worst_average"] == min(record["clients"]["class_il"]["average"])
    assert record["traffic"]["up_bytes"] == int(whole.trainer.run.traffic["up"].sum()) > 0
    assert record["traffic"]["down"] == whole.trainer.run.traffic["down"].tolist()


def test_matrix_csv_repeats_every_accuracy_exactly(whole):
    table = rows(whole.folder, "matrix.csv")
    assert len(table) == 2 * 2 * 2 * 3  # phases, masks, clients; one task after the first, two after the second
    for row in table:
        matrix = whole.trainer.matrix.of(row["mask"], row["phase"])
        assert float(row["accuracy"]) == matrix[int(row["client"]), int(row["after_task"]), int(row["task"])]


def test_rounds_csv_has_bytes_and_loss_terms_of_each_stage(whole):
    table = rows(whole.folder, "rounds.csv")
    assert len(table) == 2 * 2 * 2  # tasks, rounds, clients
    assert all(float(row["collaborative/cross_entropy"]) >= 0 and int(row["bytes_up"]) > 0 for row in table)
    assert [row["continual/lora"] != "" for row in table] == [False] * 4 + [True] * 4


def test_costs_add_up(whole):
    costs = json.loads((whole.folder / "costs.json").read_text())
    assert {"collaborative", "continual", "server", "evaluation"} == set(costs["seconds"])
    assert sum(costs["seconds"].values()) <= costs["total_seconds"]
    assert costs["images"] >= sum(
        map(sum, json.loads((whole.folder / "results.json").read_text())["data"]["train_samples"])
    )
    assert costs["peak_memory_bytes"]["host"] > 1e6
    assert [r["round"] for r in costs["sessions"][0]["rounds"]] == [0, 1, 0, 1]


@pytest.mark.parametrize("name", FILES)
def test_an_interrupted_run_ends_with_equal_bytes(name, whole, resumed):
    assert (resumed[1].folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_costs_of_all_sessions_are_kept(resumed):
    costs = json.loads((resumed[1].folder / "costs.json").read_text())
    assert [session["first_step"] for session in costs["sessions"]] == [0, 3]
    assert costs["total_seconds"] == sum(session["total_seconds"] for session in costs["sessions"])


def test_resuming_a_complete_run_changes_no_result(whole, observe, make_method, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((whole.folder / "checkpoint.pt").read_bytes())
    observe(make_method(), tmp_path, resume=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole.folder / name).read_bytes()


def test_without_a_folder_nothing_is_written(observe, foundation_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = observe(FedAvg(foundation=foundation_config, local_epochs=1)).trainer
    assert not list(tmp_path.iterdir())
    assert results(trainer.run)["foundation"]["name"] == foundation_config.name


def test_state_of_a_method_is_no_field(foundation_config, observe):
    record = results(observe(FedNCM(foundation=foundation_config)).trainer.run)
    assert "sums" not in record["method"]["fields"]
    assert json.loads(to_json(record)) == record


def test_plain_values_are_json():
    assert plain({1: (1.5, math.inf, None), "a": torch.float32}) == {"1": [1.5, None, None], "a": "torch.float32"}


def test_json_keeps_odd_strings_as_they_are():
    value = {"a": ["x\ny  [", "{ ]"], "b": [[1, 2], []], "c": "[\n 1 ]"}
    assert json.loads(to_json(value)) == value


def test_csv_writes_floats_exactly_and_leaves_gaps():
    history = [{"task": 0, "round": 0, "client": 1, "stage": "train", "terms": {"loss": 0.1 + 0.2}}]
    text = to_csv(round_rows({"up": [[[5]], [[6]]], "down": [[[7]], [[8]]]}, history, tasks=1))
    assert text == "task,round,client,bytes_up,bytes_down,train/loss\n0,0,0,5,7,\n0,0,1,6,8,0.30000000000000004\n"


def test_csv_has_a_row_for_rounds_in_which_the_server_trained():
    history = [
        {"task": 0, "round": 0, "client": -1, "stage": "synthesis", "terms": {"loss": loss}} for loss in (2.0, 1.5)
    ]
    text = to_csv(round_rows({"up": [[[5, 5]]], "down": [[[7, 7]]]}, history, tasks=1))
    rows = ["task,round,client,bytes_up,bytes_down,synthesis/loss", "0,0,0,5,7,", "0,0,-1,,,1.5", "0,1,0,5,7,", ""]
    assert text == "\n".join(rows)


def test_table_has_a_row_per_mask_and_task():
    names = ("current", "average", "average_before_aggregation", "forgetting", "worst_client")
    figures = {f"{mask}/{name}": 0.1 * i for mask in ("task_il", "class_il") for i, name in enumerate(names)}
    table = results_table({"summary": [figures, figures]})
    assert table[1] == ["task-IL", "1", "0.0", "10.0", "20.0", "30.0", "40.0"]
    assert [row[:2] for row in table[2:]] == [["task-IL", "2"], ["class-IL", "1"], ["class-IL", "2"]]


def test_plain_table_is_aligned():
    assert aligned([["name", "x"], ["a", "1.0"], ["b", "10.0"]]) == [
        "name     x",
        "----  ----",
        "a      1.0",
        "----  ----",
        "b     10.0",
    ]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_printed_table_names_the_files(whole, is_terminal):
    screen = io.StringIO()
    print_table(whole.trainer.run, Console(file=screen, force_terminal=is_terminal, width=80))
    text = screen.getvalue()
    assert ("\x1b[" in text) == is_terminal
    for words in (
        "FedLSCL on fake",
        "class-IL",
        "class-incremental: all classes seen so far compete",
        "worst client",
        "trainable of",
        "images/s",
        "tensorboard --logdir",
    ):
        assert words in text
    assert str(whole.folder / "results.json") in text
