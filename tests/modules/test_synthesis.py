from copy import deepcopy

import pytest
import torch

from fedlscl.data import Batch
from fedlscl.federated.method import Stage
from fedlscl.methods.data_free import (
    GeneratorWithTeacher,
    ImitationModule,
    InversionModule,
    SynthesisModule,
    Synthesizer,
)

CLASSES = torch.tensor([1, 4])


@pytest.fixture
def slow():
    torch.manual_seed(0)
    return Synthesizer(8, (8, 4), 16)


@pytest.fixture
def wish():
    torch.manual_seed(1)
    labels = CLASSES[torch.arange(6) % 2]
    return Batch(torch.randn(6, 8), labels, torch.full_like(labels, -1))


def inversion(small_net, slow, **changed):
    weights = {"lambda_label": 1.0, "lambda_norm": 0.1, "lambda_adversarial": 1.0, "lr_noise": 0.01, "lr": 1e-3}
    dreamer = GeneratorWithTeacher(deepcopy(slow), small_net, batch_size=6)
    torch.manual_seed(2)
    student = deepcopy(small_net)
    torch.nn.init.normal_(student.head.weight)
    return InversionModule(dreamer, student, slow, CLASSES, (), **(weights | changed))


def test_gradients_of_every_step_add_up_in_the_synthesizer_that_stays(small_net, slow, wish, engine):
    module, sums = inversion(small_net, slow), [torch.zeros_like(p) for p in slow.parameters()]
    original = module.on_before_optimizer_step

    def watched(optimizer):
        for total, fast in zip(sums, module.net.synthesizer.parameters(), strict=True):
            total += fast.grad
        original(optimizer)

    module.on_before_optimizer_step = watched
    before = [p.detach().clone() for p in slow.parameters()]
    engine.train(Stage("synthesis", module, [wish] * 3, 1))
    assert all(torch.equal(p, old) for p, old in zip(slow.parameters(), before, strict=True))
    assert all(torch.equal(p.grad, total) for p, total in zip(slow.parameters(), sums, strict=True))
    fast = module.net.synthesizer.parameters()
    assert any(not torch.equal(p, old) for p, old in zip(fast, before, strict=True))
    assert module.net.shift.abs().sum() > 0


def test_the_batch_of_the_lowest_objective_is_kept(small_net, slow, wish, engine):
    module, tried = inversion(small_net, slow, lr=0.5), []
    keep = module._keep
    module._keep = lambda images, loss: tried.append((loss.item(), images)) or keep(images, loss)
    engine.train(Stage("synthesis", module, [wish] * 5, 1))
    losses = [loss for loss, _ in tried]
    assert losses.index(min(losses)) not in (0, 4) or len(set(losses)) == 5
    assert torch.equal(module.best, min(tried, key=lambda pair: pair[0])[1]) and module.lowest.item() == min(losses)


def test_rates_and_betas_are_targets(small_net, slow):
    groups = inversion(small_net, slow, lr=0.002).configure_optimizers().param_groups
    assert sorted((group["lr"], group["betas"]) for group in groups) == [(0.002, (0.5, 0.999)), (0.01, (0.5, 0.999))]
    assert [len(group["params"]) for group in groups if group["lr"] == 0.01] == [1]


def test_a_student_of_weight_zero_is_not_asked(small_net, slow, wish):
    assert set(inversion(small_net, slow, lambda_adversarial=0).loss(wish)) == {"label", "norm"}
    assert inversion(small_net, slow).loss(wish)["adversarial"].item() <= 0


def test_a_student_comes_nearer_to_its_teacher_on_the_columns_it_learns(small_net, wish, engine):
    student = deepcopy(small_net)
    torch.manual_seed(3)
    torch.nn.init.normal_(student.head.weight)
    head = student.head.weight.detach().clone()
    images = (255 * torch.rand(6, 3, 16, 16)).to(torch.uint8)
    module, batch = ImitationModule(student, small_net, CLASSES, 2.0, lr=0.01), wish._replace(images=images)
    losses = [engine.train(Stage("student", module, [batch] * 5, 1))["loss"] for _ in range(4)]
    assert losses[-1] < losses[0] / 2
    others = [c for c in range(6) if c not in CLASSES]
    shrunk = 1 - (1 - student.head.weight[others] / head[others])  # weight decay alone moves them, all by one factor
    assert torch.allclose(shrunk, shrunk.mean().expand_as(shrunk), atol=1e-5)


def test_a_synthesizer_learns_what_it_is_asked_for(small_net, slow, wish, engine):
    module = SynthesisModule(GeneratorWithTeacher(slow, small_net), CLASSES, 1.0, 1.0, 1.0, 1e-3, lr=5e-3)
    teacher = {name: value.clone() for name, value in small_net.state_dict().items()}
    first = sum(term.item() for term in module.loss(wish).values())
    engine.train(Stage("synthesis", module, [wish] * 15, 1))
    assert sum(term.item() for term in module.loss(wish).values()) < first
    assert all(torch.equal(value, teacher[name]) for name, value in small_net.state_dict().items())


def test_terms_are_weighted(small_net, slow, wish):
    plain = SynthesisModule(GeneratorWithTeacher(slow, small_net), CLASSES, 1.0, 1.0, 1.0, 1.0).eval().loss(wish)
    other = SynthesisModule(GeneratorWithTeacher(slow, small_net), CLASSES, 1e6, 2.0, 3.0, 4.0).eval().loss(wish)
    for factor, name in enumerate(("evenness", "norm", "smoothness"), start=2):
        assert other[name].item() == pytest.approx(factor * plain[name].item(), rel=1e-5)
    assert other["certainty"].item() == pytest.approx(0.693147, rel=1e-4)  # log 2: two classes, logits flattened away
