import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedlscl.federated.payload import (
    MAX_HEADER,
    Upload,
    num_bytes,
    outgoing,
    read_message,
    write_payload,
)


def test_what_leaves_is_detached_and_a_copy():
    weight = torch.nn.Parameter(torch.randn(3))
    payload = outgoing({"w": weight})
    with torch.no_grad():
        weight.add_(1)
    assert not payload["w"].requires_grad and payload["w"].device.type == "cpu"
    assert not torch.equal(payload["w"], weight)


def test_bytes_are_those_of_the_real_message():
    payload = {"w": torch.randn(3, 4), "n": torch.tensor(3), "strided": torch.randn(4, 6).mT[:, ::2]}
    message = save({name: value.contiguous() for name, value in payload.items()})
    assert num_bytes(payload) == len(message) > 4 * (12 + 12) + 8
    assert all(torch.equal(value, payload[name]) for name, value in load(message).items())
    assert num_bytes({}) == 0


def test_an_upload_weighs_as_much_as_its_samples():
    upload = Upload(client=0, task=0, round=0, payload={}, class_counts=torch.tensor([3, 0, 4]))
    assert upload.num_samples == 7


def framed(header, body=b""):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(data).to_bytes(8, "little") + data + body


ENTRY = b'"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut short"),
        (b"\x01", "cut short"),
        (framed({"w": ONE}, bytes(4))[:-1], "not safetensors"),
        (framed({"w": ONE}, bytes(5)), "not safetensors"),
        (framed({"w": ONE, "v": ONE}, bytes(4)), "not safetensors"),
        (framed({"w": ONE, "v": {**ONE, "data_offsets": [2, 6]}}, bytes(6)), "not safetensors"),
        (framed(b"{" + ENTRY + b", " + ENTRY + b"}", bytes(4)), "twice"),
        (framed({"w": {**ONE, "shape": [2**62]}}, bytes(4)), "not safetensors"),
        (framed({"w": {**ONE, "dtype": "F7"}}, bytes(4)), "not safetensors"),
        (framed(b"[" * 10**6), "not safetensors"),
        (framed(b'{"w": 1' + b"0" * 10**5 + b"}"), "not safetensors"),
        ((2**63).to_bytes(8, "little") + bytes(100), "cut short"),
        (framed(b" " * (MAX_HEADER + 1)), "has a header of 4194305 bytes"),
        (framed({"w": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\x01\x02"), "other than 0 and 1"),
    ],
)
def test_a_broken_message_is_refused_in_one_line(data, said):
    with pytest.raises(ValueError, match=said) as error:
        read_message(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@given(st.binary(max_size=200) | st.binary(max_size=100).map(framed))
def test_whatever_the_bytes_it_is_a_message_or_one_line(data):
    try:
        assert all(type(value) is torch.Tensor for value in read_message(data)[1].values())
    except ValueError as error:
        assert "\n" not in str(error)


@given(st.data())
def test_a_message_that_is_changed_anywhere_is_read_or_refused(draw):
    data = bytearray(write_payload({"w": torch.randn(3), "m": torch.tensor([True]), "n": torch.tensor(3)}))
    data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        read_message(bytes(data))
    except ValueError as error:
        assert "\n" not in str(error)


def test_what_was_written_is_read_with_memory_of_its_own():
    payload = {
        "w": torch.randn(3, 4).half(),
        "m": torch.tensor([True, False]),
        "n": torch.tensor(3),
        "e": torch.ones(0),
    }
    data = write_payload(payload)
    found = read_message(data, len(data))[1]
    assert found.keys() == payload.keys() and all(torch.equal(found[name], value) for name, value in payload.items())
    assert all(value.data_ptr() % 16 == 0 for value in found.values())
    with pytest.raises(ValueError, match=f"of {len(data)} bytes is larger than {len(data) - 1}"):
        read_message(data, len(data) - 1)
    metadata, _ = read_message(save(payload, metadata={"who": "me"}))
    assert metadata == {"who": "me"}
