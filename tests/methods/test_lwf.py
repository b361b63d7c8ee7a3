import torch

from fedlscl.methods import LwF
from fedlscl.modules import ClassificationModule, DistillationModule


def test_the_teacher_is_the_global_net_at_the_end_of_the_last_task(federate, small):
    method, modules, ends = LwF(alpha=0.5, temperature=3.0, **small), [], []
    stages, end_task = method.stages, method.end_task

    def watched(client):
        for stage in stages(client):
            modules.append((client.task, stage.module, client.old))
            yield stage

    def note(client):
        ends.append({name: value.clone() for name, value in client.net.state_dict().items()})
        end_task(client)

    method.stages, method.end_task = watched, note
    federate(method, rounds_per_task=2)
    first, second = modules[:4], modules[4:]
    assert all(task == 0 and type(module) is ClassificationModule for task, module, _ in first)
    for _, module, old in second:
        assert type(module) is DistillationModule
        assert (module.alpha, module.temperature) == (0.5, 3.0)
        assert torch.equal(module.old_classes, old) and len(old) == 2
        teacher = module.previous.net.state_dict()
        assert all(torch.equal(teacher[name], ends[0][name]) for name in teacher)
