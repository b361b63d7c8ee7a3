"""What every method promises, run for each public one on two tasks of fake data."""

import io
import re

import pytest
import torch

import fedlscl.methods
from fedlscl.federated.method import Method
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.nets.vit import fingerprint
from tiny_methods import METHODS


def test_every_public_method_is_under_contract():
    assert sorted(METHODS) == sorted(fedlscl.methods.__all__)
    assert all(type(make()).__name__ == name for name, make in METHODS.items())


@pytest.mark.parametrize("name", fedlscl.methods.__all__)
def test_every_public_method_states_its_own_card(name):
    card = vars(getattr(fedlscl.methods, name))["card"]
    assert card.venue and card.trains and card.uploads
    assert re.fullmatch(r"(\d{4}\.\d{5})?", card.arxiv)
    assert bool(card.arxiv) == (card.venue not in ("control", "oracle"))


class Recorded(FederatedTrainer):
    """Keeps all messages of a run."""

    def __init__(self, **options):
        super().__init__(accelerator="cpu", rounds_per_task=2, **options)
        self.uploads, self.answers = [], []

    def _server_round(self, uploads):
        aggregate = self.method.aggregate
        self.uploads += uploads
        try:
            self.method.aggregate = lambda *arguments: self.answers.append(aggregate(*arguments)) or self.answers[-1]
            super()._server_round(uploads)
        finally:
            del self.method.aggregate


@pytest.fixture(scope="module", params=fedlscl.methods.__all__)
def run(request, make_data):
    """A finished run."""
    trainer = Recorded()
    trainer.fit(METHODS[request.param](), make_data())
    return trainer


def states(trainer):
    return {
        "method": trainer.method.state_dict(),
        "clients": [client.state_dict() for client in trainer.clients],
    }


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


def test_it_learns_two_tasks_with_finite_numbers(run):
    assert isinstance(run.method, Method)
    for mask in ("task", "seen"):
        values = run.matrix.of(mask)[:, [0, 1, 1], [0, 0, 1]]
        assert ((values >= 0) & (values <= 1)).all()
    assert all(tensor.isfinite().all() for tensor in tensors(states(run)) if tensor.is_floating_point())
    assert all(torch.tensor(list(entry["terms"].values())).isfinite().all() for entry in run.history)


def test_messages_are_detached_tensors_on_the_cpu_by_name(run):
    assert len(run.uploads) == 2 * 2 * 2 and len(run.answers) == 2 * 2
    for payload in [upload.payload for upload in run.uploads] + [answer for round_ in run.answers for answer in round_]:
        assert type(payload) is dict
        for name, value in payload.items():
            assert type(name) is str and type(value) is torch.Tensor
            assert value.device.type == "cpu" and not value.requires_grad and value.grad_fn is None
            assert not value.is_floating_point() or value.isfinite().all()


def test_messages_share_no_memory_with_the_clients(run):
    owned = {tensor.untyped_storage().data_ptr() for tensor in tensors(states(run)["clients"]) if tensor.numel()}
    sent = {value.untyped_storage().data_ptr() for upload in run.uploads for value in upload.payload.values()}
    assert not owned & sent


def test_no_message_holds_foundation_weights(run):
    foundation = run.clients[0].net.foundation
    if foundation is None:
        return
    assert fingerprint(foundation.vit) == foundation.fingerprint
    frozen = [value for value in foundation.vit.state_dict().values() if value.unique().numel() > 1]
    assert frozen
    for upload in run.uploads:
        for value in upload.payload.values():
            assert not any(value.shape == part.shape and torch.equal(value, part) for part in frozen)


def test_its_state_is_plain_and_comes_back(run, make_data):
    state, buffer = states(run), io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    other = Recorded()
    other.setup(METHODS[type(run.method).__name__](), make_data(), seed=7)
    other.method.load_state_dict(loaded["method"])
    for client, values in zip(other.clients, loaded["clients"], strict=True):
        client.load_state_dict(values)
    again, expected = tensors(states(other)), tensors(state)
    assert len(again) == len(expected) and all(map(torch.equal, again, expected))


def test_a_second_run_of_the_same_object_is_the_same_to_the_bit(run, make_data):
    """Also after a run on other data: nothing of it may stay behind."""
    method = METHODS[type(run.method).__name__]()
    with torch.random.fork_rng():
        torch.manual_seed(123)
        FederatedTrainer(accelerator="cpu", rounds_per_task=1, max_tasks=1).fit(method, make_data(), seed=7)
        second = Recorded()
        second.fit(method, make_data())
    pairs = zip(tensors(states(run)), tensors(states(second)), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    assert torch.equal(run.matrix.values.nan_to_num(-1), second.matrix.values.nan_to_num(-1))
    assert run.history == second.history
    for left, right in zip(run.uploads, second.uploads, strict=True):
        assert left.payload.keys() == right.payload.keys()
        assert all(torch.equal(left.payload[name], right.payload[name]) for name in left.payload)


def test_it_learns(run):
    """Fake data are easy: after the last task, on that task's classes, better than a coin for the mean client."""
    assert run.matrix.of("task")[:, 1, 1].mean() > 0.5
