import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.federated.method import Progress
from fedlscl.federated.payload import write_payload
from fedlscl.flower.messages import (
    BEGIN,
    DOWNLOAD,
    END,
    ROUND_KINDS,
    TENSOR,
    TEST_AFTER,
    TRAIN,
    UPLOAD,
    Command,
    PendingCommands,
    Reply,
    Request,
    pack,
    read_reply,
    read_request,
)

PAYLOAD = {"head.weight": torch.randn(3, 2), "head/odd": torch.tensor(2.5), "counts": torch.tensor([1, 2])}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_letters_and_replies_come_back_as_they_were():
    letter = Request(1, "ab", "id", 3, [Command(4, "train", 1, 0), Command(5, "download", 1, 0, PAYLOAD)])
    found = read_request(pack(letter._asdict()))
    assert found[:4] == letter[:4] and found.commands[0] == letter.commands[0]
    assert found.commands[1][:4] == letter.commands[1][:4] and same(found.commands[1].payload, PAYLOAD)
    found = read_reply(pack(Reply([{"a": [1], "x": {"y": torch.ones(2)}}, PAYLOAD])._asdict()))
    assert found.refusal == "" and found.results[0]["a"] == [1]
    assert same(found.results[0]["x"], {"y": torch.ones(2)}) and same(found.results[1], PAYLOAD)


def test_every_truncation_and_foreign_bytes_are_refused():
    data = pack(Reply([PAYLOAD])._asdict())
    canary = pickle.dumps(pytest.fail)
    for broken in [*(data[:length] for length in range(len(data))), canary, data + b"x"]:
        with pytest.raises(ValueError):
            read_reply(broken)
    with pytest.raises(ValueError, match="larger than 10"):
        read_reply(data, limit=10)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {"results": 5},
        {"results": [1]},
        {"results": [{}], "refusal": 1},
        {"results": [], "done": 1},
        {"results": torch.ones(1)},
        {"results": [torch.ones(1)]},
        torch.ones(1),
        {"results": [{"x": {TENSOR: "0"}}]},
        {"results": [{"x": {TENSOR: [0]}}]},
    ],
)
def test_a_malformed_header_is_refused(header):
    with pytest.raises(ValueError):
        read_reply(pack(header))


def test_a_tensor_is_used_once():
    """Else a short message could name gigabytes."""
    header = '{"results": [{"a": {"__tensor__": "0"}, "b": {"__tensor__": "0"}}]}'
    with pytest.raises(ValueError, match="not of fedlscl"):
        read_reply(write_payload({"0": torch.ones(2)}, {"fedlscl": header}))


ROUNDS = 2


class Doing:
    """A node that notes what it does and answers as `Node` does."""

    def __init__(self):
        self.done, self.did = 0, []

    def answer(self, commands):
        new = [command for command in commands if command.number > self.done]
        self.did += new
        self.done = max([self.done, *(command.number for command in new)])


@given(st.lists(st.sampled_from(["arrives", "letter lost", "reply lost", "twice"]), min_size=1, max_size=12))
def test_whatever_is_lost_nothing_is_done_twice_and_no_end_of_a_task_is_left_out(fates):
    pending, node, heard = PendingCommands(), Doing(), []
    for step, fate in enumerate([*fates, "arrives"]):
        task, round_ = divmod(step, ROUNDS)
        if round_ == 0:
            if task:
                pending.add(Progress(task - 1, ROUNDS - 1), END, TEST_AFTER)
            pending.add(Progress(task, 0), BEGIN)
        pending.add(Progress(task, round_), TRAIN, UPLOAD)
        if fate != "letter lost":
            for _ in range(2 if fate == "twice" else 1):
                node.answer(pending.commands)
            if fate != "reply lost":
                heard += pending.commands
                pending.acknowledge()
                pending.add(Progress(task, round_), DOWNLOAD, payload={})
        pending.drop_round()
    numbers = [command.number for command in node.did]
    assert numbers == sorted(set(numbers))
    # All that is no part of a round was done in order and heard of, up to the present task.
    lasting = [command for command in node.did if command.kind not in ROUND_KINDS]
    assert [command for command in heard if command.kind not in ROUND_KINDS] == lasting
    tasks = range((len(fates)) // ROUNDS + 1)
    kinds = [(command.kind, command.task) for command in lasting if command.kind != "download"]
    told = [(kind, task) for task in tasks for kind in ("begin_task", "end_task", "test_after")]
    assert kinds == told[:-2]
