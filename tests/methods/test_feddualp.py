import pytest
import torch

from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.methods.prompts import FedDualP
from fedlscl.nets.vit import fingerprint

TINY = {"general_length": 2, "expert_length": 2, "local_epochs": 2, "batch_size": 8}


@pytest.fixture
def make(foundation_config):
    return lambda **changed: FedDualP(foundation=foundation_config, **(TINY | changed))


class Watched(FederatedTrainer):
    """Keeps the first client's state as every task begins, as training in it begins, and as it ends."""

    def __init__(self):
        super().__init__(accelerator="cpu", rounds_per_task=2)
        self.states = {}

    def keep(self, moment):
        state = self.clients[0].net.state_dict()
        self.states[moment, self.run.progress.task] = {name: value.clone() for name, value in state.items()}

    def _learn_task(self, task, first_round):
        self.run.progress = type(self.run.progress)(task, first_round)
        self.keep("before")
        super()._learn_task(task, first_round)
        self.keep("after")

    def _call(self, hook, *arguments):
        if hook == "on_task_start":
            self.keep("begun")
        super()._call(hook, *arguments)


@pytest.fixture
def watch(make, make_data):
    def run(**changed):
        trainer = Watched()
        trainer.fit(make(**changed), make_data(), seed=42)
        return trainer

    return run


def by_slot(state):
    """Experts (slots, everything) and keys (slots, width)."""
    return state["expert.prompts"].transpose(0, 2).flatten(1), state["keys"]


def test_a_task_trains_its_own_slot_and_key_only(watch):
    trainer = watch()
    for task in (0, 1):
        begun, after = trainer.states["begun", task], trainer.states["after", task]
        for old, new in zip(by_slot(begun), by_slot(after), strict=True):
            assert (old != new).any(1).tolist() == [slot == task for slot in range(2)]
        assert (begun["general.prompts"] != after["general.prompts"]).any()


def test_a_task_starts_from_the_slot_before_it_but_with_its_own_key(watch):
    trainer = watch()
    (before, old_keys), (begun, keys) = (by_slot(trainer.states[moment, 1]) for moment in ("before", "begun"))
    assert torch.equal(begun[1], before[0]) and torch.equal(begun[0], before[0])
    assert not torch.equal(before[1], before[0])
    assert torch.equal(keys, old_keys) and not torch.equal(keys[1], keys[0])
    for name in ("general.prompts", "head.weight", "head.bias"):
        assert torch.equal(trainer.states["before", 1][name], trainer.states["begun", 1][name])


def test_the_copy_can_be_left_out(watch):
    trainer = watch(copy_previous=False)
    for name in ("expert.prompts", "keys"):
        assert torch.equal(trainer.states["before", 1][name], trainer.states["begun", 1][name])


def test_clients_hold_the_same_copy_when_a_task_begins(make, make_data):
    trainer = FederatedTrainer(accelerator="cpu", rounds_per_task=1, max_tasks=1)
    trainer.fit(make(), make_data())
    for client in trainer.clients:
        client.task = 1
        trainer.method.begin_task(client)
    first, second = (client.net.state_dict() for client in trainer.clients)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_lambda_keys_never_move_and_the_vit_stays(watch):
    trainer = watch(lambda_pull=0.0)
    assert torch.equal(trainer.states["before", 0]["keys"], trainer.states["after", 1]["keys"])
    foundation = trainer.clients[0].net.foundation
    assert fingerprint(foundation.vit) == foundation.fingerprint


def test_a_message_is_prefixes_keys_and_head(make, federate):
    trainer = federate(make())
    payload = trainer.method.upload(trainer.clients[0])
    assert set(payload) == {"general.prompts", "expert.prompts", "keys", "head.weight", "head.bias"}
    width, classes = 64, 6
    expected = 2 * 2 * 2 * width + 3 * 2 * 2 * 2 * width + 2 * width + classes * (width + 1)
    assert trainer.run.traffic["up_values"][0, 0, 0] == expected


@pytest.mark.parametrize(("length", "classes", "total"), [(5, 100, 211_300), (20, 200, 633_800)])
def test_the_cards_sizes(length, classes, total):
    assert 2 * 2 * 5 * 768 + 3 * 2 * 5 * length * 768 + 5 * 768 + classes * 769 == total


def test_slot_follows_the_clients_task_whatever_happened_before(make, federate):
    trainer = federate(make())
    client = trainer.clients[0]
    for task in (1, 0):
        client.task = task
        (stage,) = trainer.method.stages(client)
        assert stage.module.slot_of_class.tolist() == [task] * 6
        assert (stage.module.lambda_pull, stage.module.max_norm) == (1.0, 1.0)


def test_keys_have_a_rate_of_their_own(make, federate):
    trainer = federate(make(key_lr=0.5, lr=0.25))
    (stage,) = trainer.method.stages(trainer.clients[0])
    rates = {group["lr"]: len(group["params"]) for group in stage.module.configure_optimizers().param_groups}
    assert rates == {0.5: 1, 0.25: 4}


def test_images_of_the_only_trained_task_find_its_slot(make, federate):
    trainer = federate(make(local_epochs=20, key_lr=0.05), max_tasks=1)
    for client in trainer.clients:
        found = torch.cat([output.chosen[:, 0] for _, output in client.infer(client.data.test_ids(0))])
        assert (found == 0).all()


def test_the_first_task_is_learned_better_than_by_chance(make, federate):
    trainer = federate(make(local_epochs=8, lr=0.01))
    assert trainer.matrix.of("task_il")[:, 0, 0].mean() > 0.7


def test_two_runs_are_the_same_to_the_bit(make, federate, same):
    assert same(federate(make()), federate(make()))


def test_bf16_runs(make, federate):
    trainer = federate(make(), precision="bf16-mixed")
    assert all(p.isfinite().all() for client in trainer.clients for p in client.net.parameters())
