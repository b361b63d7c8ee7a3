import json
import re
import time
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Message

from absences import leave_out
from fedlscl.callbacks.results import write_results
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.data.loader import names_hash
from fedlscl.federated.checkpoint import load_checkpoint
from fedlscl.federated.method import Progress
from fedlscl.federated.readout import ReadoutConfig
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.flower import server
from fedlscl.flower.apps import to_record
from fedlscl.flower.federation import Federation
from fedlscl.flower.messages import Command, Description
from fedlscl.flower.server import FlowerPool, class_error, parse_description, parse_result
from tiny_methods import METHODS

ALL = sorted(set(METHODS) - {"Joint", "JointLSCL"})


def values(trainer):
    return trainer.matrix.values.nan_to_num(-1)


def same_run(served, trainer):
    """All that the server knows is what the simulation knows, to the bit."""
    assert torch.equal(values(served), values(trainer))
    assert all(torch.equal(served.run.traffic[name], trainer.run.traffic[name]) for name in trainer.run.traffic)


def same_files(served, trainer):
    """Results as ``fedlscl fit`` writes them; what is trained at the moment, at what effort, nodes alone know."""
    trainer.run.run_dir = served.run_dir / "simulated"
    trainer.run.run_dir.mkdir()
    write_results(trainer.run)
    assert (trainer.run.run_dir / "matrix.csv").read_bytes() == (served.run_dir / "matrix.csv").read_bytes()
    found, wanted = (json.loads((path / "results.json").read_bytes()) for path in (served.run_dir, trainer.run.run_dir))
    for result in (found, wanted):
        del result["parameters"]["trainable"]
        result.pop("flops_per_image", None)
    assert found == wanted


@pytest.mark.parametrize("name", ALL)
def test_every_method_ends_as_in_simulation(name, network, federate):
    rounds = 2 if name == "FedLSCL" else 1
    served = network(METHODS[name](), rounds_per_task=rounds).fit()
    trainer = federate(METHODS[name](), rounds_per_task=rounds)
    same_run(served, trainer)
    same_files(served, trainer)


def test_results_of_nodes_name_validation_images_as_those_of_a_simulation_do(network, federate, make_data):
    def data(**own):
        return make_data(validation_per_class=3, evaluate_on="validation", **own)

    served = network(METHODS["FedNCM"](), data=data).fit()
    trainer = federate(METHODS["FedNCM"](), data())
    same_run(served, trainer)
    same_files(served, trainer)
    assert served.run.data["evaluated_on"] == "validation"


class Killed(Exception):
    """Stands for SIGKILL."""


def small():
    return METHODS["FedAvg"]()


@pytest.fixture(scope="module")
def undisturbed(federate):
    """Two tasks of a round in simulation."""
    return federate(small())


def test_letters_lost_doubled_and_failed_change_nothing(network, undisturbed):
    made = network(small())
    count = 0

    def fault(node, message):
        nonlocal count
        count += 1
        return ("error", "twice", None)[count % 3]

    made.grid.fault = fault
    same_run(made.fit(), undisturbed)
    assert any("node was killed" in line for line in made.said)


@pytest.mark.parametrize(
    ("where", "round_"),
    [("before_aggregation", 0), ("before_aggregation", 1), ("before_checkpoint", 1), ("after_checkpoint", 0)],
)
def test_a_server_that_is_killed_goes_on(network, undisturbed, monkeypatch, where, round_):
    made = network(small())
    with monkeypatch.context() as patched:
        kill_server(patched, where, round_)
        with pytest.raises(Killed):
            made.fit()
    same_run(made.fit(), undisturbed)
    assert any("resuming after" in line for line in made.said)


def kill_server(patched, where, round_):
    """Raise at one point of the n-th round."""
    calls = {"rounds": 0}

    def counted(name, after):
        original = getattr(FederatedTrainer, name)

        def method(self, *arguments):
            if after:
                original(self, *arguments)
            if name == "_server_step" or arguments[0] != Progress(0, 0):
                calls["rounds"] += 1
                if calls["rounds"] == round_ + 1:
                    raise Killed
            return None if after else original(self, *arguments)

        patched.setattr(FederatedTrainer, name, method)

    counted(
        *{
            "before_aggregation": ("_server_step", False),
            "before_checkpoint": ("_server_step", True),
            "after_checkpoint": ("save", True),
        }[where]
    )


@pytest.mark.parametrize("where", ["after_checkpoint", "before_checkpoint"])
def test_a_server_goes_back_one_checkpoint_and_the_nodes_follow(network, undisturbed, monkeypatch, where):
    """Also where they are one request ahead of it."""
    made = network(small())
    with monkeypatch.context() as patched:
        kill_server(patched, where, 1)
        with pytest.raises(Killed):
            made.fit()
    path = made.folder / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    same_run(made.fit(), undisturbed)


def test_a_node_that_is_away_misses_its_round_as_in_simulation(network, federate):
    made = network(small(), rounds_per_task=2)
    away = {"left": True}

    def fault(node, message):
        # Node 11's letter of the second round is lost for good.
        is_letter = message.metadata.message_type == "train"
        return (
            "lost"
            if is_letter and node == 11 and made.said and "round 1" in made.said[-1] and away.pop("left", 0)
            else None
        )

    made.grid.fault = fault
    served = made.fit(deadline=3.0)
    absences = frozenset({(1, 0, 1)})
    trainer = FederatedTrainer(rounds_per_task=2, accelerator="cpu")
    leave_out(trainer, absences)
    trainer.fit(small(), made.federation().datamodule)
    same_run(served, trainer)
    assert json.loads((served.run_dir / "network.json").read_text())[1]["missed"] == [1]


def test_a_round_ends_with_its_deadline(network):
    made = network(small())
    made.grid.fault = lambda node, message: "lost" if node == 11 else None
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"clients \[1\] were not tested"):
        made.fit(deadline=1.5)
    # Two rounds and the end.
    assert 4.5 <= time.monotonic() - began < 4.5 + 3


def test_too_few_clients_stop_the_run_and_it_goes_on_when_they_are_back(network, undisturbed):
    made = network(small(), quorum=2)
    made.grid.offline = {11}
    with pytest.raises(ValueError, match="quorum 2 is not met: 1 of 2 clients answered in task 1, round 1"):
        made.fit(deadline=0.5)
    made.grid.offline = set()
    same_run(made.fit(), undisturbed)


def test_a_client_that_sends_nonsense_is_left_out_with_a_reason(network):
    made = network(small())
    app = made.grid.app

    def lying(message, context):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            return Message(to_record(b"nonsense"), reply_to=message)
        return app(message, context)

    made.grid.app = lying
    with pytest.raises(ValueError, match=r"clients \[1\] were not tested"):
        made.fit()
    state = load_checkpoint(made.folder / "run" / "checkpoint.pt")
    assert {refusal["client"] for refusal in state["validator"]["rejected"]} == {1}
    assert "cut short" in state["validator"]["rejected"][0]["reason"]


def test_nonsense_after_the_last_round_rejects_no_upload(network, undisturbed, monkeypatch):
    """All uploads were used: the results are those of a simulation when the client answers properly."""
    made = network(small())
    app, finish, at_end = made.grid.app, FlowerPool.finish, []

    def lying(message, context):
        if at_end and message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            return Message(to_record(b"nonsense"), reply_to=message)
        return app(message, context)

    made.grid.app = lying
    with monkeypatch.context() as patched:
        patched.setattr(FlowerPool, "finish", lambda self, save: at_end.append(True) or finish(self, save))
        with pytest.raises(ValueError, match=r"clients \[1\] were not tested"):
            made.fit()
    assert load_checkpoint(made.folder / "run" / "checkpoint.pt")["validator"]["rejected"] == []
    made.grid.app = app
    same_run(made.fit(), undisturbed)


NAMES = ["benign", "cyst", "h\u00e9althy", "malignant"]
"""One of them has two Unicode forms."""


def hospital(folder, names):
    """A data set of four or five classes under a node's own names, in a folder of the node's own."""
    folder.mkdir(exist_ok=True)
    labels = np.arange(len(names)).repeat(8)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 16, 16, 3), np.uint8)
    train, test = ({f"{part}_images": images, f"{part}_labels": labels} for part in ("train", "test"))
    np.savez(folder / "scans.npz", **train, **test, class_names=np.array(names))


@pytest.fixture
def hospitals(network, tmp_path):
    """A network whose node i has the data of ``tmp_path/i``."""

    def data(root="0"):
        classes = {"protocol": "global", "private_classes": 0, "public_classes": 4}
        place = {"dataset": "scans.npz", "root": str(tmp_path / root)}
        return SpatialTemporalDataModule(**place, **classes, num_clients=2, num_tasks=1, batch_size=8)

    hospital(tmp_path / "0", NAMES)
    hospital(tmp_path / "1", NAMES)
    made = network(small(), data=data)
    for index, context in enumerate(made.grid.contexts.values()):
        context.node_config["data-root"] = str(index)
    return made


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (NAMES[::-1], "class_names must have the hash"),
        ([*NAMES[:3], "melanoma"], "class_names must have the hash"),
        ([*NAMES, "other"], "num_classes must be 4 as on the other nodes, got 5"),
    ],
)
def test_a_node_with_other_classes_is_left_out_until_they_are_corrected(hospitals, names, said):
    hospital(hospitals.folder / "1", names)
    with pytest.raises(ValueError, match=r"clients \[1\] were not tested.*correct what the log says of them"):
        hospitals.fit()
    (line, *_) = [line for line in hospitals.said if "left out" in line]
    assert line.startswith(f"client 1 is left out: {said}")
    state = load_checkpoint(hospitals.folder / "run" / "checkpoint.pt")
    assert {refusal["client"] for refusal in state["validator"]["rejected"]} == {1}
    assert state["traffic"]["up"][1].sum() == 0 < state["traffic"]["up"][0].sum()
    hospital(hospitals.folder / "1", NAMES)
    assert not hospitals.fit().matrix.values[:, 1].isnan().all()


def test_unicode_forms_and_trailing_spaces_of_names_do_not_divide_nodes(hospitals):
    hospital(hospitals.folder / "1", [unicodedata.normalize("NFD", name) for name in NAMES[:3]] + ["malignant "])
    hospitals.fit()
    assert not any("left out" in line for line in hospitals.said)


def test_sampled_clients_end_as_in_simulation(network, federate):
    options = {"rounds_per_task": 2, "participation": 0.5, "failure_rate": 0.2, "quorum": 0}
    same_run(network(small(), **options).fit(), federate(small(), **options))


def test_a_server_once_in_a_task_ends_as_in_simulation(network, federate):
    options = {"rounds_per_task": 2, "server_every": "task"}
    same_run(network(small(), **options).fit(), federate(small(), **options))


def test_another_configuration_does_not_go_on_in_the_same_folder(network):
    made = network(small())
    made.fit()
    other = replace(made.federation(), identity="other")
    with pytest.raises(ValueError, match="contains another run: choose another folder"):
        server.run_server(other, None, made.folder / "run")


@pytest.mark.parametrize("name", ["Joint", "JointLSCL"])
def test_oracles_are_refused_in_one_line(name, network):
    with pytest.raises(ValueError, match=f"method must not pool the data of all clients, got {name}: use fedlscl fit"):
        network(METHODS[name]())


def test_secure_sums_end_as_in_simulation(network, federate):
    """Keys drawn from the seed, so that both runs mask alike."""
    secure = {"secure_sum": True, "secrets": "seed"}
    options = {"rounds_per_task": 2}
    made = network(replace(METHODS["FedLSCL"](), **secure), **options)
    same_run(made.fit(), federate(replace(METHODS["FedLSCL"](), **secure), **options))


READOUTS = {"readouts": ReadoutConfig(heads=("lda", "ncm"), features=("adapted", "frozen")), "rounds_per_task": 2}


def same_readouts(served, trainer):
    same_run(served, trainer)
    found, wanted = served.run.readouts, trainer.run.readouts
    assert found.values.keys() == wanted.values.keys() == set(wanted.names)
    assert all(
        torch.equal(found.values[name].nan_to_num(-1), wanted.values[name].nan_to_num(-1)) for name in wanted.names
    )
    assert all(torch.equal(found.traffic[name], wanted.traffic[name]) for name in wanted.traffic)


@pytest.fixture(scope="module")
def read_out(federate):
    """A run with readouts in simulation."""
    return federate(METHODS["LoRM"](), **READOUTS)


def test_readouts_are_those_of_the_simulation(network, read_out):
    served = network(METHODS["LoRM"](), **READOUTS).fit()
    same_readouts(served, read_out)


@pytest.mark.parametrize("number", range(8))
def test_a_server_that_is_killed_at_any_exchange_gets_the_same_readouts(network, read_out, monkeypatch, number):
    made = network(METHODS["LoRM"](), **READOUTS)
    exchange, left = FlowerPool._exchange, [number]

    def killed_after(self, *arguments, **named):
        found = exchange(self, *arguments, **named)
        left[0] -= 1
        if left[0] == -1:
            raise Killed
        return found

    with monkeypatch.context() as patched:
        patched.setattr(FlowerPool, "_exchange", killed_after)
        if number < 7:
            with pytest.raises(Killed):
                made.fit()
    same_readouts(made.fit(), read_out)


def test_a_node_without_sums_is_left_out_of_the_readouts_and_comes_back(network, monkeypatch):
    """One client's sums of the first task are missing, which the results state."""
    made = network(METHODS["LoRM"](), **READOUTS)
    exchange, away = FlowerPool._exchange, []

    def watched(self, asked, *given, **named):
        kind = self.pending[asked[0]].commands[-1].kind
        away.append(kind == "readout_sums" and "readout_sums" not in away)
        found = exchange(self, asked, *given, **named)
        away[-1] = kind
        return found

    monkeypatch.setattr(FlowerPool, "_exchange", watched)
    made.grid.fault = lambda node, message: "lost" if node == 10 and away[-1] is True else None
    served = made.fit(deadline=1.0)
    reasons = [rejected.reason for rejected in served.run.rejected]
    assert reasons == ["its sums of features did not arrive in time"]
    assert all(not found[:, :, 1].isnan().any() for found in served.run.readouts.values.values())


def test_heads_of_two_tasks_wait_side_by_side(pool):
    """A client that misses a whole task evaluates the heads of each task."""
    for task in range(2):
        pool.evaluate_readouts(Progress(task, 0), {"adapted/ncm.bias": torch.full((2,), task)})
    assert [float(command.payload["adapted/ncm.bias"][0]) for command in pool.pending[0].commands] == [0.0, 1.0]
    restored = FlowerPool(pool.federation, None)
    restored._update_run = lambda: None
    restored.load_state_dict(pool.state_dict(), Progress(0, 0))
    assert restored.pending == pool.pending


def description(*names):
    return Description(len(names), "f" * 64, names_hash(names), [0], 4, 2)


AB, BA, ABC = description("a", "b"), description("b", "a"), description("a", "b", "c")


@pytest.fixture
def pool(make_data):
    return FlowerPool(Federation(METHODS["FedAvg"](), make_data(), FederatedTrainer(accelerator="cpu"), 42, "id"), None)


@pytest.mark.parametrize(
    ("said", "expected"),
    [([AB], AB), ([BA, AB, AB], AB), ([ABC, AB, BA, ABC], ABC), ([AB, BA], AB), ([BA, AB], BA), ([], None)],
)
def test_most_clients_decide_and_the_lowest_in_a_tie(pool, said, expected):
    assert pool._reference(said) == expected


def test_what_was_accepted_first_stays(pool):
    pool.descriptions[1][0] = BA
    assert pool._reference([AB, AB, AB]) == BA and pool.stream.num_classes == 2
    assert pool._reference([AB]) == BA


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (BA, "class_names must have the hash .* of the other nodes, got .*: give every node the same classes"),
        (description("a", "melanoma"), "class_names must have the hash"),
        (description("a", "B"), "class_names must have the hash"),
        (ABC, "num_classes must be 2 as on the other nodes, got 3: give every node the same classes"),
    ],
)
def test_other_classes_are_refused(found, message):
    assert re.match(message, class_error(found, AB))


def test_unicode_form_and_trailing_space_are_accepted():
    assert class_error(description("e\u0301", "b "), description("\u00e9", "b")) == ""


@pytest.mark.parametrize(
    "changed",
    [{"class_names": None}, {"class_names": "a" * 63}, {"class_names": ["a"]}, {"fingerprint": 3}, {"classes": [2]}],
)
def test_a_malformed_description_is_refused(changed):
    assert parse_description(AB._asdict()) == AB
    with pytest.raises(ValueError, match=r"malformed: use the same version|its classes must be in \[0, 1\]"):
        parse_description(AB._asdict() | changed)


@pytest.mark.parametrize(
    ("kind", "result", "reason"),
    [
        ("upload", {}, "must have class counts and a payload of tensors"),
        ("upload", {"payload": {"w": 1}, "class_counts": torch.ones(2)}, "must have class counts"),
        ("readout_sums", {"payload": {}, "class_counts": [1]}, "must have class counts"),
        ("test_after", {}, r"must have shape \(2, 1\)"),
        ("test_before", {"accuracies": torch.ones(2, 1, dtype=torch.int64)}, r"must be in \[0, 1\]"),
        ("readout", {"adapted/ncm": torch.full((2, 1), torch.nan)}, r"must be in \[0, 1\]"),
    ],
)
def test_a_malformed_result_is_refused(kind, result, reason):
    with pytest.raises(ValueError, match=reason):
        parse_result(0, Command(1, kind, 0, 0), result, ["adapted/ncm"])
