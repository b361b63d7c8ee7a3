import torch
from safetensors.torch import load, save

from fedlscl.federated.payload import Upload, num_bytes, outgoing


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
