import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.federated.method import Progress
from fedlscl.flower.messages import (
    BEGIN,
    END,
    ROUND_KINDS,
    TEST_AFTER,
    TRAIN,
    UPLOAD,
    Command,
    PendingCommands,
    Reply,
    Request,
    Result,
    pack,
    read_reply,
    read_request,
)

PAYLOAD = {"head.weight": torch.randn(3, 2), "head/odd": torch.tensor(2.5), "counts": torch.tensor([1, 2])}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_letters_and_replies_come_back_as_they_were():
    letter = Request(1, "ab", "id", 3, [Command(4, "train", 1, 0)], PAYLOAD)
    found = read_request(letter.encode())
    assert found._replace(answer=None) == letter._replace(answer=None) and same(found.answer, PAYLOAD)
    assert read_request(letter._replace(answer=None).encode()).answer is None
    reply = Reply(1, 14, [Result(1, {"a": [1]}, {"x": PAYLOAD["counts"].clone()}), Result(14, {}, PAYLOAD)])
    found = read_reply(reply.encode())
    assert (found.client, found.done, found.refusal) == (1, 14, "")
    assert [result[:2] for result in found.results] == [(1, {"a": [1]}), (14, {})]
    assert same(found.results[0].tensors, {"x": PAYLOAD["counts"]}) and same(found.results[1].tensors, PAYLOAD)


def test_every_truncation_and_foreign_bytes_are_refused():
    data = Reply(0, 1, [Result(1, {}, PAYLOAD)]).encode()
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
        {"results": []},
        {"client": "0", "done": 1, "results": []},
        {"client": 0, "done": 1, "results": [[1]]},
        {"client": 0, "done": 1, "results": [["x", {}]]},
        {"client": 0, "done": 1, "results": 5, "refusal": 1},
    ],
)
def test_a_malformed_header_is_refused(header):
    with pytest.raises(ValueError):
        read_reply(pack(header, {}))


ROUNDS = 2


class Doing:
    """A node that notes what it does and answers as `Node` does."""

    def __init__(self):
        self.done, self.did, self.outbox = 0, [], []

    def answer(self, letter):
        for command in letter.commands:
            if command.number > self.done:
                self.did.append(command)
                self.outbox.append(Result(command.number, {}, {}))
                self.done = command.number
        return Reply(0, self.done, [result for result in self.outbox if result.number > letter.acknowledged])


@given(st.lists(st.sampled_from(["arrives", "letter lost", "reply lost", "twice"]), min_size=1, max_size=12))
def test_whatever_is_lost_nothing_is_done_twice_and_no_end_of_a_task_is_left_out(fates):
    pending, node, heard = PendingCommands(0), Doing(), []
    for step, fate in enumerate([*fates, "arrives"]):
        task, round_ = divmod(step, ROUNDS)
        if round_ == 0:
            if task:
                pending.add(END, task - 1, ROUNDS - 1)
                pending.add(TEST_AFTER, task - 1, ROUNDS - 1)
            pending.add(BEGIN, task, 0)
        pending.add(TRAIN, task, round_)
        pending.add(UPLOAD, task, round_)
        letter = pending.request("run", "identity")
        if fate != "letter lost":
            reply = node.answer(letter)
            reply = node.answer(letter) if fate == "twice" else reply
            if fate != "reply lost":
                heard += [command for command, _ in pending.completed(reply)]
                pending.acknowledge(reply)
                if any(command.kind == UPLOAD and command[2:] == (task, round_) for command in heard):
                    pending.add_download({}, Progress(task, round_))
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


def test_a_reply_about_what_was_never_told_is_refused():
    pending = PendingCommands(0)
    pending.add(BEGIN, 0, 0)
    for reply, reason in [
        (Reply(1, 1, []), "must be of client 0, got 1"),
        (Reply(0, 2, []), "must be 0 to 1, got 2"),
        (Reply(0, -1, []), "got -1"),
        (Reply(0, 1, []), "has no result of command 1"),
    ]:
        with pytest.raises(ValueError, match=reason):
            pending.completed(reply)
    assert pending.acknowledged == 0 and len(pending.commands) == 1
