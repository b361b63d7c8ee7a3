import pickle

import pytest
import torch

from fedlscl.flower.messages import Command, Reply, Request, Result, pack, read_reply, read_request

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
