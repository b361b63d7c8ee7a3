from dataclasses import replace

import pytest
import torch

from fedlscl.federated.method import Progress
from fedlscl.federated.payload import Upload
from fedlscl.functional.aggregation import weighted_average
from fedlscl.methods import GLFC
from fedlscl.methods.glfc import GRADIENTS, best_model, extended_memory, herded, perturbed_prototypes, without_proxy
from fedlscl.nets.net import Net, Output
from fedlscl.nets.vit import FoundationConfig

QUICK = {"perturbation_steps": 2, "reconstruction_steps": 2, "monitor_images": 2}


@pytest.fixture(scope="module")
def make(small):
    return lambda **changed: GLFC(**small, **(QUICK | {"oracle_signal": True, "prototype_size": 8} | changed))


class Watched(GLFC):
    """Keeps what clients send."""

    def aggregate(self, uploads, progress):
        self.sent = [*getattr(self, "sent", []), [upload.payload for upload in uploads]]
        return super().aggregate(uploads, progress)


@pytest.fixture(scope="module")
def trainer(federate, small, make_data):
    """Three tasks of two rounds."""
    data = make_data(num_tasks=3, fake_classes=9, private_classes=3, public_classes=3, train_per_class=6)
    return federate(
        Watched(**small, **QUICK, oracle_signal=True, prototype_size=8, memory_size=9), data, rounds_per_task=2
    )


def test_memory_is_even_bounded_and_keeps_the_beginning_of_the_order(trainer):
    client = trainer.clients[0]
    client.task, full = 1, client.buffer
    client.buffer = full.empty()
    first = extended_memory(client, 9)
    client.buffer, client.task = first, 2
    second = extended_memory(client, 9)
    assert first.labels.unique().equal(client.data.classes(0)) and second.labels.unique().equal(client.data.seen(1))
    for memory in (first, second):
        counts = memory.labels.bincount()
        assert len(memory) <= 9 and counts[counts > 0].unique().tolist() == [9 // len(memory.classes)]
    for label in first.classes:
        assert second.ids[second.labels == label].equal(first.ids[first.labels == label][: 9 // len(second.classes)])
        order, _ = herded(
            client, client.data.train_ids(0)[client.data.data.labels(client.data.train_ids(0)) == label], 4
        )
        assert order.equal(first.ids[first.labels == label])
    again = extended_memory(replace(client, buffer=second), 9)
    assert again.ids.equal(second.ids)
    client.buffer = full


def test_every_task_trains_on_what_the_paper_says(trainer):
    terms = [entry["terms"].keys() for entry in trainer.run.history]
    first, later = {"loss", "compensation"}, {"loss", "compensation", "relation"}
    assert terms == [first] * 4 + [later] * 8
    assert all(client.buffer.classes.equal(client.old) and len(client.buffer) <= 9 for client in trainer.clients)


def test_gradients_are_sent_once_per_task_and_without_labels(trainer):
    encoder_weights = 8136 + (12 * 4 + 1) * 9
    rounds = [
        [sorted(payload.keys() - without_proxy(payload).keys()) for payload in sent] for sent in trainer.method.sent
    ]
    assert rounds == [[[GRADIENTS]] * 2, [[]] * 2] * 3
    assert {payload[GRADIENTS].shape for sent in trainer.method.sent[::2] for payload in sent} == {(2, encoder_weights)}


class Table(Net):
    """Logits that are looked up by the first pixel."""

    def __init__(self, logits):
        super().__init__()
        self.head, self.logits = torch.nn.Linear(1, logits.shape[1]), logits

    def forward(self, images, prefix=None):
        chosen = self.logits[images[:, 0, 0, 0].long()]
        return Output(chosen, chosen)


def test_the_proxy_finds_best_what_is_not_worse_among_classes_so_far(make):
    method = make()
    right, wrong = torch.tensor([[1.0, 0, 9], [0, 1, 9]]), torch.tensor([[0.0, 1, 9], [0, 1, 9]])
    method.proxy["met"] = torch.tensor([3, 3, -1])
    assert not method._is_best(Table(right))
    images = torch.tensor([0.0, 1])[:, None, None, None].expand(-1, 3, 2, 2)
    method.proxy |= {"images": images, "labels": torch.tensor([0, 1]), "best": torch.tensor(-1.0)}
    found = [(method._is_best(Table(logits)), method.proxy["best"].item()) for logits in (wrong, right, wrong, right)]
    assert found == [(True, 0.5), (True, 1.0), (False, 1.0), (True, 1.0)]


def test_the_proxy_moves_on_once_per_task_and_scores_anew_on_new_images(make, trainer):
    method, client = make(), trainer.clients[0]
    gradients, counts, kept = client_gradients(method, client), client.data.class_counts(0), []
    for task, round_, extra in ((0, 0, True), (0, 1, False), (0, 2, True), (1, 0, True)):
        payload = client.net.state_dict() | ({GRADIENTS: gradients} if extra else {})
        upload = Upload(client=0, task=task, round=round_, payload=payload, class_counts=counts)
        (answer,) = method.aggregate([upload], Progress(task, round_))
        kept.append((bool(answer["proxy.shift"]), bool(answer["proxy.best"]), len(method.proxy["labels"])))
    size = len(gradients) * QUICK["monitor_images"]
    assert kept == [(True, True, size), (False, True, size), (False, True, 2 * size), (True, True, size)]
    assert set(method.proxy["labels"].tolist()) == set(client.classes.tolist())


def client_gradients(method, client):
    client.memory["signal"] = torch.tensor(True)
    gradients = method.upload(client)[GRADIENTS]
    client.memory["signal"] = torch.tensor(False)
    return gradients


def test_an_old_model_replaces_the_teacher_at_a_shift_only(make, trainer):
    method, client = make(), replace(trainer.clients[0], memory={}, previous=None)
    model = {name: value.clone() for name, value in client.net.state_dict().items()}
    versions = [
        {name: value + i if value.is_floating_point() else value for name, value in model.items()} for i in (0, 1)
    ]

    def answer(version, shift, best):
        flags = {"proxy.shift": torch.tensor(shift), "proxy.best": torch.tensor(best)}
        method.download(client, versions[version] | flags | {"proxy.met": torch.zeros(9, dtype=torch.int64)})

    answer(0, shift=True, best=True)
    assert client.previous is None
    answer(1, shift=False, best=False)
    assert torch.equal(best_model(client).head.weight, versions[0]["head.weight"])
    answer(1, shift=True, best=True)
    assert torch.equal(client.previous.head.weight, versions[0]["head.weight"])
    assert torch.equal(best_model(client).head.weight, versions[1]["head.weight"])
    client.net.load_state_dict(model)


def test_each_prototype_is_perturbed_by_itself_along_the_gradient(trainer):
    client = trainer.clients[0]
    columns = client.seen
    images, labels = perturbed_prototypes(client, columns, size=8, steps=0, lr=0.2)
    found, _ = perturbed_prototypes(client, columns, size=8, steps=3, lr=0.2)
    assert labels.equal(client.classes) and 0 <= images.min() < images.max() <= 1
    for image, label, moved in zip(images, labels, found, strict=True):
        target, x = (columns == label).float(), image[None]
        for _ in range(3):
            x = x.detach().requires_grad_(True)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(client.net(x).logits[0, columns], target)
            x = x - 0.2 * (torch.autograd.grad(loss, x)[0] + 1e-5 * x)
        torch.testing.assert_close(moved, x[0])
        assert not torch.equal(moved, image)


def test_a_rise_of_the_entropy_is_the_signal(make, trainer):
    method, client = make(oracle_signal=False), replace(trainer.clients[0], memory={})
    logits = client.net.eval()(client.data.fetch(client.train_ids).images).logits
    p = logits[:, method._classes(client)[0]].softmax(1)
    entropy = -(p * p.log()).sum(1).mean().item()
    for rise, before, expected in ((entropy - 0.01, 0.0, True), (entropy + 0.01, 0.0, False), (0.01, entropy, False)):
        method.entropy_rise = rise
        client.memory = {"entropy": torch.tensor(before)}
        assert method._detect(client) is expected
        assert client.memory["entropy"].item() == pytest.approx(entropy, rel=1e-4)


def test_which_classes_take_part(make, trainer):
    client = trainer.clients[0]
    own, old = make(bce_classes="client_seen")._classes(client)
    assert own.equal(client.seen) and old.equal(client.old)
    columns, old = make()._classes(client)
    others = torch.cat([c.seen for c in trainer.clients]).unique()
    earlier = torch.cat([c.old for c in trainer.clients]).unique()
    assert columns.equal(others) and old.equal(earlier[~torch.isin(earlier, client.classes)])


def test_the_model_is_averaged_as_in_fedavg(make, trainer):
    counts = [client.data.class_counts(0) for client in trainer.clients]
    states = [
        client.net.state_dict() | {"head.bias": torch.full((9,), float(i))} for i, client in enumerate(trainer.clients)
    ]
    uploads = [
        Upload(client=i, task=0, round=0, payload=state, class_counts=count)
        for i, (state, count) in enumerate(zip(states, counts, strict=True))
    ]
    answer = make(head_aggregation="average").aggregate(uploads, Progress(0, 0))[0]
    expected = weighted_average(states, [int(count.sum()) for count in counts])
    assert all(torch.equal(answer[name], expected[name]) for name in expected)
    assert not answer["proxy.best"] and not answer["proxy.shift"]
    assert torch.equal(answer["proxy.met"] == 0, torch.stack(counts).sum(0) > 0) and answer["proxy.met"].min() == -1


def test_a_frozen_vit_is_refused(make):
    with pytest.raises(ValueError, match="GLFC does not support `foundation`: set `small_model`"):
        make(foundation=FoundationConfig(name="test_vit", weights="random"))
