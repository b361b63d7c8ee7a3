"""Secure sums in a federation: the plain path's results from uploads that nobody can read."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlscl import testing as contract
from fedlscl.federated.method import Progress
from fedlscl.methods import FedLSCL
from fedlscl.testing import learn
from tiny_methods import COLLABORATOR, LOCAL


def make(cls=FedLSCL, **options):
    return cls(
        **(
            {"collaborator": COLLABORATOR, "buffer_per_class": 3, "upload_rank": "exact", "secure_sum": True}
            | LOCAL
            | options
        )
    )


class KeysFirst(FedLSCL):
    """The plain path with nothing fused in the run's first exchange."""

    def aggregate(self, uploads, progress):
        if progress.position == (0, 0):
            return [{} for _ in uploads]
        return super().aggregate(uploads, progress)


@pytest.fixture(scope="module")
def run():
    """Two tasks of two rounds."""
    return learn(make())


def test_accuracies_are_those_of_the_plain_path(run):
    plain = learn(make(KeysFirst, secure_sum=False))
    for mask in ("task_il", "class_il"):
        assert torch.equal(run.matrix.of(mask).nan_to_num(-1), plain.matrix.of(mask).nan_to_num(-1))


def test_fused_nets_are_those_of_the_plain_path():
    """Sums are exact to 2^-36. Nothing is trained after this fusion: Adam would make a step of any rounding."""
    found, wanted = (learn(method, max_tasks=1) for method in (make(), make(KeysFirst, secure_sum=False)))
    for secure, plain in zip(found.clients, wanted.clients, strict=True):
        for name, value in plain.net.state_dict().items():
            difference = (secure.net.state_dict()[name].double() - value.double()).abs().max()
            assert difference <= 1e-6 * value.abs().max() + 1e-6, name


def test_the_answer_to_equal_sums_is_eq5(run):
    """The last round, from what the server saw and what each client knows: the plain server's own answer."""
    plain, secure = make(secure_sum=False), make()
    clients = run.clients
    for client in clients:
        client.task = client.round = 1
    secure.members = torch.tensor([0, 1])
    states = deepcopy([client.state_dict() for client in clients])
    before = [client.net.generator.matrix.clone() for client in clients]
    uploads = [replace(upload, payload=plain.upload(c)) for upload, c in zip(run.uploads[-2:], clients, strict=True)]
    expected = plain.aggregate(uploads, Progress(1, 1, True, True))
    uploads = [replace(upload, payload=secure.upload(c)) for upload, c in zip(run.uploads[-2:], clients, strict=True)]
    for client, answer in zip(clients, secure.aggregate(uploads, Progress(1, 1, True, True)), strict=True):
        secure.download(client, answer)
    found = [client.net.generator.matrix.clone() for client in clients]
    for client, state in zip(clients, states, strict=True):
        client.load_state_dict(state)
    for generator, answer, own in zip(found, expected, before, strict=True):
        torch.testing.assert_close(generator, answer["generator"], rtol=1e-6, atol=1e-8)
        assert not torch.allclose(own, answer["generator"], rtol=1e-4)


def test_only_keys_travel_first_and_only_masked_sums_later(run):
    for upload in run.uploads[:2]:
        assert {name: (value.dtype, value.shape) for name, value in upload.payload.items()} == {
            "public_keys": (torch.uint8, (32,))
        }
    for upload in run.uploads[2:]:
        assert upload.payload.keys() == {"moments", "products"}
        assert all(value.dtype == torch.int64 for value in upload.payload.values())
        data = b"".join(value.numpy().tobytes() for value in upload.payload.values())
        counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 255 + 4 * (2 * 255) ** 0.5
    assert all(answer.keys() == {"moments", "products"} for answers in run.answers[1:] for answer in answers)


def test_private_keys_stay(run):
    for client in run.clients:
        private = client.memory["secure.private_key"]
        messages = [upload.payload for upload in run.uploads] + [a for answers in run.answers for a in answers]
        assert not any(private.numpy().tobytes() in value.numpy().tobytes() for m in messages for value in m.values())
        assert not any(name.startswith("secure.own.") for name in client.memory)


# One round per task, which `repeats` begins with, has no sums; `resumes` compares with a run of its own, too.
@pytest.mark.parametrize("check", [check for check in contract.CHECKS if check is not contract.check_determinism])
def test_promise(check, run):
    check(run, make)


def test_without_distillation_keys_alone_travel():
    run = learn(make(distill=False))
    assert run.uploads[0].payload.keys() == {"public_keys"}
    assert not any(upload.payload for upload in run.uploads[2:]) and not any(run.answers[-1])


def test_sums_of_any_names_are_masked_and_add_up(run):
    """Those of readouts, say: what one client sends is noise, and the total is exact."""
    method = make()
    method.members = run.method.members
    sums = {"adapted.gram": torch.tensor([0.5, 3.0]), "adapted.products": torch.tensor([[7.0]])}
    masked = {client.id: method.mask_sums(client, sums) for client in run.clients}
    assert method.masks_sums and not make(secure_sum=False).masks_sums
    assert all(value.dtype == torch.int64 for payload in masked.values() for value in payload.values())
    assert (torch.cat([value.flatten() for value in masked[0].values()]).abs() > 2**50).all()
    total = method.unmask_sums(masked)
    assert all(torch.equal(total[name], 2 * value.double()) for name, value in sums.items())


def test_sums_before_any_keys_are_refused():
    with pytest.raises(ValueError, match="no keys yet: set rounds_per_task to 2"):
        make().unmask_sums({})


def test_a_client_without_samples_adds_zeros(run):
    method, client = make(), run.clients[0]
    data = client.data
    expected = {name: value.shape for name, value in method.upload(client).items()}
    client.data = replace(data, split=replace(data.split, train=[ids[:0] for ids in data.split.train]))
    try:
        assert {name: value.shape for name, value in method.upload(client).items()} == expected
    finally:
        client.data = data


def test_a_round_that_lacks_a_client_is_refused_by_name(run):
    with pytest.raises(ValueError, match=r"lacks clients \[1\].*last checkpoint"):
        run.method.aggregate(run.uploads[-2:-1], Progress(1, 1))


def test_a_client_that_lost_its_key_is_named(run):
    lost = replace(run.uploads[-1], payload=run.uploads[1].payload)
    with pytest.raises(ValueError, match="client 1 sends other names"):
        run.method.aggregate([run.uploads[-2], lost], Progress(1, 1))


def test_a_first_task_without_a_second_exchange_is_refused():
    with pytest.raises(ValueError, match="rounds_per_task to 2"):
        learn(make(), rounds_per_task=1)


def test_one_client_alone_is_refused(run):
    with pytest.raises(ValueError, match="two clients or more"):
        make().aggregate(run.uploads[:1], Progress(0, 0))


@pytest.mark.parametrize("options", [{"participation": 0.5}, {"failure_rate": 0.1}])
def test_rounds_without_some_clients_are_refused_at_the_start(options):
    with pytest.raises(ValueError, match="participation must be 1 and failure_rate 0 with secure_sum"):
        learn(make(), **options)
