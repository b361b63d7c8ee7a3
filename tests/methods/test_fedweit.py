import pytest
import torch

from fedlscl.functional.aggregation import masked_average
from fedlscl.methods import FedWeIT
from fedlscl.methods.fedweit import BASE, BITS, SENT, VALUES, unpack_sparse
from fedlscl.nets.vit import FoundationConfig


@pytest.fixture(scope="module")
def make(small):
    return lambda **changed: FedWeIT(**small, **({"lr": 0.01} | changed))


class Watched(FedWeIT):
    """Keeps all messages."""

    def aggregate(self, uploads, progress):
        answers = super().aggregate(uploads, progress)
        self.seen = [*getattr(self, "seen", []), (uploads, answers[0])]
        return answers


@pytest.fixture(scope="module")
def trainer(federate, small):
    return federate(Watched(**small, lr=0.01), rounds_per_task=2)


def test_all_ones_masks_give_the_plain_mean():
    bases = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, sent = masked_average(list(bases), [torch.ones(4, dtype=torch.bool)] * 3)
    torch.testing.assert_close(mean, bases.mean(0), rtol=1e-15, atol=1e-15)
    assert sent.all()


def test_a_channel_is_the_mean_over_its_senders_and_zero_is_a_number():
    masks = torch.tensor([[True, False, True], [True, False, False]])
    mean, sent = masked_average([torch.tensor([[2.0], [0.0]]), torch.tensor([[4.0]])], list(masks))
    assert mean.tolist() == [[3.0], [0.0]] and sent.tolist() == [True, False, True]


def test_a_channel_that_no_client_sends_is_unchanged_on_every_client(trainer):
    method = trainer.method
    for client in trainer.clients:
        name, layer = next(iter(client.net.convolutions.items()))
        before = layer.conv.weight.detach().clone()
        answer = {}
        for key, part in client.net.convolutions.items():
            sent = torch.zeros(len(part.conv.weight), dtype=torch.bool)
            sent[0] = key == name
            answer |= {SENT + key: sent, BASE + key: torch.full_like(part.conv.weight[sent], 7.0)}
        method.download(client, answer)
        assert (layer.conv.weight[0] == 7).all() and torch.equal(layer.conv.weight[1:], before[1:])
        with torch.no_grad():
            layer.conv.weight.copy_(before)


def test_only_base_channels_travel_and_sparse_weights_once_per_task(trainer):
    layers = trainer.clients[0].net.convolutions
    for number, (uploads, answer) in enumerate(trainer.method.seen):
        for upload in uploads:
            kinds = {key[: key.index(".") + 1] for key in upload.payload}
            assert kinds == ({BASE, SENT, VALUES, BITS} if number == 2 else {BASE, SENT})
            for name, layer in layers.items():
                rows = len(layer.conv.weight)
                assert upload.payload[SENT + name].sum() == len(upload.payload[BASE + name]) == rows - int(0.3 * rows)
        assert ("0." + VALUES + name in answer) == (number == 2)


def test_attention_gets_every_clients_weights_of_the_task_before(trainer):
    uploads, _ = trainer.method.seen[2]
    for client in trainer.clients:
        for name, layer in client.net.convolutions.items():
            for j, upload in enumerate(uploads):
                sent = unpack_sparse(upload.payload[VALUES + name], upload.payload[BITS + name], layer.anchor.shape)
                assert torch.equal(layer.knowledge[j], sent)
                assert not ((sent != 0) & (sent.abs() <= 1e-3)).any()


def test_an_earlier_tasks_parts_stay_to_the_bit(trainer, federate, small):
    """What the first task left behind is the same after a round of the second and after two; its norms, too."""
    short = federate(FedWeIT(**small, lr=0.01), rounds_per_task=2, max_tasks=1)
    for client, earlier in zip(trainer.clients, short.clients, strict=True):
        earlier.net.begin_task(client.data.classes(1), 1)
        later, expected = client.net.state_dict(), earlier.net.state_dict()
        frozen = [n for n in later if n.endswith((".adaptive.0", ".mask.0", ".attention.0")) or ".norms.0." in n]
        assert len(frozen) > 3 * 15 and all(torch.equal(later[name], expected[name]) for name in frozen)
        trained = [n for n in later if n.endswith((".adaptive.1", ".mask.1"))]
        assert not any(torch.equal(later[name], expected[name]) for name in trained)


def test_heads_and_norms_are_not_sent(trainer):
    weights = [client.net.head.weight for client in trainer.clients]
    assert not torch.equal(*weights)
    base = [[layer.conv.weight for layer in client.net.convolutions.values()] for client in trainer.clients]
    equal = [(a == b).flatten(1).all(1) for a, b in zip(*base, strict=True)]
    assert all(rows.sum() >= 0.7 * len(rows) for rows in equal)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"foundation": FoundationConfig(name="test_vit", weights="random")},
            "FedWeIT does not support `foundation`",
        ),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_cannot_work_is_refused(make, changed, message):
    with pytest.raises(ValueError, match=message):
        make(**changed)
