from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedlscl.functional.distillation import (
    Factors,
    Sums,
    client_terms,
    kept_rank,
    one_by_one_distill,
    second_moment,
    solve,
)
from reference import eq5


class Federation(NamedTuple):
    """Generators and feature sets of every client, float64, and a lambda."""

    generators: list
    features: list
    lambda_proximal: float

    @property
    def moments(self):
        return [second_moment(x) for x in self.features]

    def fused(self, weights=None):
        """With weights of the clients as teachers, which are factors of their moments."""
        moments = [w * c for w, c in zip(weights or [1.0] * len(self.features), self.moments, strict=True)]
        return one_by_one_distill(self.generators, moments, self.lambda_proximal)

    def others(self, i, values):
        return [value for j, value in enumerate(values) if j != i]

    def lambda_absolute(self, i, weights=None):
        """lambda times the mean eigenvalue of S_i, from the raw features."""
        p = len(self.generators[0])
        weights = weights or [1.0] * len(self.features)
        traces = [w * (1 + x.square().sum(1).mean()) for x, w in zip(self.features, weights, strict=True)]
        return float(self.lambda_proximal * sum(self.others(i, traces)) / p)


@st.composite
def federations(draw, clients=(2, 5), samples=(1, 12)):
    k, d, m = draw(st.integers(*clients)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    sizes = draw(st.lists(st.integers(*samples), min_size=k, max_size=k))

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = [torch.relu(random(n, d) * (0.5 + j) + 0.3 * j) for j, n in enumerate(sizes)]
    return Federation([random(d + 1, m) for _ in range(k)], features, draw(st.sampled_from([0.05, 0.3, 1.0, 10.0])))


def add_terms(terms):
    return Sums(sum(term.moments for term in terms), sum(term.products for term in terms))


def assert_same(left, right, tolerance=1e-9):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@given(federations())
def test_gradient_of_eq5_is_zero_at_the_closed_form(case):
    for i, phi in enumerate(case.fused()):
        gradient = eq5.gradient(phi, i, case.generators, case.features, case.lambda_absolute(i))
        assert_same(gradient, torch.zeros_like(gradient))


@given(federations(), st.data())
def test_gradient_of_weighted_eq5_is_zero_at_the_closed_form(case, data):
    k = len(case.generators)
    weights = data.draw(st.lists(st.sampled_from([0.2, 1.0, 3.0]), min_size=k, max_size=k))
    for i, phi in enumerate(case.fused(weights=weights)):
        gradient = eq5.gradient(
            phi, i, case.generators, case.features, case.lambda_absolute(i, weights), weights=weights
        )
        assert_same(gradient, torch.zeros_like(gradient))


@settings(max_examples=5)
@given(federations(clients=(2, 3)))
def test_closed_form_is_what_lbfgs_finds(case):
    for i, phi in enumerate(case.fused()):
        found = eq5.minimise(i, case.generators, case.features, case.lambda_absolute(i))
        assert_same(phi, found, tolerance=1e-5)


@given(federations())
def test_delta_form_is_the_textbook_ridge_solution(case):
    for i, phi in enumerate(case.fused()):
        shrink = case.lambda_absolute(i) * torch.eye(len(phi), dtype=torch.float64)
        moments = sum(case.others(i, case.moments))
        products = sum(case.others(i, [c @ g for c, g in zip(case.moments, case.generators, strict=True)]))
        assert_same(phi, torch.linalg.solve(moments + shrink, products + shrink @ case.generators[i]))


@given(federations())
def test_pooled_weights_are_ridge_regression_on_pooled_features(case):
    sizes = [float(len(x)) for x in case.features]
    for i, phi in enumerate(case.fused(weights=sizes)):
        e = [torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1) for x in case.features]
        x = torch.cat(case.others(i, e))
        y = torch.cat(case.others(i, [e_j @ g for e_j, g in zip(e, case.generators, strict=True)]))
        shrink = case.lambda_absolute(i, sizes) * torch.eye(len(phi), dtype=torch.float64)
        assert_same(phi, torch.linalg.solve(x.T @ x + shrink, x.T @ y + shrink @ case.generators[i]))


@given(federations(), st.integers(0, 2**32))
def test_a_client_enters_only_through_its_second_moment(case, seed):
    """Pseudo-features of the same second moment, in a random basis, give the same generators."""
    p = len(case.generators[0])
    random = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(p, p, generator=random, dtype=torch.float64))[0]
    moments = []
    for moment in case.moments:
        values, vectors = torch.linalg.eigh(moment)
        pseudo = rotation @ torch.diag((values.clamp(min=0) * p).sqrt()) @ vectors.T  # (p, p): p samples
        moments.append(pseudo.T @ pseudo / p)
    for phi, other in zip(
        case.fused(), one_by_one_distill(case.generators, moments, case.lambda_proximal), strict=True
    ):
        assert_same(phi, other)


@given(federations(samples=(1, 1)), st.integers(0, 2**32))
def test_what_a_generator_does_off_its_features_is_invisible(case, seed):
    """One sample per client: C_j has rank one, and Phi_j may change in its null space."""
    values, vectors = torch.linalg.eigh(case.moments[0])
    null = vectors[:, values < 1e-10]
    assert null.shape[1] == len(values) - 1
    random = torch.Generator().manual_seed(seed)
    hidden = null @ torch.randn(null.shape[1], case.generators[0].shape[1], generator=random, dtype=torch.float64)
    changed = [case.generators[0] + hidden, *case.generators[1:]]
    fused = one_by_one_distill(changed, case.moments, case.lambda_proximal)
    for i in range(1, len(fused)):
        assert_same(fused[i], case.fused()[i])
    assert hidden.abs().max() > 1e-3


@given(federations())
def test_sums_over_all_clients_suffice(case):
    """Broadcast S and G; every client takes its own share out and solves for itself."""
    terms = [client_terms(g, c) for g, c in zip(case.generators, case.moments, strict=True)]
    total = add_terms(terms)
    for i, phi in enumerate(case.fused()):
        own = solve(case.generators[i], Sums(*map(torch.sub, total, terms[i])), case.lambda_proximal)
        assert torch.equal(phi, own)
        direct = solve(case.generators[i], add_terms(case.others(i, terms)), case.lambda_proximal)
        assert_same(own, direct)


@given(federations(), st.integers(0, 2**32))
def test_pairwise_masks_cancel(case, seed):
    """Secure aggregation: what the server adds up is noise, the sums are not."""
    random = torch.Generator().manual_seed(seed)
    terms = [client_terms(g, c) for g, c in zip(case.generators, case.moments, strict=True)]
    masked = list(terms)
    for a in range(len(terms)):
        for b in range(a):
            noise = [torch.randn(part.shape, generator=random, dtype=torch.float64) for part in terms[a]]
            masked[a] = Sums(masked[a].moments + noise[0], masked[a].products + noise[1])
            masked[b] = Sums(masked[b].moments - noise[0], masked[b].products - noise[1])
    assert not torch.allclose(masked[0].moments, terms[0].moments)
    for left, right in zip(add_terms(masked), add_terms(terms), strict=True):
        assert_same(left, right)


@given(federations())
def test_a_huge_lambda_keeps_everyones_own(case):
    for phi, own in zip(case._replace(lambda_proximal=1e12).fused(), case.generators, strict=True):
        assert_same(phi, own)


@given(federations(clients=(2, 4)))
def test_a_vanishing_lambda_moves_only_where_the_others_have_features(case):
    for i, phi in enumerate(case._replace(lambda_proximal=1e-9).fused()):
        moments = sum(case.others(i, case.moments))
        values, vectors = torch.linalg.eigh(moments)
        if 1e-11 < (values / values.max()).min() < 1e-4:
            continue  # neither in the range nor in the null space, to this lambda
        null = vectors[:, values < 1e-11 * values.max()]
        assert_same(null.T @ (phi - case.generators[i]), null.new_zeros(null.shape[1], phi.shape[1]), 1e-5)
        target = sum(case.others(i, [c @ g for c, g in zip(case.moments, case.generators, strict=True)]))
        assert_same(moments @ phi, target, 1e-3)


@given(federations())
def test_identical_generators_are_an_exact_fixed_point(case):
    same = [case.generators[0].float()] * len(case.generators)
    for phi in one_by_one_distill(same, case.moments, case.lambda_proximal):
        assert torch.equal(phi, same[0])


@given(federations())
def test_columns_that_are_zero_everywhere_stay_zero(case):
    """The writing factor before the first step: no rounding may wake it up."""
    for generator in case.generators:
        generator[:, 0] = 0
    for phi in case.fused():
        assert not phi[:, 0].any()


def test_a_lone_client_keeps_its_own_generator():
    phi = torch.randn(4, 3)
    (answer,) = one_by_one_distill([phi], [torch.eye(4)], 1.0)
    assert torch.equal(answer, phi) and answer is not phi


@given(federations(), st.data())
def test_permuting_clients_permutes_answers(case, data):
    order = data.draw(st.permutations(range(len(case.generators))))
    permuted = Federation([case.generators[j] for j in order], [case.features[j] for j in order], case.lambda_proximal)
    fused = case.fused()
    for place, phi in zip(order, permuted.fused(), strict=True):
        assert_same(phi, fused[place])


@given(federations())
def test_equal_moments_interpolate_along_every_eigenvector(case):
    """By (k-1) c / ((k-1) c + lambda) towards the mean of the teachers."""
    k, moment = len(case.generators), case.moments[0]
    values, vectors = torch.linalg.eigh(moment)
    shrink = case.lambda_proximal * (k - 1) * moment.trace() / len(moment)
    fraction = (k - 1) * values / ((k - 1) * values + shrink)
    for i, phi in enumerate(one_by_one_distill(case.generators, [moment] * k, case.lambda_proximal)):
        mean = sum(case.others(i, case.generators)) / (k - 1)
        own = case.generators[i]
        assert_same(phi, own + vectors @ torch.diag(fraction) @ vectors.T @ (mean - own))


@given(federations(), st.sampled_from([2.0**-20, 0.25, 2.0**10]))
def test_lambda_is_relative_to_the_scale_of_the_moments(case, scale):
    """Powers of four are exact in floating point, under roots too, so equality is."""
    scaled = case.fused(weights=[scale] * len(case.generators))
    assert all(map(torch.equal, case.fused(), scaled))


@given(federations(clients=(3, 5)))
def test_a_weight_of_zero_leaves_a_client_out(case):
    weights = [0.0] + [1.0] * (len(case.generators) - 1)
    rest = Federation(case.generators[1:], case.features[1:], case.lambda_proximal)
    fused = case.fused(weights=weights)
    for phi, alone in zip(fused[1:], rest.fused(), strict=True):
        assert_same(phi, alone)
    unweighted = case.fused()[0]  # its own weight is not in its own equation
    assert_same(fused[0], unweighted)


@given(federations(samples=(1, 2)))
def test_few_samples_and_single_precision_uploads_suffice(case):
    """Rank-deficient moments, rounded to float32 as they travel."""
    moments = [c.float() for c in case.moments]
    for phi, rounded in zip(
        case.fused(), one_by_one_distill(case.generators, moments, case.lambda_proximal), strict=True
    ):
        assert_same(phi, rounded, 1e-4)


@given(federations())
def test_inputs_are_left_alone_and_answers_have_their_dtype(case):
    generators, moments = [g.float() for g in case.generators], case.moments
    before = [value.clone() for value in (*generators, *moments)]
    fused = one_by_one_distill(generators, moments, case.lambda_proximal)
    assert all(torch.equal(old, new) for old, new in zip(before, (*generators, *moments), strict=True))
    assert all(phi.dtype == torch.float32 and phi.shape == generators[0].shape for phi in fused)


@given(federations())
def test_second_moment_is_the_mean_outer_product(case):
    for x in case.features:
        literal = sum(torch.outer(e, e) for e in (torch.cat([row, row.new_ones(1)]) for row in x)) / len(x)
        assert_same(second_moment(x), literal, 1e-12)
        assert second_moment(x.float()).dtype == torch.float64
        assert_same(second_moment(x.repeat(3, 1)), second_moment(x), 1e-12)


@pytest.mark.parametrize("lambda_proximal", [0.0, -1.0, float("nan")])
def test_eq5_without_a_unique_solution_is_refused(lambda_proximal):
    with pytest.raises(ValueError, match=f"lambda_proximal must be > 0 .*, got {lambda_proximal}"):
        one_by_one_distill([torch.eye(2)] * 2, [torch.eye(2)] * 2, lambda_proximal)


def test_an_empty_feature_set_is_refused():
    with pytest.raises(ValueError, match="feature set must not be empty"):
        second_moment(torch.empty(0, 3))


def test_clients_without_features_teach_nobody():
    generators, zero, own = [torch.randn(4, 6) for _ in range(3)], torch.zeros(4, 4), torch.eye(4)
    assert all(map(torch.equal, one_by_one_distill(generators, [zero] * 3, 1.0), generators))
    fused = one_by_one_distill(generators, [own, zero, zero], 1.0)
    assert torch.equal(fused[0], generators[0]) and not torch.allclose(fused[1], generators[1])
    alone = one_by_one_distill([generators[1], generators[0]], [zero, own], 1.0)[0]
    torch.testing.assert_close(fused[1], alone)


@st.composite
def factor_cases(draw):
    """Generators and moments of several clients, from few or many features, and lambda."""
    clients, d, m = draw(st.integers(2, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    features = [torch.randn(draw(st.integers(1, 9)), d, generator=random) for _ in range(clients)]
    moments = [second_moment(torch.nn.functional.normalize(each)) for each in features]
    phis = [torch.randn(d + 1, m, generator=random, dtype=torch.float64) for _ in range(clients)]
    return phis, moments, draw(st.floats(0.01, 10))


@given(factor_cases())
def test_factors_of_full_rank_give_the_exact_solution(case):
    phis, moments, strength = case
    exact = one_by_one_distill(phis, moments, strength)
    full = len(moments[0])
    parts = [Factors.of(phi, moment, full) for phi, moment in zip(phis, moments, strict=True)]
    for i, phi in enumerate(phis):
        others = Factors.merged([part for j, part in enumerate(parts) if j != i], full)
        torch.testing.assert_close(others.solve(phi, strength), exact[i], rtol=1e-6, atol=1e-8)


@given(factor_cases(), st.integers(1, 4))
def test_what_truncation_changes_is_within_its_bound(case, rank):
    """||Phi_hat - Phi_bar|| <= sum_j e_j ||Phi_j - Phi_bar|| / lambda, e_j the first dropped eigenvalue."""
    phis, moments, strength = case
    exact = one_by_one_distill(phis, moments, strength)
    parts = [Factors.of(phi, moment, rank) for phi, moment in zip(phis, moments, strict=True)]
    dropped = [torch.linalg.eigvalsh(m).flip(0).clamp(min=0) for m in moments]
    for i, phi in enumerate(phis):
        others = [j for j in range(len(phis)) if j != i]
        found = Factors.merged([parts[j] for j in others], 10**6).solve(phi, strength)
        scale = strength * sum(moments[j].trace() for j in others) / len(phi)
        first = [dropped[j][rank] if rank < len(phi) else 0.0 for j in others]
        bound = sum(e * (phis[j] - exact[i]).norm() for e, j in zip(first, others, strict=True)) / scale
        assert (found - exact[i]).norm() <= bound + 1e-6 * (1 + exact[i].norm())


@given(factor_cases(), st.integers(1, 4))
def test_merging_is_the_best_truncation_of_the_sum(case, rank):
    """F F^T keeps the largest eigenvalues of sum C_j, and F H is the same projection of sum C_j Phi_j."""
    phis, moments, _ = case
    full = [Factors.of(phi, moment, len(moment)) for phi, moment in zip(phis, moments, strict=True)]
    merged = Factors.merged(full, rank)
    total = sum(moments)
    values, vectors = torch.linalg.eigh(total)
    best = vectors[:, -rank:] * values[-rank:].clamp(min=0) @ vectors[:, -rank:].mT
    torch.testing.assert_close((merged.factor @ merged.factor.mT).trace(), best.trace(), rtol=1e-6, atol=1e-9)
    products = sum(moment @ phi for moment, phi in zip(moments, phis, strict=True))
    unit = merged.factor / merged.factor.norm(dim=0).clamp(min=1e-12)
    kept = merged.factor.norm(dim=0) > 1e-7
    projection = unit[:, kept] @ unit[:, kept].mT
    torch.testing.assert_close(merged.factor @ merged.projected, projection @ products, rtol=1e-5, atol=1e-7)
    assert merged.trace == pytest.approx(float(total.trace()))


def has_gap(moment, rank):
    """Whether the ``rank`` leading eigenvectors span one space only."""
    values = torch.linalg.eigvalsh(moment).flip(0)
    return rank >= len(values) or values[rank - 1] < 1e-9 or values[rank - 1] - values[rank] > 1e-3 * values[0]


@given(federations(), st.integers(1, 4), st.integers(1, 6))
def test_factors_solve_the_dense_system_of_truncated_moments(case, rank, answer_rank):
    phis, moments = case.generators, case.moments
    parts = [Factors.of(phi, moment, rank) for phi, moment in zip(phis, moments, strict=True)]
    for i, phi in enumerate(phis):
        total = sum(case.others(i, [eq5.truncated(moment, rank) for moment in moments]))
        assume(all(has_gap(moment, rank) for moment in moments) and has_gap(total, answer_rank))
        found = Factors.merged(case.others(i, parts), answer_rank).solve(phi, case.lambda_proximal)
        literal = eq5.low_rank_solution(i, phis, moments, case.lambda_absolute(i), rank, answer_rank)
        assert_same(found, literal, 1e-6)


@given(federations(), st.integers(1, 6))
def test_what_a_truncated_answer_changes_is_within_its_bound(case, rank):
    """It moves Phi_i equally along the first left singular vectors of F, and not along the others."""
    parts = [Factors.of(g, c, len(c)) for g, c in zip(case.generators, case.moments, strict=True)]
    for i, own in enumerate(case.generators):
        whole = Factors.merged(case.others(i, parts), 10**6)
        answer = Factors.merged(case.others(i, parts), rank)
        full, found = (factors.solve(own, case.lambda_proximal) for factors in (whole, answer))
        left, values, _ = torch.linalg.svd(answer.factor, full_matrices=False)
        kept = left[:, values > 1e-7]
        assert_same(kept.mT @ (found - full), torch.zeros_like(kept.mT @ full), 1e-6)
        assert_same(found - own, kept @ kept.mT @ (found - own), 1e-6)
        shrink = case.lambda_absolute(i)
        first = whole.factor.norm(dim=0)[rank] if rank < whole.factor.shape[1] else torch.zeros(())
        slope = min(float(first) / shrink, 0.5 * shrink**-0.5)
        residual = torch.cat([p.projected - p.factor.mT @ own for p in case.others(i, parts)])
        assert (found - full).norm() <= slope * residual.norm() + 1e-6 * (1 + full.norm())


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_a_share_of_the_trace_keeps_the_fewest_eigenvalues_that_reach_it(values, share):
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    kept = kept_rank(values, share)
    assert values[:kept].sum() >= share * values.sum() - 1e-9
    assert kept == 1 or values[: kept - 1].sum() < share * values.sum()
