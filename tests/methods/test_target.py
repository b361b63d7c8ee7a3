from dataclasses import replace

import pytest
import torch

from fedlscl.methods import TARGET, FedAvg
from fedlscl.methods.target import CLASSES, IMAGES, ImitationModule, InversionModule
from tiny_methods import SMALL, SYNTHESIS

SYNTHESIZED = {"synthesis_rounds": 3, "synthesis_steps": 2, "warmup_rounds": 1, "student_steps": 2, **SYNTHESIS}


class Watched(TARGET):
    """Notes what the server trains and answers."""

    def server_stages(self, uploads, progress):
        for stage in super().server_stages(uploads, progress):
            self.trained.append((progress, stage))
            yield stage

    def aggregate(self, uploads, progress):
        answers = super().aggregate(uploads, progress)
        self.answers.append((progress, answers))
        return answers


@pytest.fixture(scope="module")
def run(federate):
    method = Watched(**SYNTHESIZED)
    method.trained, method.answers = [], []
    return federate(method, rounds_per_task=2)


def test_the_first_task_is_fedavg(federate, same):
    plain, other = (
        federate(make(), max_tasks=1, rounds_per_task=2)
        for make in (lambda: FedAvg(**SMALL), lambda: TARGET(**SYNTHESIZED))
    )
    assert same(plain, other) and torch.equal(plain.matrix.values.nan_to_num(-1), other.matrix.values.nan_to_num(-1))


def test_the_server_trains_after_the_last_round_of_every_task_but_the_last(run):
    assert {progress.position for progress, _ in run.method.trained} == {(0, 1)}
    names = [stage.name for _, stage in run.method.trained]
    assert names == ["synthesis", "synthesis", "student", "synthesis", "student"]
    modules = [type(stage.module) for _, stage in run.method.trained]
    assert modules == [{"synthesis": InversionModule, "student": ImitationModule}[name] for name in names]
    warm = [stage.module.is_warm for _, stage in run.method.trained if stage.name == "synthesis"]
    assert warm == [False, True, True]


def test_sampled_classes_are_all_those_that_were_seen(run, make_data):
    seen = torch.cat([client.data.classes(0) for client in run.clients]).unique()
    method = replace(run.method, synthesis_batch=200)
    assert torch.equal(method._sample_batch(seen).labels.unique(), seen)
    for _, stage in run.method.trained:
        assert torch.equal(stage.module.classes, seen)
        if stage.name == "synthesis":
            assert torch.isin(stage.batches[0].labels, seen).all()
    assert torch.equal(run.clients[0].memory[CLASSES], seen)
    later = torch.cat([client.data.seen(1) for client in run.clients]).unique()
    assert torch.equal(run.method.seen.nonzero()[:, 0], later)


def test_the_teacher_is_the_new_global_net(run):
    _, answers = run.method.answers[1]
    teacher = run.method.trained[0][1].module.net.teacher.net.state_dict()
    assert all(torch.equal(teacher[name], answers[0][name]) for name in teacher)


def test_the_synthetic_set_comes_down_once_and_stays_with_the_clients(run):
    has_images = [[IMAGES in answer for answer in answers] for _, answers in run.method.answers]
    assert has_images == [[False, False], [True, True], [False, False], [False, False]]
    images = run.method.answers[1][1][0][IMAGES]
    assert images.shape == (3 * 8, 3, 16, 16) and images.dtype == torch.uint8 and len(images.unique()) > 10
    assert all(torch.equal(client.memory[IMAGES], images) for client in run.clients)
    down = run.run.traffic["down"][0]
    assert down[0, 1] - down[0, 0] > images.numel() and down[1, 0] == down[1, 1] == down[0, 0]


def test_a_foundation_is_refused(foundation_config):
    with pytest.raises(ValueError, match="TARGET does not support `foundation`: set `small_model`"):
        TARGET(foundation=foundation_config)
