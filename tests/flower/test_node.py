import json

import pytest
import torch

from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.flower.federation import Federation
from fedlscl.flower.messages import Command, Request, pack, read_reply
from fedlscl.flower.node import Node
from tiny_methods import METHODS

BEGIN, TRAIN, UPLOAD = (Command(n, kind, 0, 0) for n, kind in enumerate(("begin_task", "train", "upload"), start=1))
LETTER = Request(0, "ab", "id", 0, [BEGIN, TRAIN, UPLOAD])


def sent(letter=LETTER, **changed):
    return pack(letter._replace(**changed)._asdict())


@pytest.fixture
def node(make_data, tmp_path):
    """Client 0, built anew with every call as in a new process."""

    def make(name="FedAvg", identity="id", index=0, **data):
        trainer = FederatedTrainer(rounds_per_task=1, accelerator="cpu")
        return Node(Federation(METHODS[name](), make_data(**data), trainer, 42, identity), index, tmp_path)

    return make


def test_a_letter_that_comes_again_gets_the_same_reply_and_nothing_is_done(node, tmp_path, monkeypatch):
    first = node().answer(sent())
    state = (tmp_path / "ab.pt").read_bytes()
    monkeypatch.setattr(Node, "_client", lambda *_: pytest.fail("was done again"))
    assert node().answer(sent()) == first
    assert (tmp_path / "ab.pt").read_bytes() == state


def test_a_node_that_lost_its_reply_before_it_was_saved_does_the_same_again(node, tmp_path):
    first = node().answer(sent())
    (tmp_path / "ab.pt").unlink()
    assert node().answer(sent()) == first


def test_commands_of_one_letter_are_those_of_several(node, tmp_path):
    whole = read_reply(node().answer(sent()))
    (tmp_path / "ab.pt").unlink()
    for number in (1, 2, 3):
        reply = read_reply(node().answer(sent(commands=LETTER.commands[:number])))
    payloads = [result.results[-1]["payload"] for result in (whole, reply)]
    assert payloads[0].keys() == payloads[1].keys()
    assert all(torch.equal(payloads[0][name], payloads[1][name]) for name in payloads[0])


def test_only_upload_counts_and_accuracies_leave_a_node(node, make_data):
    tests = [Command(4, "test_before", 0, 0), Command(5, "end_task", 0, 0), Command(6, "test_after", 0, 0)]
    results = read_reply(node("FedNCM").answer(sent(commands=[*LETTER.commands, *tests]))).results
    assert [list(result) for result in results] == [
        ["num_classes", "fingerprint", "class_names", "classes", "train_samples", "test_samples"],
        [],
        ["payload", "class_counts"],
        ["accuracies"],
        [],
        ["accuracies"],
    ]
    assert results[0]["classes"] == make_data().stream(0).classes(0).tolist()
    assert results[3]["accuracies"].shape == results[5]["accuracies"].shape == (2, 1)


@pytest.mark.parametrize(
    ("letter", "reason"),
    [
        (LETTER._replace(identity="other"), "client 0 has another configuration"),
        (LETTER._replace(client=1), "client of the request must be 0, got 1"),
        (LETTER._replace(run="../x"), "run must be 1 to 64 hexadecimal digits"),
        (LETTER._replace(acknowledged=3), "is missing: restore it, or start a new run"),
        (LETTER._replace(commands=[Command(1, "erase", 0, 0)]), "command 'erase' is unknown"),
    ],
)
def test_what_a_node_cannot_accept_comes_back_in_one_line(node, tmp_path, letter, reason):
    reply = read_reply(node().answer(sent(letter)))
    assert reason in reply.refusal and not reply.results
    assert not list(tmp_path.glob("*.pt"))


def test_nonsense_is_refused(node):
    for data in (b"", b"nonsense", pack({"client": 0}), pack([])):
        assert read_reply(node().answer(data)).refusal


def test_a_server_from_before_the_last_checkpoint_is_refused(node):
    letters = [sent(commands=LETTER.commands[n : n + 1], acknowledged=n) for n in range(3)]
    replies = [node().answer(letter) for letter in letters]
    # One step back is kept for it, two are not.
    assert not read_reply(replies[2]).refusal and [node().answer(letter) for letter in letters[1:]] == replies[1:]
    assert "too old" in read_reply(node().answer(letters[0])).refusal


@pytest.mark.parametrize("changed", [{"round": 1}, {"kind": "test_before"}, {"payload": {"w": torch.ones(1)}}])
def test_a_number_never_stands_for_another_command(node, changed):
    """A server that resumes from its previous checkpoint may number otherwise."""
    node().answer(sent())
    commands = [BEGIN, TRAIN._replace(**changed), UPLOAD]
    assert "too old" in read_reply(node().answer(sent(commands=commands))).refusal


@pytest.mark.parametrize("changed", [{"train_per_class": 7}, {"private_classes": 1, "num_tasks": 1}])
def test_a_node_does_not_continue_on_other_data_or_another_split(node, changed):
    first = LETTER._replace(commands=[BEGIN])
    node().answer(sent(first))
    # As long as the server has accepted nothing, corrected data begin again.
    fresh = read_reply(node(**changed).answer(sent(first)))
    assert not fresh.refusal and fresh.results[0]["classes"]
    assert not read_reply(node().answer(sent(first))).refusal
    refused = read_reply(node(**changed).answer(sent(acknowledged=1)))
    assert refused.refusal.startswith("the data of client 0 must not change during a run: restore its images")
    assert not read_reply(node().answer(sent(acknowledged=1))).refusal


def test_every_run_has_a_state_of_its_own(node, tmp_path):
    replies = [node().answer(sent(run=run)) for run in ("ab", "cd")]
    assert replies[0] == replies[1]
    assert {path.name for path in tmp_path.glob("*.pt")} == {"ab.pt", "cd.pt"}


def test_a_partition_that_does_not_exist_is_refused(node):
    with pytest.raises(ValueError, match="partition-id must be in \\[0, 1\\], got 2"):
        node(index=2)


def test_a_node_needs_its_own_samples_only(node, make_data, tmp_path):
    """Client 0 with an .npz of its own and a manifest in which the others have nothing."""
    import numpy as np

    from fedlscl.data import ClientSplit, SpatialTemporalDataModule
    from fedlscl.data.split import save_manifest

    whole = make_data()
    stream = whole.stream(0)
    train = torch.cat([stream.train_ids(task) for task in range(2)])
    test = torch.cat([stream.test_ids(task) for task in range(2)]).unique()
    # Of other classes the file has a black image, which the manifest does not name.
    black, classes = np.zeros((6, 16, 16, 3), np.uint8), np.arange(6)
    arrays = {}
    for part, ids in (("train", train), ("test", test)):
        images = whole.fetch(ids).images.permute(0, 2, 3, 1).numpy()
        arrays[f"{part}_images"] = np.concatenate([images, black])
        arrays[f"{part}_labels"] = np.concatenate([whole.data.labels(ids).numpy(), classes])
    np.savez(tmp_path / "own.npz", **arrays, class_names=np.array([f"c{i}" for i in range(6)]))
    own = {"dataset": "own.npz", "root": str(tmp_path), "num_clients": 2, "num_tasks": 2, "batch_size": 8}
    data = SpatialTemporalDataModule(**own).data
    place = {int(i): n for n, i in enumerate(train)} | {int(i): len(train) + 6 + n for n, i in enumerate(test)}

    def moved(parts):
        return tuple(np.array([place[int(i)] for i in ids], dtype=np.int64) for ids in parts)

    split = whole.splits[0]
    mine = ClientSplit(split.classes, moved(split.train), moved(split.test))
    nothing = tuple(np.array([], dtype=np.int64) for _ in range(2))
    others = ClientSplit(whole.splits[1].classes, nothing, nothing)
    save_manifest(tmp_path / "own.json", [mine, others], data.class_names, data.fingerprint, {})
    trainer = FederatedTrainer(rounds_per_task=1, accelerator="cpu")
    datamodule = SpatialTemporalDataModule(**own, manifest=str(tmp_path / "own.json"))
    alone = Node(Federation(METHODS["FedAvg"](), datamodule, trainer, 42, "id"), 0, tmp_path / "alone")
    found, wanted = (read_reply(each.answer(sent())).results[2]["payload"] for each in (alone, node()))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((tmp_path / "own.json").read_text())["clients"][1][0]["train"] == []
