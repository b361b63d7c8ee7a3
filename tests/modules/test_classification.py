from copy import deepcopy

import pytest
import torch

from fedlscl.federated.method import Stage
from fedlscl.modules import (
    ClassificationModule,
    ConsolidationModule,
    DistillationModule,
    ProximalModule,
    trainable,
)

CLASSES = torch.tensor([1, 4])


@pytest.fixture
def batch(batches):
    """Six images whose labels are two neighbouring columns."""
    first = next(iter(batches()))
    return first._replace(labels=CLASSES[torch.arange(len(first.labels)) % 2])


@pytest.fixture
def moved(small_net):
    """A copy of the net a step away from it, with its importances."""
    anchor = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in trainable(small_net).items()}
    fisher = {name: torch.rand_like(p) for name, p in anchor.items() if not name.startswith("head.")}
    return anchor, fisher


def gradients(module, batch, net):
    return dict(
        zip(
            trainable(net),
            torch.autograd.grad(module.training_step(batch)["loss"], list(trainable(net).values())),
            strict=True,
        )
    )


def trained(module, loader, engine, epochs=2):
    engine.train(Stage("train", module, loader, epochs))
    return module.net.state_dict()


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def with_labels(loader, labels=CLASSES):
    return [batch._replace(labels=labels[torch.arange(len(batch.labels)) % 2]) for batch in loader]


def test_logit_rows_of_other_classes_do_not_move(small_net, batches, engine):
    before = deepcopy(small_net.head.state_dict())
    trained(ClassificationModule(small_net, CLASSES), with_labels(batches()), engine)
    for name, value in small_net.head.state_dict().items():
        moved = (value != before[name]).reshape(6, -1).any(1)
        assert moved.tolist() == [label in CLASSES for label in range(6)]


def test_gradient_of_the_pull_is_mu_times_the_distance(small_net, batch):
    small_net.eval()
    module = ProximalModule(small_net, mu=0.7, classes=CLASSES)
    start = {name: p.detach().clone() for name, p in trainable(small_net).items()}
    with torch.no_grad():
        for parameter in small_net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    plain = gradients(ClassificationModule(small_net, CLASSES), batch, small_net)
    pulled = gradients(module, batch, small_net)
    for name, parameter in trainable(small_net).items():
        expected = plain[name] + 0.7 * (parameter.detach() - start[name])
        torch.testing.assert_close(pulled[name], expected, rtol=1e-4, atol=1e-6)


def test_the_first_step_is_the_same_for_every_pull(small_net, batches, engine):
    first = with_labels(batches())[:1]
    states = [trained(ProximalModule(deepcopy(small_net), mu, CLASSES), first, engine, 1) for mu in (0.0, 1.0, 1e3)]
    assert same(states[0], states[1]) and same(states[0], states[2])


def test_a_stronger_pull_keeps_the_weights_nearer(small_net, batches, engine):
    start = {name: p.detach().clone() for name, p in trainable(small_net).items()}

    def distance(mu):
        net = deepcopy(small_net)
        trained(ProximalModule(net, mu, CLASSES), with_labels(batches()), engine, 3)
        return sum((p.detach() - start[name]).square().sum() for name, p in trainable(net).items()).sqrt().item()

    distances = [distance(mu) for mu in (0.0, 0.1, 10.0)]
    assert distances[0] > distances[1] > distances[2] > 0


def test_running_statistics_are_not_pulled(small_net, batch):
    module = ProximalModule(small_net, mu=0.7).eval()
    for buffer in small_net.buffers():
        buffer.add_(1)
    assert module.loss(batch)["proximal"].item() == 0.0


@pytest.mark.parametrize("freed", ["proximal", "consolidation", "distillation"])
def test_a_term_of_weight_zero_trains_the_same_bits_as_none(freed, small_net, moved, batches, engine):
    loader, plain = with_labels(batches()), deepcopy(small_net)
    modules = {
        "proximal": lambda: ProximalModule(small_net, 0.0, CLASSES),
        "consolidation": lambda: ConsolidationModule(small_net, *moved, 0.0, CLASSES),
        "distillation": lambda: DistillationModule(
            small_net, deepcopy(small_net), torch.tensor([0, 2]), 0.0, 2.0, CLASSES
        ),
    }
    expected = trained(ClassificationModule(plain, CLASSES), loader, engine)
    assert same(expected, trained(modules[freed](), loader, engine))


def test_gradient_of_the_consolidation_is_strength_times_fisher_times_the_distance(small_net, moved, batch):
    small_net.eval()
    anchor, fisher = moved
    plain = gradients(ClassificationModule(small_net, CLASSES), batch, small_net)
    kept = gradients(ConsolidationModule(small_net, anchor, fisher, 3.0, CLASSES), batch, small_net)
    for name, parameter in trainable(small_net).items():
        pull = 3.0 * fisher.get(name, torch.zeros(())) * (parameter.detach() - anchor[name])
        torch.testing.assert_close(kept[name], plain[name] + pull, rtol=1e-4, atol=1e-6)


def test_consolidation_at_its_anchor_is_exactly_zero(small_net, moved, batch):
    anchor = {name: p.detach().clone() for name, p in trainable(small_net).items()}
    module = ConsolidationModule(small_net, anchor, moved[1], 100.0)
    assert module.loss(batch)["consolidation"].item() == 0.0


def test_anchors_and_importances_do_not_train(small_net, moved, batches, engine):
    before = {name: value.clone() for part in moved for name, value in part.items()}
    module = ConsolidationModule(small_net, *moved, 3.0, CLASSES)
    trained(module, with_labels(batches()), engine)
    after = {name: value for part in moved for name, value in part.items()}
    assert same(before, after)
    assert same(dict(zip(module.names, module.fisher, strict=True)), moved[1])


def test_distillation_from_itself_is_exactly_zero_without_running_statistics(small_net, batch):
    module = DistillationModule(small_net, deepcopy(small_net), torch.tensor([0, 2]), 1.0, 2.0, CLASSES).eval()
    assert module.loss(batch)["distillation"].item() == 0.0


def test_distillation_is_weighted_and_over_old_columns_alone(small_net, batch):
    teacher = deepcopy(small_net)
    torch.nn.init.normal_(teacher.head.weight)
    old = torch.tensor([0, 2, 5])

    def term(alpha):
        return DistillationModule(small_net, teacher, old, alpha, 2.0).eval().loss(batch)["distillation"].item()

    small_net.eval(), teacher.eval()
    student, answers = small_net(batch.images).logits[:, old] / 2, teacher(batch.images).logits[:, old] / 2
    kl = (answers.softmax(1) * (answers.log_softmax(1) - student.log_softmax(1))).sum(1).mean()
    assert term(1.0) == pytest.approx(4 * kl.item(), rel=1e-4)
    assert term(0.25) == pytest.approx(kl.item(), rel=1e-4)


def test_columns_that_are_neither_new_nor_old_get_no_gradient(small_net, batch):
    teacher = deepcopy(small_net)
    torch.nn.init.normal_(teacher.head.weight)
    module = DistillationModule(small_net, teacher, torch.tensor([0, 2]), 1.0, 2.0, CLASSES).eval()
    module.training_step(batch)["loss"].backward()
    touched = small_net.head.weight.grad.any(1) & (small_net.head.bias.grad != 0)
    assert touched.tolist() == [True, True, True, False, True, False]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_one_forward_pass_per_step(small_net, moved, batch):
    """A second one would count the batch twice in BatchNorm."""
    old = torch.tensor([0, 2])
    for module in (
        ProximalModule(small_net, 0.1),
        ConsolidationModule(small_net, *moved, 0.1),
        DistillationModule(small_net, deepcopy(small_net), old, 1.0, 2.0),
    ):
        module.train()
        counter = next(value for name, value in small_net.named_buffers() if "tracked" in name)
        before = counter.item()
        module.training_step(batch)
        assert counter.item() == before + 1
