import pytest
import torch

from fedlscl.methods.fedavg import Local
from fedlscl.methods.joint import Joint, JointLSCL

TINY = {"small_model": "test_resnet", "small_image_size": 16, "local_epochs": 1, "batch_size": 8}


class Watched(Joint):
    """Keeps what was trained on, and the trainer's net at every start of training."""

    def stages(self, client):
        for stage in super().stages(client):
            ids = torch.cat([batch.ids for batch in stage.batches]).sort().values
            start = {name: value.clone() for name, value in client.net.state_dict().items()}
            self.turns.append((client.task, client.round, client.id, ids, stage.module.classes, start))
            yield stage


@pytest.fixture(scope="module")
def run(federate):
    method = Watched(**TINY)
    method.turns = []
    return federate(method, rounds_per_task=2)


def test_one_net_learns_everything_so_far(run):
    for task, _, client, ids, classes, _ in run.method.turns:
        streams = [client.data for client in run.clients]
        everything = torch.cat([stream.train_ids(n) for stream in streams for n in range(task + 1)])
        assert torch.equal(ids, everything.sort().values) and len(ids.unique()) == len(ids)
        assert torch.equal(classes, torch.cat([stream.seen(task) for stream in streams]).unique())
        assert client == 0
    assert [turn[:2] for turn in run.method.turns] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_everybody_gets_that_net(run):
    first, *others = [client.net.state_dict() for client in run.clients]
    assert others and all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("from_scratch", [True, False])
def test_a_task_begins_with_fresh_weights(federate, from_scratch):
    method = Watched(**TINY, from_scratch=from_scratch)
    method.turns, ended = [], []
    method.end_task = lambda client: ended.append(client.net.state_dict()["head.weight"].clone())
    method = federate(method).method
    begin = method.turns[1][-1]["head.weight"]
    assert torch.equal(begin, ended[0]) != from_scratch
    if from_scratch:
        assert not torch.equal(begin, method.turns[0][-1]["head.weight"])  # and not the same ones again


def test_the_pool_is_server_state(run):
    fresh = Joint(**TINY)
    fresh.load_state_dict(run.method.state_dict())
    assert fresh.pool.keys() == {"ids", "classes"}
    assert all(torch.equal(fresh.pool[name], run.method.pool[name]) for name in fresh.pool)


def test_samples_of_a_task_enter_the_pool_once(run):
    pool = {name: value.clone() for name, value in run.method.pool.items()}
    for client in run.clients[1:]:
        run.method.begin_task(client)
    assert all(torch.equal(pool[name], run.method.pool[name]) for name in pool)


def test_only_the_one_net_travels_up(run):
    up = run.run.traffic["up"]
    assert (up[0] > 0).all() and not up[1:].any()


@pytest.mark.parametrize("on_vit", [False, True])
def test_it_bounds_training_alone(federate, foundation_config, make_data, on_vit):
    options = TINY | {"local_epochs": 4} | ({"foundation": foundation_config, "lr": 0.01} if on_vit else {})
    final = [
        federate(method, make_data(train_per_class=16), rounds_per_task=2).matrix.of("class_il")[:, 1].nanmean()
        for method in (Joint(**options), Local(**options))
    ]
    assert final[0] > 0.75 and final[0] > final[1]


def test_the_collaborator_learns_the_pool_and_all_clients_get_it(federate, collaborator_config):
    method = JointLSCL(collaborator=collaborator_config, local_epochs=1, batch_size=8)
    trainer = federate(method)
    first, *others = [client.net for client in trainer.clients]
    assert first.generator.weight[first.generator.shapes[0].down_size :].any()  # zeros before any training
    for other in others:
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in first.state_dict().items())
    assert (trainer.run.traffic["up"][0] > 0).all() and not trainer.run.traffic["up"][1:].any()
