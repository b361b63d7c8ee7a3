import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedlscl.functional.analytic import pack_symmetric, unpack_symmetric
from fedlscl.methods.lorm import (
    diagonal,
    input_grams,
    project,
    regression_mean,
    shares,
    shrink,
)

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@st.composite
def layers(draw, clients=(1, 5)):
    """Inputs X_i (d, n), their Grams, and maps W_i (out, d) of each client, float64."""
    k, d, out = draw(st.integers(*clients)), draw(st.integers(2, 8)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [random(d, 3 * d) * (0.2 + random(d, 1).abs()) for _ in range(k)]
    return inputs, [x @ x.mT for x in inputs], [random(out, d) for _ in range(k)]


def quadratic(weight, inputs, weights):
    """sum_i ||(W - W_i) X_i||^2, as it is written."""
    return sum(((weight @ x - w @ x) ** 2).sum() for x, w in zip(inputs, weights, strict=True))


def gradient(weight, *arguments):
    weight = weight.clone().requires_grad_(True)
    return torch.autograd.grad(quadratic(weight, *arguments), weight)[0]


@given(layers())
def test_the_mean_minimises_the_clients_output_differences(case):
    """Down-projections A with a shared B, and the head: the gradient of the quadratic is zero."""
    inputs, grams, weights = case
    merged = regression_mean(weights, grams, epsilon=0)
    assert gradient(merged, inputs, weights).abs().max() < 1e-7 * (1 + sum(g.abs().max() for g in grams))


@given(layers(), st.integers(1, 2), st.data())
def test_up_projections_minimise_it_through_a_shared_down_projection(case, rank, data):
    """B = (sum B_i A G_i A^T) (A sum G_i A^T)^-1 is the regression mean with Grams A G_i A^T."""
    inputs, grams, weights = case
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    down = torch.randn(rank, len(grams[0]), generator=generator, dtype=torch.float64)
    ups = [torch.randn(3, rank, generator=generator, dtype=torch.float64) for _ in weights]
    projected = [project(gram, down) for gram in grams]
    merged = regression_mean(ups, projected, epsilon=0)
    read = [down @ x for x in inputs]
    assert gradient(merged, read, ups).abs().max() < 1e-7 * (1 + sum(g.abs().max() for g in projected))
    explicit = sum(up @ down @ g @ down.mT for up, g in zip(ups, grams, strict=True))
    explicit = explicit @ torch.linalg.inv(down @ sum(grams) @ down.mT)
    torch.testing.assert_close(merged, explicit, rtol=1e-4, atol=1e-4)


@given(layers())
def test_equal_grams_give_the_arithmetic_mean(case):
    _, grams, weights = case
    expected = torch.stack(weights).mean(0)
    torch.testing.assert_close(regression_mean(weights, [grams[0]] * len(weights)), expected, **CLOSE)


@given(layers())
def test_diagonal_grams_give_a_weighted_mean_of_each_column(case):
    _, grams, weights = case
    diagonals = [diagonal(gram) for gram in grams]
    weight = torch.stack(diagonals) / torch.stack(diagonals).sum(0)
    expected = sum(w * row for w, row in zip(weights, weight, strict=True))
    torch.testing.assert_close(regression_mean(weights, diagonals, epsilon=0), expected, **CLOSE)
    matrices = [torch.diag(values) for values in diagonals]
    torch.testing.assert_close(regression_mean(weights, matrices, epsilon=0), expected, **CLOSE)


@given(layers(clients=(1, 1)))
def test_one_client_keeps_its_own_bit_for_bit(case):
    _, grams, weights = case
    assert torch.equal(regression_mean(weights, grams), weights[0])
    assert torch.equal(regression_mean(weights, [diagonal(gram) for gram in grams]), weights[0])


@given(layers(clients=(2, 4)), st.booleans())
def test_common_weights_survive_in_directions_without_inputs(case, is_diagonal):
    """A pseudo-inverse would return zeros there: |W| = |W merged - W|."""
    _, grams, weights = case
    dead = len(grams[0]) // 2
    for gram in grams:
        gram[dead:], gram[:, dead:] = 0, 0
    used = [diagonal(gram) for gram in grams] if is_diagonal else grams
    agreed = regression_mean([weights[0]] * len(weights), used)
    torch.testing.assert_close(agreed, weights[0], **CLOSE)
    full = [torch.diag(gram) if gram.dim() == 1 else gram for gram in used]
    pseudo = sum(weights[0] @ gram for gram in full) @ torch.linalg.pinv(sum(full))
    assert pseudo[:, dead:].abs().max() < 1e-9 and weights[0][:, dead:].abs().max() > 1e-9
    differing = regression_mean(weights, used)[:, dead:]
    torch.testing.assert_close(differing, torch.stack(weights).mean(0)[:, dead:], **CLOSE)


@pytest.mark.parametrize("shape", [(3,), (3, 3)])
def test_no_inputs_at_all_give_the_mean(shape):
    weights = [torch.zeros(2, 3), torch.ones(2, 3)]
    assert torch.equal(regression_mean(weights, [torch.zeros(shape)] * 2), torch.full((2, 3), 0.5))


@given(layers(clients=(2, 4)))
def test_tasks_merged_from_running_sums_equal_the_joint_formula(case):
    _, grams, weights = case
    numerator, denominator = weights[0] @ grams[0], grams[0].clone()
    for weight, gram in zip(weights[1:], grams[1:], strict=True):
        numerator, denominator = numerator + weight @ gram, denominator + gram
    running = numerator @ torch.linalg.inv(denominator)
    torch.testing.assert_close(regression_mean(weights, grams, epsilon=0), running, rtol=1e-4, atol=1e-4)


@given(layers())
def test_shares_are_the_regression_mean_of_diagonal_grams(case):
    _, grams, weights = case
    diagonals = torch.stack([diagonal(gram) for gram in grams])
    parts = shares(diagonals)
    merged = sum(weight * share for weight, share in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, regression_mean(weights, list(diagonals)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts.sum(0), torch.ones_like(parts[0]))


def test_one_task_counts_for_all_and_dead_inputs_are_shared():
    assert torch.equal(shares(torch.tensor([[3.0, 0.0, 0.0]])), torch.ones(1, 3))
    assert torch.equal(shares(torch.zeros(4, 2)), torch.full((4, 2), 0.25))


@given(layers(), st.floats(0, 1))
def test_shrinking_keeps_the_diagonal(case, alpha):
    gram = case[1][0]
    shrunk = shrink(gram, alpha)
    torch.testing.assert_close(diagonal(shrunk), diagonal(gram))
    torch.testing.assert_close(shrunk - torch.diag(diagonal(shrunk)), alpha * (gram - torch.diag(diagonal(gram))))
    assert torch.equal(shrink(diagonal(gram), alpha), diagonal(gram))


@given(layers())
def test_packing_is_lossless(case):
    gram = (case[1][0] + case[1][0].mT) / 2
    d = len(gram)
    assert len(pack_symmetric(gram)) == d * (d + 1) // 2 and torch.equal(
        unpack_symmetric(pack_symmetric(gram), d), gram
    )
    assert torch.equal(unpack_symmetric(pack_symmetric(diagonal(gram)), d), diagonal(gram))


def test_grams_are_of_what_enters_each_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 6, 4)
    with input_grams({"first": net[0], "last": net[2]}, full=["last"]) as grams:
        net(x[:2]), net(x[2:])
    rows = net[:2](x).flatten(0, 1)
    torch.testing.assert_close(grams["first"], x.flatten(0, 1).square().sum(0))
    torch.testing.assert_close(grams["last"], rows.mT @ rows)
    assert not grams["last"].requires_grad and not net[0]._forward_hooks and not net[2]._forward_hooks
    net(x)
    torch.testing.assert_close(grams["last"], rows.mT @ rows)


def test_grams_of_nothing_are_zero():
    with input_grams({"layer": nn.Linear(4, 3)}) as grams:
        pass
    assert torch.equal(grams["layer"], torch.zeros(4))


@pytest.mark.parametrize("full", [(), ("layer",)])
def test_grams_are_summed_in_float32_in_any_precision(full):
    """197 tokens of n images: float16 overflows at 65504, and bfloat16 stops counting at 256."""
    layer = nn.Linear(2, 3)
    with torch.autocast("cpu", torch.bfloat16), input_grams({"layer": layer}, full) as grams:
        for _ in range(10):
            layer(torch.full((40, 50, 2), 16.0, dtype=torch.bfloat16))
    assert grams["layer"].dtype == torch.float32
    assert torch.equal(grams["layer"], torch.full_like(grams["layer"], 10 * 40 * 50 * 256.0))
