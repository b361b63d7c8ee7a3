import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.functional.objectives import (
    consistency,
    consolidation,
    cross_entropy,
    knowledge_distillation,
    proximal,
)
from reference import objectives as literal


@st.composite
def classified(draw):
    """Logits (B, C) float64, sorted classes, and labels among them."""
    num_classes, size = draw(st.integers(2, 8)), draw(st.integers(1, 6))
    classes = sorted(draw(st.sets(st.integers(0, num_classes - 1), min_size=1)))
    labels = draw(st.lists(st.sampled_from(classes), min_size=size, max_size=size))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = 3 * torch.randn(size, num_classes, generator=random)
    return logits, torch.tensor(labels), torch.tensor(classes)


@given(classified())
def test_cross_entropy_is_eq3(case):
    logits, labels, classes = case
    for chosen, columns in ((classes, classes.tolist()), (None, range(logits.shape[1]))):
        expected = pytest.approx(literal.eq3(logits, labels, columns), rel=1e-4, abs=1e-6)
        assert cross_entropy(logits, labels, chosen).item() == expected


@given(classified(), st.data())
def test_counts_balance_the_softmax(case, data):
    """-log n_y exp(z_y) / sum_c n_c exp(z_c); a class without samples counts as one."""
    logits, labels, classes = case
    width = logits.shape[1]
    counts = data.draw(st.lists(st.integers(0, 300), min_size=width, max_size=width))
    shifted = logits + torch.tensor([max(n, 1) for n in counts]).log()
    expected = literal.eq3(shifted, labels, classes.tolist())
    found = cross_entropy(logits, labels, classes, torch.tensor(counts)).item()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(classified())
def test_columns_outside_the_classes_get_no_gradient(case):
    logits, labels, classes = case
    logits[:, ~torch.isin(torch.arange(logits.shape[1]), classes)] = torch.inf
    logits.requires_grad_(True)
    cross_entropy(logits, labels, classes).backward()
    outside = ~torch.isin(torch.arange(logits.shape[1]), classes)
    assert not logits.grad[:, outside].any()
    assert logits.grad.isfinite().all()


@given(classified())
def test_sample_losses_are_the_cross_entropies_of_single_samples(case):
    logits, labels, classes = case
    losses = cross_entropy(logits, labels, classes, reduction="none")
    for row, label, loss in zip(logits, labels, losses, strict=True):
        assert loss.item() == pytest.approx(cross_entropy(row[None], label[None], classes).item(), rel=1e-5, abs=1e-6)


@given(st.integers(1, 5), st.integers(0, 6), st.data())
def test_consistency_is_the_mean_squared_distance_of_the_chosen(size, width, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    now, before = torch.randn(2, size, width, generator=random)
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    rows = [literal.squared_distance(*pair) for pair in zip(now.tolist(), before.tolist(), strict=True)]
    picked = [row for row, is_chosen in zip(rows, chosen, strict=True) if is_chosen]
    expected = sum(picked) / len(picked) if picked else 0.0
    assert consistency(now, before, chosen).item() == pytest.approx(expected)
    assert consistency(now, now.clone(), chosen).item() == 0.0


def test_consistency_without_a_chosen_row_has_gradient_zero():
    now = torch.randn(3, 4, requires_grad=True)
    consistency(now, torch.randn(3, 4), torch.zeros(3, dtype=torch.bool)).backward()
    assert torch.equal(now.grad, torch.zeros(3, 4))


@st.composite
def weights(draw):
    """Two or three tensors with anchors and non-negative importances, float64."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=3))

    def tensors():
        return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]

    return [w.requires_grad_(True) for w in tensors()], tensors(), [f.square() for f in tensors()]


@given(weights())
def test_gradient_of_the_proximal_term_is_the_distance_from_the_anchor(case):
    parameters, anchors, _ = case
    value = proximal(parameters, anchors)
    assert value.item() == pytest.approx(
        sum(0.5 * (w - a).square().sum().item() for w, a in zip(parameters, anchors, strict=True))
    )
    for gradient, w, anchor in zip(torch.autograd.grad(value, parameters), parameters, anchors, strict=True):
        assert torch.equal(gradient, w.detach() - anchor)


@given(weights())
def test_gradient_of_the_consolidation_is_fisher_times_the_distance(case):
    parameters, anchors, fishers = case
    gradients = torch.autograd.grad(consolidation(parameters, anchors, fishers), parameters)
    for gradient, w, anchor, fisher in zip(gradients, parameters, anchors, fishers, strict=True):
        torch.testing.assert_close(gradient, fisher * (w.detach() - anchor))


@given(weights())
def test_pulls_and_their_gradients_are_exactly_zero_at_the_anchor(case):
    parameters, _, fishers = case
    anchors = [w.detach().clone() for w in parameters]
    for value in (proximal(parameters, anchors), consolidation(parameters, anchors, fishers)):
        assert value.item() == 0.0
        assert not any(gradient.any() for gradient in torch.autograd.grad(value, parameters))


def test_minimiser_under_a_proximal_pull_is_known_for_a_quadratic_loss():
    """1/2 ||Hw - b||^2 + mu/2 ||w - w_g||^2 has its minimum at (H^T H + mu I)^-1 (H^T b + mu w_g)."""
    random = torch.Generator().manual_seed(0)
    h, b = torch.randn(5, 3, generator=random), torch.randn(5, generator=random)
    anchor, mu = torch.randn(3, generator=random), 0.7
    w = torch.linalg.solve(h.T @ h + mu * torch.eye(3), h.T @ b + mu * anchor).requires_grad_(True)
    (0.5 * (h @ w - b).square().sum() + mu * proximal([w], [anchor])).backward()
    torch.testing.assert_close(w.grad, torch.zeros(3), rtol=0, atol=1e-5)


def test_minimiser_under_consolidation_is_known_for_a_quadratic_loss():
    """1/2 ||w - b||^2 + lambda/2 sum F (w - w*)^2 has its minimum at (b + lambda F w*) / (1 + lambda F)."""
    b, anchor, fisher, strength = torch.randn(4), torch.randn(4), torch.rand(4), 3.0
    w = ((b + strength * fisher * anchor) / (1 + strength * fisher)).requires_grad_(True)
    (0.5 * (w - b).square().sum() + strength * consolidation([w], [anchor], [fisher])).backward()
    torch.testing.assert_close(w.grad, torch.zeros(4), rtol=0, atol=1e-5)


@st.composite
def answers(draw):
    """Student and teacher logits (B, C) float64 and a temperature."""
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    student, teacher = 4 * torch.randn(2, *shape, generator=random)
    return student.requires_grad_(True), teacher, draw(st.sampled_from([1.0, 2.0, 5.0]))


@given(answers())
def test_gradient_of_the_distillation_is_the_difference_of_the_softmaxes(case):
    """T (softmax(s / T) - softmax(t / T)) / B, with the factor T^2 in the loss."""
    student, teacher, temperature = case
    value = knowledge_distillation(student, teacher, temperature)
    assert value.item() >= -1e-5
    value.backward()
    s, t = (student.detach() / temperature).softmax(1), (teacher / temperature).softmax(1)
    torch.testing.assert_close(student.grad, temperature * (s - t) / len(s), rtol=1e-4, atol=1e-6)


@given(answers())
def test_distillation_of_equal_answers_is_exactly_zero_and_its_gradient_vanishes(case):
    student, _, temperature = case
    value = knowledge_distillation(student, student.detach().clone(), temperature)
    value.backward()
    assert value.item() == 0.0
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)


@given(answers(), st.floats(-10, 10))
def test_a_constant_added_to_all_logits_of_either_model_changes_nothing(case, constant):
    student, teacher, temperature = case
    plain = knowledge_distillation(student, teacher, temperature).item()
    assert knowledge_distillation(student + constant, teacher, temperature).item() == pytest.approx(
        plain, rel=1e-3, abs=1e-4
    )
    assert knowledge_distillation(student, teacher + constant, temperature).item() == pytest.approx(
        plain, rel=1e-3, abs=1e-4
    )
