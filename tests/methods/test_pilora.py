import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.federated.client import class_means
from fedlscl.federated.method import Progress, StreamShape
from fedlscl.federated.payload import Upload
from fedlscl.methods.pilora import PILoRA, prototype_weights

TINY = {"local_epochs": 1, "batch_size": 8, "lr": 0.05}
START = Progress(0, 0)


@pytest.fixture
def make(foundation_config):
    return lambda **changed: PILoRA(foundation=foundation_config, **(TINY | changed))


@pytest.fixture
def method(make):
    return make()


def upload(client, counts, prototypes, means, lora=0.0):
    """A message of one factor, and rows of the classes that the client has (or of all)."""
    payload = {"lora.0.up.0": torch.full((2, 1), lora), "prototypes": prototypes, "means": means}
    return Upload(client=client, task=0, round=0, payload=payload, class_counts=torch.tensor(counts))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_weights_are_a_distribution_that_prefers_the_close(clients, holders, seed):
    torch.manual_seed(seed)
    prototypes, means = torch.randn(clients, 5), torch.randn(holders, 5)
    weights = prototype_weights(prototypes, means, 0.2)
    assert weights.sum().item() == pytest.approx(1) and (weights >= 0).all()
    distances = torch.cdist(prototypes, means).sum(1)
    assert torch.equal(weights.argsort(descending=True), distances.argsort())


def test_two_clients_get_softmax_of_five_and_zero():
    weights = prototype_weights(torch.tensor([[1.0], [1.5]]), torch.tensor([[0.0]]), 0.2)
    torch.testing.assert_close(weights, torch.tensor([5.0, 0.0]).double().softmax(0))


def test_a_private_class_is_nearly_its_owners_when_all_are_candidates():
    """Four clients still have the server's prototype: e^5 / (e^5 + 4)."""
    prototypes = torch.tensor([[0.1], [3.0], [3.0], [3.0], [3.0]])
    weights = prototype_weights(prototypes, torch.tensor([[0.0]]), 0.2)
    assert weights[0].item() == pytest.approx(math.exp(5) / (math.exp(5) + 4))


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_equal_closeness_is_uniform_not_zero_by_zero(clients):
    weights = prototype_weights(torch.ones(clients, 3), torch.zeros(2, 3), 0.2)
    assert torch.equal(weights, torch.full((clients,), 1 / clients, dtype=torch.float64))


def test_a_prototype_on_the_mean_is_chosen():
    weights = prototype_weights(torch.tensor([[0.0], [9.0]]), torch.tensor([[0.0]]), 0.2)
    assert weights.isfinite().all() and weights[0] > 0.99


def test_rows_are_matched_with_their_classes(method):
    """Client 0 has classes 1 and 3, client 1 has 0 and 3: only class 3 has two candidates."""
    uploads = [
        upload(0, [0, 4, 0, 2], torch.tensor([[1.0], [30.0]]), torch.tensor([[1.0], [30.0]])),
        upload(1, [5, 0, 0, 1], torch.tensor([[2.0], [31.0]]), torch.tensor([[2.0], [30.0]])),
    ]
    answers = method.aggregate(uploads, START)
    assert len(answers) == 2
    answer = answers[0]
    assert answer["classes"].tolist() == [0, 1, 3]
    near = math.exp(5) / (math.exp(5) + 1)
    expected = torch.tensor([[2.0], [1.0], [near * 30 + (1 - near) * 31]])
    torch.testing.assert_close(answer["prototypes"], expected)


def test_the_released_rule_lets_every_client_take_part(foundation_config):
    method = PILoRA(foundation=foundation_config, head_aggregation="average", **TINY)
    owner = upload(0, [3, 0], torch.tensor([[1.0], [7.0]]), torch.tensor([[1.0]]))
    other = upload(1, [0, 3], torch.tensor([[5.0], [8.0]]), torch.tensor([[8.0]]))
    (answer, _) = method.aggregate([owner, other], START)
    near = math.exp(5) / (math.exp(5) + 1)
    expected = torch.tensor([[near * 1 + (1 - near) * 5], [near * 8 + (1 - near) * 7]])
    torch.testing.assert_close(answer["prototypes"], expected)


def test_factors_are_averaged_by_samples(method):
    rows = torch.zeros(1, 1)
    (answer, _) = method.aggregate([upload(0, [1, 0], rows, rows, 4.0), upload(1, [0, 3], rows, rows, 8.0)], START)
    assert torch.equal(answer["lora.0.up.0"], torch.full((2, 1), 7.0))


def test_before_training_the_model_is_the_frozen_vit(method):
    net = method.build_net(0, StreamShape(6, 2, 2)).eval()
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    bare = net(images, None, 0).features
    torch.testing.assert_close(net(images).features, bare, rtol=0, atol=0)
    torch.testing.assert_close(
        net(images).features, net.foundation.features(net.frozen_prefix(images), 0), rtol=1e-5, atol=1e-5
    )


class Watched(PILoRA):
    """Keeps the nets' states and logits at every task's start and end."""

    def begin_task(self, client):
        self.note(client)
        super().begin_task(client)

    def end_task(self, client):
        self.note(client)

    def note(self, client):
        state = {name: value.clone() for name, value in client.net.state_dict().items()}
        self.seen.append((state, logits_of(client)))


def logits_of(client):
    return torch.cat([output.logits for _, output in client.infer(client.data.test_ids(0))])


def test_a_task_leaves_earlier_modules_and_prototypes_alone(foundation_config, federate, make_data):
    """Classes are private here: a class that clients share may come back in another's later task."""
    method = Watched(foundation=foundation_config, **TINY)
    method.seen = []
    trainer = federate(method, make_data(private_classes=2, public_classes=0, num_clients=2), rounds_per_task=2)
    (first, _), (second, _) = trainer.method.seen[2], trainer.method.seen[-1]  # at the end of each task; all nets agree
    for name in [name for name in first if name.startswith("lora.")]:
        assert torch.equal(first[name], second[name]) == name.endswith((".0", "share")), name
    old = torch.cat([client.data.classes(0) for client in trainer.clients])
    new = torch.cat([client.data.classes(1) for client in trainer.clients])
    rows = (first["head.weight"] != second["head.weight"]).any(1)
    assert not rows[old].any() and rows[new].all()


def test_a_task_starts_as_the_last_one_ended(foundation_config, federate):
    method = Watched(foundation=foundation_config, **TINY)
    method.seen = []
    federate(method)
    ends, begins = method.seen[2:4], method.seen[4:6]  # two clients: begin, begin, end, end, begin, begin
    for (_, at_end), (_, at_begin) in zip(ends, begins, strict=True):
        assert torch.equal(at_end, at_begin)


def test_lora_counts_at_evaluation_after_every_task(foundation_config, federate):
    """The released evaluation knows the first task's module only."""
    trainer = federate(PILoRA(foundation=foundation_config, **(TINY | {"lora_lr": 0.05})))
    client = trainer.clients[0]
    full = logits_of(client)
    for layer in client.net.lora:
        torch.nn.init.zeros_(layer.up[1])
    assert not torch.equal(logits_of(client), full)


def test_payload_is_the_tasks_module_and_its_classes_rows(foundation_config, federate):
    trainer = federate(PILoRA(foundation=foundation_config, **TINY))
    client = trainer.clients[0]
    width, rank, classes = 64, 4, len(client.data.class_counts(0).nonzero())
    payload = trainer.method.upload(client)
    assert sum(value.numel() for value in payload.values()) == 4 * rank * width + classes * 2 * width
    assert not any(name.startswith("lora.") and not name.endswith(".1") for name in payload)


def test_class_means_are_of_raw_features(foundation_config, federate):
    client = federate(PILoRA(foundation=foundation_config, **TINY)).clients[0]
    classes, means = class_means(client, client.train_ids, unit=False)
    batch = client.data.fetch(client.train_ids)
    with torch.no_grad():
        features = client.net(batch.images).features
    for label, mean in zip(classes, means, strict=True):
        torch.testing.assert_close(mean, features[batch.labels == label].mean(0), rtol=1e-4, atol=1e-4)


def test_it_learns_the_first_task(foundation_config, federate, make_data):
    method = PILoRA(foundation=foundation_config, **(TINY | {"local_epochs": 5}))
    trainer = federate(method, make_data(train_per_class=16), rounds_per_task=2, max_tasks=1)
    assert trainer.matrix.of("task_il")[:, 0, 0].mean() > 0.75


def test_competing_prototypes_matter_from_the_second_task_on(make, federate):
    """After one task `seen` and `task` are equal bit for bit; in the second, earlier prototypes compete."""
    ends = []
    for competing in ("seen", "task"):
        method, states = make(competing=competing), []
        method.end_task = lambda client, states=states: states.append(deepcopy(client.net.state_dict()))
        federate(method)
        ends.append(states)
    equal = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(*ends, strict=True)]
    clients = len(equal) // 2
    assert equal == [True] * clients + [False] * clients


def test_an_unknown_set_of_prototypes_is_refused(make):
    with pytest.raises(ValueError, match="competing must be one of seen, task, got 'all'"):
        make(competing="all")
