from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from fedlscl.data import Batch
from fedlscl.federated.method import Stage
from fedlscl.methods import MFCL, TARGET
from fedlscl.methods.mfcl import MimickingModule, SynthesisModule
from fedlscl.methods.target import (
    CLASSES,
    IMAGES,
    GeneratorWithTeacher,
    ImitationModule,
    InversionModule,
    Synthesizer,
    SyntheticDistillationModule,
)
from fedlscl.modules import ClassificationModule

COLUMNS = torch.tensor([1, 4])


@pytest.fixture
def slow():
    torch.manual_seed(0)
    return Synthesizer(8, (8, 4), 16)


@pytest.fixture
def noise():
    torch.manual_seed(1)
    labels = COLUMNS[torch.arange(6) % 2]
    return Batch(torch.randn(6, 8), labels, torch.full_like(labels, -1))


def inversion(small_net, slow, **changed):
    weights = {"lambda_label": 1.0, "lambda_norm": 0.1, "lambda_adversarial": 1.0, "synthesis_lr": 1e-3}
    generator = GeneratorWithTeacher(deepcopy(slow), small_net, batch_size=6)
    torch.manual_seed(2)
    student = deepcopy(small_net)
    torch.nn.init.normal_(student.head.weight)
    return InversionModule(generator, student, COLUMNS, (), TARGET(**weights | changed), is_warm=True)


def test_gradients_of_every_step_add_up_for_the_synthesizer_that_stays(small_net, slow, noise, engine):
    module, sums = inversion(small_net, slow), [torch.zeros_like(p) for p in slow.parameters()]
    original = module.on_before_optimizer_step

    def watched(optimizer):
        for total, fast in zip(sums, module.net.synthesizer.parameters(), strict=True):
            total += fast.grad
        original(optimizer)

    module.on_before_optimizer_step = watched
    before = [p.detach().clone() for p in slow.parameters()]
    engine.train(Stage("synthesis", module, [noise] * 3, 1))
    assert all(torch.equal(p, old) for p, old in zip(slow.parameters(), before, strict=True))
    assert all(torch.equal(found, total) for found, total in zip(module.gradients, sums, strict=True))
    fast = module.net.synthesizer.parameters()
    assert any(not torch.equal(p, old) for p, old in zip(fast, before, strict=True))
    assert module.net.shift.abs().sum() > 0


def test_the_batch_of_the_lowest_objective_is_kept(small_net, slow, noise, engine):
    module, images, losses = inversion(small_net, slow, synthesis_lr=0.5), [], []
    module.net.register_forward_hook(lambda net, inputs, output: images.append(output.images.detach()))
    step = module.training_step
    module.training_step = lambda *batch: losses.append((terms := step(*batch))["loss"].item()) or terms
    engine.train(Stage("synthesis", module, [noise] * 5, 1))
    best = losses.index(min(losses))
    assert best not in (0, 4) or len(set(losses)) == 5
    assert torch.equal(module.best, images[best]) and module.lowest.item() == losses[best]


def test_rates_and_betas_are_targets(small_net, slow):
    groups = inversion(small_net, slow, synthesis_lr=0.002).configure_optimizers().param_groups
    assert sorted((group["lr"], group["betas"]) for group in groups) == [(0.002, (0.5, 0.999)), (0.01, (0.5, 0.999))]
    assert [len(group["params"]) for group in groups if group["lr"] == 0.01] == [1]


def test_a_student_of_weight_zero_is_not_asked(small_net, slow, noise):
    assert set(inversion(small_net, slow, lambda_adversarial=0).loss(noise)) == {"label", "norm"}
    assert inversion(small_net, slow).loss(noise)["adversarial"].item() <= 0


def test_a_student_comes_nearer_to_its_teacher_on_the_columns_it_learns(small_net, noise, engine):
    student = deepcopy(small_net)
    torch.manual_seed(3)
    torch.nn.init.normal_(student.head.weight)
    head = student.head.weight.detach().clone()
    images = (255 * torch.rand(6, 3, 16, 16)).to(torch.uint8)
    module, batch = ImitationModule(student, small_net, COLUMNS, 2.0, lr=0.01), noise._replace(images=images)
    losses = [engine.train(Stage("student", module, [batch] * 5, 1))["loss"] for _ in range(4)]
    assert losses[-1] < losses[0] / 2
    others = [c for c in range(6) if c not in COLUMNS]
    shrunk = 1 - (1 - student.head.weight[others] / head[others])  # weight decay alone moves them, all by one factor
    assert torch.allclose(shrunk, shrunk.mean().expand_as(shrunk), atol=1e-5)


def test_a_synthesizer_learns_what_it_is_asked_for(small_net, slow, noise, engine):
    options = MFCL(synthesis_temperature=1.0, lambda_norm=1.0, synthesis_lr=5e-3)
    module = SynthesisModule(GeneratorWithTeacher(slow, small_net), COLUMNS, options)
    teacher = {name: value.clone() for name, value in small_net.state_dict().items()}
    first = sum(term.item() for term in module.loss(noise).values())
    engine.train(Stage("synthesis", module, [noise] * 15, 1))
    assert sum(term.item() for term in module.loss(noise).values()) < first
    assert all(torch.equal(value, teacher[name]) for name, value in small_net.state_dict().items())


def test_terms_are_weighted(small_net, slow, noise):
    names = ("synthesis_temperature", "lambda_even", "lambda_norm", "lambda_smooth")
    plain, other = (
        SynthesisModule(GeneratorWithTeacher(slow, small_net), COLUMNS, MFCL(**dict(zip(names, values, strict=True))))
        .eval()
        .loss(noise)
        for values in ((1.0, 1.0, 1.0, 1.0), (1e6, 2.0, 3.0, 4.0))
    )
    for factor, name in enumerate(("evenness", "norm", "smoothness"), start=2):
        assert other[name].item() == pytest.approx(factor * plain[name].item(), rel=1e-5)
    assert other["certainty"].item() == pytest.approx(0.693147, rel=1e-4)  # log 2: two classes, logits flattened away


OLD, NEW = torch.tensor([0, 2]), torch.tensor([1, 4])
NEITHER = [3, 5]


@pytest.fixture
def batch(batches):
    first = next(iter(batches()))
    return first._replace(labels=NEW[torch.arange(len(first.labels)) % 2])


@pytest.fixture
def previous(small_net):
    """The net's own body below another head."""
    torch.manual_seed(1)
    net = deepcopy(small_net)
    torch.nn.init.normal_(net.head.weight)
    return net


def client(net, previous, num_batches=2, **memory):
    ids = torch.arange(32 * num_batches)
    memory = {CLASSES: OLD, **memory}
    return SimpleNamespace(net=net, previous=previous, classes=NEW, train_ids=ids, memory=memory)


@pytest.fixture
def target(small_net, previous):
    images = (255 * torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    return SyntheticDistillationModule(client(small_net, previous, 3, **{IMAGES: images}), TARGET())


@pytest.fixture
def mfcl(small_net, previous):
    torch.manual_seed(2)
    return MimickingModule(client(small_net, previous), Synthesizer(8, (8, 4), 16), MFCL(replay_size=5))


def gradients(module, batch, term):
    """Gradient of one term by the parameter's name."""
    module.net.zero_grad()
    module.loss(batch)[term].backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.net.named_parameters()
    }


def is_zero(rows):
    return not rows.any()


def test_distillation_on_synthetic_images_has_the_papers_gradient(target, batch):
    """(softmax(s / T) - softmax(t / T)) / (T B) on the old columns, nothing on the others, times alpha."""
    logits = []
    hook = target.net.head.register_forward_hook(
        lambda head, inputs, output: output.retain_grad() or logits.append(output)
    )
    images, asked = [], target._draw
    target._draw = lambda: images.append(asked()) or images[-1]
    target.net.eval()
    target.loss(batch)["distillation"].backward()
    hook.remove()
    real, made = logits
    assert real.grad is None or is_zero(real.grad)
    wanted = target.previous(images[0]).logits[:, OLD].div(2).softmax(1)
    expected = 25 * (made[:, OLD].div(2).softmax(1) - wanted) / (2 * len(images[0]))
    torch.testing.assert_close(made.grad[:, OLD], expected)
    assert is_zero(made.grad[:, [c for c in range(6) if c not in OLD]]) and expected.any()


def test_old_columns_learn_from_synthetic_images_and_new_ones_from_real_images(target, batch):
    kept, learned = (gradients(target, batch, term)["head.weight"] for term in ("distillation", "cross_entropy"))
    assert is_zero(kept[[*NEW.tolist(), *NEITHER]]) and kept[OLD].any(1).all()
    assert is_zero(learned[[*OLD.tolist(), *NEITHER]]) and learned[NEW].any(1).all()


def test_a_net_like_its_teacher_is_not_moved_by_distillation(small_net, batch):
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    same = client(small_net, deepcopy(small_net), **{IMAGES: images})
    module = SyntheticDistillationModule(same, TARGET()).eval()
    assert module.loss(batch)["distillation"].item() == 0.0
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(module, batch, "distillation").values())


def test_every_synthetic_image_is_seen_once_in_an_epoch(target):
    orders = [[target._draw() for _ in range(3)] for _ in range(2)]
    assert [len(part) for part in orders[0]] == [2, 2, 3]
    for parts in orders:
        assert sorted(map(hash_of, torch.cat(parts))) == sorted(map(hash_of, target.synthetic))
    assert not torch.equal(torch.cat(orders[0]), torch.cat(orders[1]))


def hash_of(image):
    return hash(image.numpy().tobytes())


def test_the_balanced_term_trains_the_head_alone(mfcl, batch):
    moved = gradients(mfcl, batch, "head")
    assert all(is_zero(gradient) for name, gradient in moved.items() if not name.startswith("head."))
    assert is_zero(moved["head.weight"][NEITHER]) and moved["head.weight"][[0, 1, 2, 4]].any(1).all()


def test_the_cross_entropy_leaves_rows_of_other_classes_alone(mfcl, batch):
    learned = gradients(mfcl, batch, "cross_entropy")
    assert is_zero(learned["head.weight"][[*OLD.tolist(), *NEITHER]]) and learned["head.weight"][NEW].any(1).all()
    assert any(gradient.any() for name, gradient in learned.items() if name.startswith("small."))


def test_the_features_term_trains_the_body_alone_and_is_zero_for_the_old_body(mfcl, batch):
    mfcl.eval()
    assert mfcl.loss(batch)["features"].item() == 0.0
    with torch.no_grad():
        for parameter in mfcl.net.small.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    moved = gradients(mfcl, batch, "features")
    assert is_zero(moved["head.weight"]) and is_zero(moved["head.bias"])
    assert any(gradient.any() for name, gradient in moved.items() if name.startswith("small."))


def test_the_features_term_is_the_literal_one(mfcl, batch):
    """0.1 / c_old times the mean over all images of the squared distance of old logits; no bias is left in it."""
    seen = []
    mfcl.eval().previous.register_forward_hook(lambda net, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        for parameter in mfcl.net.small.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        term = mfcl.loss(batch)["features"].item()
        ((images, before),) = seen
        head = mfcl.previous.net.head
        now = head(mfcl.net(images).features)[:, OLD]
        assert len(images) == len(batch.labels) + 5
        expected = 0.1 / 2 * (now - before.logits[:, OLD]).square().sum(1).mean().item()
    assert term == pytest.approx(expected, rel=1e-4)


def test_without_its_terms_target_is_plain_training(small_net, previous, batches, engine):
    """But for BatchNorm's running statistics, which synthetic images enter, too."""
    loader = [b._replace(labels=NEW[torch.arange(len(b.labels)) % 2]) for b in batches()]
    plain, other = deepcopy(small_net), deepcopy(small_net)
    engine.train(Stage("train", ClassificationModule(plain, NEW), loader, 1))
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    module = SyntheticDistillationModule(client(other, previous, **{IMAGES: images}), TARGET(alpha=0.0))
    engine.train(Stage("train", module, loader, 1))
    weights = dict(other.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in plain.named_parameters())
