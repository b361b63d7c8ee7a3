from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from fedlscl.federated.method import StreamShape
from fedlscl.functional.aggregation import weighted_average
from fedlscl.methods.fedbe import FedBE
from fedlscl.nets.vit import fingerprint

TINY = {"local_epochs": 1, "batch_size": 8, "num_expanded": 3, "block_lr": 1e-3, "lr": 0.01}


class Watched(FedBE):
    """Keeps every net as it is before and after training, and every message."""

    def stages(self, client):
        before = deepcopy(client.net.state_dict())
        yield from super().stages(client)
        self.turns.append((client, before, deepcopy(client.net.state_dict())))

    def aggregate(self, uploads, progress):
        answers = super().aggregate(uploads, progress)
        self.rounds.append((uploads, answers))
        return answers

    @property
    def uploads(self):
        return [upload for uploads, _ in self.rounds for upload in uploads]


def watch(federate, config, data, rounds_per_task=3, **options):
    method = Watched(foundation=config, **(TINY | options))
    method.turns, method.rounds = [], []
    return federate(method, data, rounds_per_task=rounds_per_task)


@pytest.fixture(scope="module")
def run(foundation_config, federate, make_data):
    """Three clients, of which the second can train two blocks."""
    return watch(federate, foundation_config, make_data(num_clients=3, fake_classes=8), capacities=(1, 2))


def block_of(name):
    return int(name.split(".")[1]) if name.startswith("expanded.") else None


def test_clients_train_and_send_their_blocks_and_the_head(run):
    for (client, before, after), upload in zip(run.method.turns, run.method.uploads, strict=True):
        blocks = upload.payload["blocks"].tolist()
        changed = {block_of(name) for name in before if not torch.equal(before[name], after[name])}
        sent = {block_of(name) for name in upload.payload if name.startswith(("expanded.", "head."))}
        assert changed == sent == {*blocks, None}
        assert len(blocks) == len(set(blocks)) == (2 if client.id == 1 else 1)


def test_every_block_is_allocated_in_every_round(run):
    """Capacities 1 + 2 + 1 suffice for three blocks."""
    for uploads, answers in run.method.rounds:
        for messages in (uploads, answers):
            blocks = [(m if isinstance(m, dict) else m.payload)["blocks"] for m in messages]
            assert set(torch.cat(blocks).tolist()) == {0, 1, 2}


def test_a_block_is_the_mean_of_those_who_trained_it(run):
    for uploads, answers in run.method.rounds:
        for block in range(3):
            trainers = [upload for upload in uploads if block in upload.payload["blocks"]]
            names = [name for name in answers[0] if block_of(name) == block]
            states = [{name: upload.payload[name] for name in names} for upload in trainers]
            expected = weighted_average(states, [upload.num_samples for upload in trainers])
            assert all(torch.equal(answer[name], expected[name]) for answer in answers for name in names)
            if len(trainers) == 1:
                assert all(torch.equal(answers[0][name], trainers[0].payload[name]) for name in names)


def test_a_block_that_no_client_trained_is_unchanged(foundation_config, federate, make_data):
    """Two clients of capacity one leave one of three blocks alone."""
    trainer = watch(federate, foundation_config, make_data(), capacities=(1,), rounds_per_task=1)
    uploads, answers = trainer.method.rounds[0]
    trained = set(torch.cat([upload.payload["blocks"] for upload in uploads]).tolist())
    assert trained == {0, 1} and {block_of(name) for name in answers[0]} == {0, 1, None}
    first, second = [before for client, before, _ in trainer.method.turns if client.id == 0]
    for name in first:
        if block_of(name) == 2:
            assert torch.equal(first[name], second[name])


def test_all_is_fedavg_on_blocks(foundation_config, federate, make_data):
    trainer = watch(federate, foundation_config, make_data(), allocation="all", rounds_per_task=1)
    uploads, answers = trainer.method.rounds[0]
    names = [name for name in uploads[0].payload if block_of(name) is not None]
    assert {block_of(name) for name in names} == {0, 1, 2}
    states = [{name: upload.payload[name] for name in names} for upload in uploads]
    expected = weighted_average(states, [upload.num_samples for upload in uploads])
    assert all(torch.equal(answers[0][name], expected[name]) for name in names)
    assert all(answer["blocks"].tolist() == [0, 1, 2] for answer in answers)


def test_a_client_without_samples_does_not_count(run):
    uploads, _ = run.method.rounds[0]
    nothing = torch.zeros_like(uploads[1].class_counts)
    idle = [uploads[0], replace(uploads[1], class_counts=nothing), uploads[2]]
    answer = FedBE(foundation=run.method.foundation, **TINY).aggregate(idle, None)[0]
    for name in answer:
        holders = [u for u in idle if u.num_samples and name in u.payload]
        if len(holders) == 1 and block_of(name) is not None:
            assert torch.equal(answer[name], holders[0].payload[name])
    others = torch.cat([upload.payload["blocks"] for upload in (uploads[0], uploads[2])]).tolist()
    hers = set(uploads[1].payload["blocks"].tolist()) - set(others)
    assert hers and not any(block_of(name) in hers for name in answer)


def test_importance_is_the_mean_reported_change(run):
    """RMS of what training moved, per block; the server keeps sums and numbers by client."""
    sums, times = torch.zeros(3, 3).double(), torch.zeros(3, 3)
    for (client, before, after), upload in zip(run.method.turns, run.method.uploads, strict=True):
        for block, change in zip(upload.payload["blocks"].tolist(), upload.payload["changes"], strict=True):
            names = [name for name in before if block_of(name) == block]
            moves = torch.cat([(after[name] - before[name]).flatten() for name in names])
            assert change.item() == pytest.approx(moves.square().mean().sqrt().item(), rel=1e-4) and change > 0
            sums[client.id, block] += change.double()
            times[client.id, block] += 1
    for client in range(3):
        torch.testing.assert_close(run.method.importance[client][0], sums[client])
        assert torch.equal(run.method.importance[client][1], times[client].double())


def test_untried_blocks_come_before_tried_ones(foundation_config, federate, make_data):
    """Their importance is 1: one client with one of three blocks a round has trained each after three."""
    data = make_data(num_clients=1, public_classes=0, private_classes=4)
    trainer = watch(federate, foundation_config, data, capacities=(1,))
    blocks = [uploads[0].payload["blocks"].item() for uploads, _ in trainer.method.rounds]
    assert sorted(blocks[:3]) == [0, 1, 2]


def test_the_allocation_outlives_a_restart(run, foundation_config):
    """It travels in the answer and stays in the client's memory; the server's reports are in its state."""
    (uploads, answers) = run.method.rounds[-1]
    for client, answer in zip(run.clients, answers, strict=True):
        assert torch.equal(client.state_dict()["memory"]["blocks"], answer["blocks"])
    before, after = FedBE(foundation=foundation_config, **TINY, capacities=(1, 2)), run.method
    before.load_state_dict(after.state_dict())
    assert before._allocate(uploads) == [answer["blocks"].tolist() for answer in answers]


def test_first_blocks_need_no_message(foundation_config):
    """Before the first allocation: consecutive blocks in the order of the clients."""
    method = FedBE(foundation=foundation_config, num_expanded=4, capacities=(2, 1))
    chosen = [method._blocks(type("Client", (), {"id": i, "memory": {}})) for i in range(4)]
    assert chosen == [[0, 1], [2], [0, 3], [1]]


def test_random_allocation_repeats_with_the_seed(foundation_config, federate, make_data):
    chosen = []
    for _ in range(2):
        trainer = watch(federate, foundation_config, make_data(), allocation="random", capacities=(2,))
        chosen.append([[a["blocks"].tolist() for a in answers] for _, answers in trainer.method.rounds])
    assert chosen[0] == chosen[1]
    assert all(len(set(blocks)) == 2 for answers in chosen[0] for blocks in answers)


def test_base_weights_never_change(run):
    vit = run.clients[0].net.foundation
    assert fingerprint(vit.vit) == vit.fingerprint
    assert all(p.grad is None and not p.requires_grad for p in vit.vit.parameters())


def test_it_learns_the_first_task(foundation_config, federate, make_data):
    method = FedBE(foundation=foundation_config, **(TINY | {"local_epochs": 4}))
    trainer = federate(method, make_data(train_per_class=16), rounds_per_task=2, max_tasks=1)
    assert trainer.matrix.of("task_il")[:, 0, 0].mean() > 0.75


@pytest.mark.parametrize(
    ("capacities", "message"),
    [((), "capacities must be one or more numbers, got none"), ((2, 0), r"capacities must be >= 1")],
)
def test_clients_without_blocks_are_refused(foundation_config, capacities, message):
    with pytest.raises(ValueError, match=message):
        FedBE(foundation=foundation_config, **TINY, capacities=capacities).build_net(0, StreamShape(6))
