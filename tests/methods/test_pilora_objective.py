import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedlscl.federated.method import Stage
from fedlscl.methods.pilora import PILoRA, PrototypeHead, PrototypeModule, overlap, prototype_distances
from fedlscl.nets.lora_vit import LoraViT
from fedlscl.nets.vit import foundation

CLASSES = torch.tensor([1, 3, 4])


@pytest.fixture
def net(foundation_config):
    """Three tasks, of which two were trained."""
    torch.manual_seed(0)
    head = PrototypeHead(foundation(foundation_config).width, 6, temperature=0.5)
    net = LoraViT(foundation_config, head, rank=2, blocks=(0,), targets=("attn.q", "attn.v"), num_tasks=3)
    for layer in net.lora:
        for factor in layer.up[:2]:
            nn.init.normal_(factor, std=0.1)
    net.set_trainable(2)
    return net


@pytest.fixture
def batch(data):
    ids = torch.arange(len(data.data.train_labels))
    return data.fetch(ids[torch.isin(data.data.train_labels, CLASSES)][:9])


@given(st.integers(1, 3), st.integers(0, 3), st.integers(4, 9), st.integers(0, 99))
def test_overlap_is_the_entrywise_norm_of_all_products(rank, num_earlier, width, seed):
    torch.manual_seed(seed)
    current, earlier = torch.randn(rank, width), [torch.randn(rank, width) for _ in range(num_earlier)]
    exact = sum(abs(float(a @ b)) for factor in earlier for a in factor for b in current)
    assert overlap(current, earlier).item() == pytest.approx(exact, rel=1e-4, abs=1e-4)


def test_orthogonal_factors_do_not_overlap():
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert overlap(basis[:2], [basis[2:4], basis[4:6]]).item() < 1e-12
    assert overlap(basis[:2], []).item() == 0.0


def test_overlap_moves_the_current_factor_only():
    earlier, current = (nn.Parameter(torch.randn(2, 8)) for _ in range(2))
    overlap(current, [earlier]).backward()
    assert earlier.grad is None and current.grad.abs().sum() > 0


def test_earlier_prototypes_compete_and_get_no_gradient(net, batch):
    """All classes met so far are columns; the prototypes of other tasks stay as they are."""
    seen = torch.tensor([0, 1, 2, 3, 4])
    module = PrototypeModule(net, 2, PILoRA(), seen, CLASSES)
    terms = module.loss(batch)
    distances = (net(batch.images).features[:, None] - net.head.weight).square().mean(2).sqrt()
    expected = nn.functional.cross_entropy(-distances[:, seen] / 0.5, batch.labels)
    assert terms["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-4)
    sum(terms.values()).backward()
    moved = net.head.weight.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == CLASSES.tolist()


def test_terms_are_those_of_the_paper(net, batch):
    module = PrototypeModule(net, 2, PILoRA(lambda_prototype=0.3, gamma_orthogonal=0.5, lambda_sparse=0.7), CLASSES)
    terms = module.loss(batch)
    features = net(batch.images).features
    distances = (features[:, None] - net.head.weight).square().mean(2).sqrt()
    columns = torch.searchsorted(CLASSES, batch.labels)
    expected = nn.functional.cross_entropy(-distances[:, CLASSES] / 0.5, columns)
    assert terms["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-4)
    own = torch.stack([row[label] for row, label in zip(distances, batch.labels, strict=True)]).mean()
    assert terms["prototype"].item() == pytest.approx(0.3 * own.item(), rel=1e-4)
    query, value = net.lora
    pairs = [(layer.down[s], layer.down[2]) for layer in (query, value) for s in (0, 1)]
    crossed = sum((a @ b.mT).abs().sum() for a, b in pairs)
    assert terms["orthogonality"].item() == pytest.approx(0.5 * crossed.item(), rel=1e-4)
    sizes = query.down[2].abs().sum() + value.down[2].abs().sum()
    assert terms["sparsity"].item() == pytest.approx(0.7 * sizes.item(), rel=1e-4)


def test_the_first_task_has_nothing_to_be_orthogonal_to(net, batch):
    net.set_trainable(0)
    assert PrototypeModule(net, 0, PILoRA(), CLASSES).loss(batch)["orthogonality"].item() == 0.0


def test_training_moves_this_tasks_factors_and_prototypes_alone(net, engine, data, batch):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    module = PrototypeModule(net, 2, PILoRA(lr=1e-2, lora_lr=1e-3), CLASSES)
    engine.train(Stage("train", module, [batch, batch, batch], 2))
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"lora.{n}.{kind}.2" for n in (0, 1) for kind in ("down", "up")} | {"head.weight"}
    rows = (net.head.weight != before["head.weight"]).any(1).nonzero().flatten()
    assert torch.equal(rows, CLASSES)


def test_a_stock_trainer_runs_it(net, data, stock):
    before = net.head.weight.detach().clone()
    trainer = stock()
    trainer.fit(PrototypeModule(net, 2, PILoRA()), datamodule=data.at(0, 0))
    assert trainer.callback_metrics["train/orthogonality"] > 0
    assert not torch.equal(net.head.weight, before)


def test_bfloat16(net, batch):
    with torch.autocast("cpu", torch.bfloat16):
        terms = PrototypeModule(net, 2, PILoRA(), CLASSES).training_step(batch)
    terms["loss"].backward()
    assert terms["loss"].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_distances_are_root_mean_squares(batch, classes, width, seed):
    x, y = random(batch, width, seed=seed), random(classes, width, seed=seed + 1)
    exact = (x[:, None] - y).square().mean(2).sqrt()
    torch.testing.assert_close(prototype_distances(x, y), exact)


@given(st.integers(2, 8), st.integers(0, 99))
def test_prediction_is_invariant_to_a_rotation_of_features_and_prototypes(width, seed):
    x, y = random(20, width, seed=seed), random(5, width, seed=seed + 1)
    rotation = torch.linalg.qr(random(width, width, seed=seed + 2)).Q
    plain, rotated = prototype_distances(x, y), prototype_distances(x @ rotation, y @ rotation)
    torch.testing.assert_close(plain, rotated, rtol=1e-9, atol=1e-9)
    assert torch.equal(plain.argmin(1), rotated.argmin(1))


def test_a_sample_on_its_prototype_has_a_finite_gradient():
    """Where the expanded square would round below zero, and a root has an infinite slope."""
    head = PrototypeHead(192, 3)
    torch.nn.init.constant_(head.weight, 1234.567)
    features = head.weight.detach().clone().requires_grad_(True)
    logits = head(features)
    assert logits.isfinite().all() and (logits <= 0).all()
    logits.sum().backward()
    assert features.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_distances_are_in_float32_in_any_precision():
    torch.manual_seed(0)
    head, features = PrototypeHead(64, 5), torch.randn(7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(features)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, head(features))


def test_temperature_divides_distances_alone():
    torch.manual_seed(0)
    head, features = PrototypeHead(8, 5, temperature=1.0), torch.randn(7, 8)
    cold = PrototypeHead(8, 5, temperature=0.5)
    cold.load_state_dict(head.state_dict())
    torch.testing.assert_close(cold(features), 2 * head(features))


def test_prototypes_start_small():
    torch.manual_seed(0)
    head = PrototypeHead(500, 100)
    assert abs(head.weight.std().item() - 0.1) < 0.001 and head.weight.shape == (100, 500)
