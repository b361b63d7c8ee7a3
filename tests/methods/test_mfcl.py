import pytest
import torch

from fedlscl.methods import MFCL, FedAvg
from fedlscl.methods.mfcl import NET, MimickingModule
from fedlscl.methods.target import CLASSES
from fedlscl.modules import ClassificationModule
from tiny_methods import SMALL, SYNTHESIS

TINY = {"synthesis_steps": 3, "replay_size": 8, **SYNTHESIS}


class Watched(MFCL):
    """Notes the synthesizer before and after each training, and what clients train."""

    def synthesise(self, teacher, classes):
        before = dict(self.synthesizer)
        for stage in super().synthesise(teacher, classes):
            start = {name: v.clone() for name, v in stage.module.net.synthesizer.state_dict().items()}
            yield stage
        self.trainings.append((before, start, dict(self.synthesizer)))

    def stages(self, client):
        for stage in super().stages(client):
            self.modules.append((client.task, client.id, stage.module, dict(client.memory)))
            yield stage


@pytest.fixture(scope="module")
def run(federate, make_data):
    """Three tasks, so that the synthesizer is trained twice."""
    method = Watched(**TINY)
    method.trainings, method.modules = [], []
    data = make_data(num_tasks=3, fake_classes=8, private_classes=2, public_classes=4)
    return federate(method, data)


def test_the_first_task_is_fedavg(federate, same):
    plain, other = (federate(method, max_tasks=1, rounds_per_task=2) for method in (FedAvg(**SMALL), MFCL(**TINY)))
    assert same(plain, other) and torch.equal(plain.matrix.values.nan_to_num(-1), other.matrix.values.nan_to_num(-1))


def test_the_synthesizer_learns_from_task_to_task(run):
    (nothing, _, first), (before, start, second) = run.method.trainings
    assert not nothing and before.keys() == first.keys() == start.keys()
    for name, value in first.items():
        assert torch.equal(value, before[name]) and torch.equal(value, start[name])
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_clients_replay_with_the_net_that_came_down(run):
    (_, _, first), (_, _, second) = run.method.trainings
    for task, client, module, memory in run.method.modules:
        if task == 0:
            assert type(module) is ClassificationModule and not memory
            continue
        assert type(module) is MimickingModule
        state, expected = module.synthesizer.net.state_dict(), (first, second)[task - 1]
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        streams = [other.data for other in run.clients]
        old = torch.cat([stream.seen(task - 1) for stream in streams]).unique()
        assert torch.equal(memory[CLASSES], old) and torch.equal(module.old_classes, old)
        assert torch.equal(module.classes, streams[client].classes(task))
        assert torch.equal(module.known, torch.cat([old, module.classes]).unique())


def test_it_comes_down_once_per_task(run):
    weights = sum(value.numel() for value in run.method.synthesizer.values())
    down = run.run.traffic["down_values"][0, :, 0]
    old = [len(memory[CLASSES]) for task, client, _, memory in run.method.modules if client == 0 and task > 0]
    assert (down - down[2]).tolist() == [weights + old[0], weights + old[1], 0]
    assert {name for name in run.clients[0].memory if name.startswith(NET)} == {NET + n for n in run.method.synthesizer}
