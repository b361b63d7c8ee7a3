import pytest
import torch

from fedlscl.federated.method import StreamShape
from fedlscl.methods.prompts import FedL2P, PromptingModule, PromptPool
from fedlscl.nets.vit import fingerprint

TINY = {"pool": 12, "length": 2, "top": 2, "local_epochs": 2, "batch_size": 8}


@pytest.fixture
def make(foundation_config):
    return lambda **changed: FedL2P(foundation=foundation_config, **(TINY | changed))


@pytest.fixture
def start(make, make_data):
    """The state in which every client begins."""
    from fedlscl.federated.trainer import FederatedTrainer

    trainer = FederatedTrainer(accelerator="cpu")
    trainer.setup(make(), make_data(), seed=42)
    states = [client.net.state_dict() for client in trainer.clients]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    return states[0]


def test_without_lambda_keys_never_move(make, federate, start):
    trainer = federate(make(lambda_pull=0.0), rounds_per_task=2)
    for client in trainer.clients:
        assert torch.equal(client.net.pool.keys, start["pool.keys"])
        assert not torch.equal(client.net.pool.prompts, start["pool.prompts"])
    assert not torch.equal(federate(make()).clients[0].net.pool.keys, start["pool.keys"])


def test_prompts_that_no_client_chose_are_the_same_to_the_bit(make, federate, start, monkeypatch):
    chosen, choose = set(), PromptPool.choose

    def watched(pool, query):
        ids, match = choose(pool, query)
        if pool.training:
            chosen.update(ids.flatten().tolist())
        return ids, match

    monkeypatch.setattr(PromptPool, "choose", watched)
    (net, *_) = [client.net for client in federate(make(), rounds_per_task=2).clients]
    idle = [i for i in range(12) if i not in chosen]
    assert chosen and idle
    for name in ("pool.prompts", "pool.keys"):
        now = net.state_dict()[name]
        assert torch.equal(now[idle], start[name][idle])
        assert (now != start[name]).flatten(1).any(1)[sorted(chosen)].all()


def test_a_message_is_prompts_keys_and_head_and_the_vit_stays(make, federate):
    trainer = federate(make())
    client = trainer.clients[0]
    payload = trainer.method.upload(client)
    assert set(payload) == {"pool.prompts", "pool.keys", "head.weight", "head.bias"}
    width, classes = 64, 6
    assert trainer.run.traffic["up_values"][0, 0, 0] == 12 * 2 * width + 12 * width + classes * (width + 1)
    assert fingerprint(client.net.foundation.vit) == client.net.foundation.fingerprint


def test_the_cards_sizes(foundation_config):
    """3.9 Mbit for 100 classes at width 768; here the width is 64."""
    net = FedL2P(foundation=foundation_config).build_net(0, StreamShape(100))
    assert sum(p.numel() for p in net.parameters()) == 10 * 5 * 64 + 10 * 64 + 100 * 65
    assert 10 * 5 * 768 + 10 * 768 + 100 * 769 == 122_980


def test_clients_agree_after_the_server(make, federate):
    first, second = (client.net.state_dict() for client in federate(make()).clients)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_trains_with_a_clipped_pull_on_the_tasks_classes(make, federate):
    trainer = federate(make())
    client = trainer.clients[0]
    (stage,) = trainer.method.stages(client)
    module = stage.module
    assert type(module) is PromptingModule and (module.lambda_pull, module.max_norm) == (0.1, 1.0)
    assert torch.equal(module.classes, client.classes) and module.slot_of_class is None


def test_the_first_task_is_learned_better_than_by_chance(make, federate):
    trainer = federate(make(local_epochs=8, lr=0.01))
    assert trainer.matrix.of("task_il")[:, 0, 0].mean() > 0.7


def test_two_runs_are_the_same_to_the_bit(make, federate, same):
    assert same(federate(make()), federate(make()))


def test_bf16_runs(make, federate):
    trainer = federate(make(), precision="bf16-mixed")
    assert all(p.isfinite().all() for client in trainer.clients for p in client.net.parameters())
