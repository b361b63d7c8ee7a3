"""Exact properties of AFCL, STSA, STSA-E and FedRAN, on the pure functions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.functional.analytic import (
    MomentSums,
    added,
    gram_of_groups,
    low_rank,
    low_rank_ridge,
    moment_sums,
    ncm_solution,
    pack_sums,
    random_features,
    ridge_solution,
    unpack_sums,
)
from reference import analytic as literal

WIDTH, CLASSES = 6, 4


def draw(seed, samples):
    """Features (samples, WIDTH) in float64, labels and one-hot targets."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, WIDTH, dtype=torch.float64, generator=random)
    labels = torch.randint(CLASSES, (samples,), generator=random)
    return features, labels, F.one_hot(labels, CLASSES).double()


def cuts(data, samples, seed):
    """A division of the samples into parts, in random order; some may be empty."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    places = sorted(data.draw(st.lists(st.integers(0, samples), max_size=5)))
    return order.tensor_split(places)


@given(st.integers(0, 2**32), st.integers(2, 30), st.floats(0.1, 10), st.data())
def test_afcl_is_the_joint_ridge_for_any_split_and_order(seed, samples, gamma, data):
    """Sums, pairwise merging after its gammas are swapped out, and the recursive update: one solution."""
    features, labels, targets = draw(seed, samples)
    parts = cuts(data, samples, seed)
    total = None
    for part in parts:
        total = added(total, moment_sums(features[part], labels[part], CLASSES, unit=False, bias=False))
    joint = literal.ridge(features, targets, gamma)
    weight, bias = ridge_solution(total, gamma, relative=False, bias=False)
    torch.testing.assert_close(weight.double().mT, joint, rtol=1e-5, atol=1e-6)
    assert not bias.any()
    rows = [(features[part], targets[part]) for part in parts]
    torch.testing.assert_close(literal.recursive_least_squares(rows, gamma, WIDTH), joint)
    merged, system = literal.merged_solutions(rows, gamma)
    excess = (len(rows) - 1) * gamma * torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.solve(system - excess, system @ merged), joint, rtol=1e-6, atol=1e-7)


@given(st.integers(0, 2**32), st.permutations(range(CLASSES)))
def test_permuted_classes_permute_the_rows_and_a_new_class_leaves_the_others(seed, order):
    features, labels, _ = draw(seed, 20)
    options = {"unit": False, "bias": False}
    weight, _ = ridge_solution(moment_sums(features, labels, CLASSES, **options), 1.0, relative=False, bias=False)
    renamed = torch.tensor(order)[labels]
    other, _ = ridge_solution(moment_sums(features, renamed, CLASSES, **options), 1.0, relative=False, bias=False)
    torch.testing.assert_close(other[list(order)], weight)
    more, _ = ridge_solution(moment_sums(features, labels, CLASSES + 1, **options), 1.0, relative=False, bias=False)
    torch.testing.assert_close(more[:CLASSES], weight, rtol=1e-6, atol=1e-7)
    assert not more[CLASSES].any()


@given(st.integers(0, 2**32), st.lists(st.integers(1, 3), min_size=2, max_size=3))
def test_the_mean_over_all_partitions_into_groups_is_the_gram(seed, sizes):
    """Unbiased for any sizes, by enumeration; each estimate equals the literal one and has no negative eigenvalue."""
    rows, _, _ = draw(seed, sum(sizes))
    estimates = []
    for partition in literal.partitions(range(sum(sizes)), sizes):
        sums = torch.stack([rows[ids].sum(0) for ids in partition])
        zeros = torch.zeros(len(sizes), dtype=torch.int64)
        found = gram_of_groups(sums, torch.tensor(sizes), zeros)
        torch.testing.assert_close(found, literal.group_estimate([rows[ids] for ids in partition]))
        assert torch.linalg.eigvalsh(found).min() > -1e-9
        estimates.append(found)
    torch.testing.assert_close(torch.stack(estimates).mean(0), rows.mT @ rows)


@given(st.integers(0, 2**32), st.integers(1, 20))
def test_groups_of_one_sample_are_exact_and_empty_groups_change_nothing(seed, samples):
    features, labels, _ = draw(seed, samples)
    ones = torch.ones(samples, dtype=torch.int64)
    found = gram_of_groups(features, ones, labels)
    torch.testing.assert_close(found, features.mT @ features)
    more = gram_of_groups(
        torch.cat([features, features[:1] * 0]), torch.cat([ones, ones[:1] * 0]), torch.cat([labels, labels[:1]])
    )
    assert torch.equal(more, found)


def test_one_group_tells_the_mean_only():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = gram_of_groups(rows.sum(0)[None], torch.tensor([2]), torch.tensor([0]))
    assert found.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.floats(1e-3, 10))
def test_merged_low_rank_grams_obey_their_bounds(seed, clients, tasks, rank, strength):
    """0 <= F F^T <= G; the norm of the difference is at most the sum of first dropped eigenvalues, and its trace that
    of all dropped ones; |W_r - W| <= |G - F F^T| |W| / lambda."""
    features, _, targets = draw(seed, 12 * clients * tasks)
    parts = [list(task.tensor_split(clients)) for task in features.tensor_split(tasks)]
    merged = None
    for task in parts:
        over_clients = low_rank(torch.cat([low_rank(rows.mT, rank) for rows in task], 1), rank)
        merged = over_clients if merged is None else low_rank(torch.cat([merged, over_clients], 1), rank)
    reference, spectral, dropped = literal.low_rank_merge(parts, rank)
    torch.testing.assert_close(merged @ merged.mT, reference @ reference.mT)
    gram = features.mT @ features
    rest = gram - merged @ merged.mT
    values = torch.linalg.eigvalsh(rest)
    scale = gram.trace().item()
    assert values.min() > -1e-9 * scale
    assert values.max() <= spectral + 1e-9 * scale
    assert rest.trace().item() == pytest.approx(dropped, abs=1e-9 * scale)
    products = features.mT @ targets
    weight = low_rank_ridge(merged, products, strength)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(weight, torch.linalg.solve(merged @ merged.mT + strength * eye, products))
    joint = torch.linalg.solve(gram + strength * eye, products)
    assert (weight - joint).norm() <= values.max() * joint.norm() / strength + 1e-9 * scale / strength
    if rank >= WIDTH:
        torch.testing.assert_close(merged @ merged.mT, gram)


@given(st.integers(0, 2**32), st.integers(1, 40), st.sets(st.integers(0, CLASSES - 1), min_size=1))
def test_packed_sums_come_back(seed, samples, classes):
    """To float32 of what classes differ by, and with the columns of the sender's classes alone."""
    features, labels, _ = draw(seed, samples)
    classes = torch.tensor(sorted(classes))
    labels = classes[labels % len(classes)]
    sums = moment_sums(features, labels, CLASSES)
    counts = torch.bincount(labels, minlength=CLASSES)
    packed = pack_sums(sums, counts)
    found = unpack_sums(packed, counts)
    torch.testing.assert_close(found.gram, sums.gram, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.products, sums.products.float().double())
    assert packed.products.shape == (WIDTH + 1, int((counts > 0).sum()))


@given(st.integers(0, 2**32))
def test_rounding_is_relative_to_the_differences_within_classes(seed):
    """Features that differ by 1e-4 around one mean: their scatter survives float32, which G itself would not."""
    features, labels, _ = draw(seed, 40)
    features = F.normalize(torch.ones(WIDTH, dtype=torch.float64) + 1e-4 * features)
    counts = torch.bincount(labels, minlength=CLASSES)
    sums = moment_sums(features, labels, CLASSES)
    found = unpack_sums(pack_sums(sums, counts), counts)
    exact, rounded = (within(each, counts) for each in (sums, found))
    plain = within(MomentSums(sums.gram.float().double(), sums.products), counts)
    assert (rounded - exact).norm() < 1e-3 * exact.norm() < (plain - exact).norm()


def within(sums, counts):
    """Scatter within classes, (WIDTH, WIDTH)."""
    products = sums.products[:, counts > 0]
    return (sums.gram - (products / counts[counts > 0]) @ products.mT)[:-1, :-1]


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_packed_sums_without_a_constant(seed, samples):
    features, labels, _ = draw(seed, samples)
    counts = torch.bincount(labels, minlength=CLASSES)
    sums = moment_sums(features, labels, CLASSES, unit=False, bias=False)
    torch.testing.assert_close(unpack_sums(pack_sums(sums, counts), counts).gram, sums.gram, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(0, 3))
def test_random_features_are_the_same_everywhere(seed, width, public):
    """One public seed, whatever the state of the global generator; relu of W / sqrt(d), of unit norm."""
    features, _, _ = draw(seed, 5)
    torch.manual_seed(seed % 1000)
    found = random_features(features, width, public)
    weight = torch.randn(WIDTH, width, generator=torch.Generator().manual_seed(public)) / WIDTH**0.5
    torch.testing.assert_close(found, F.normalize((features.float() @ weight).relu()))
    assert torch.equal(random_features(features, width, public), found)
    assert random_features(features, 0) is features


def test_class_means_are_cosines():
    features, labels, _ = draw(0, 40)
    weight, bias = ncm_solution(moment_sums(features, labels, CLASSES))
    units = F.normalize(features)
    means = torch.stack([F.normalize(units[labels == label].sum(0), dim=0) for label in range(CLASSES)])
    torch.testing.assert_close(weight.double(), means, rtol=1e-6, atol=1e-6)
    assert not bias.any()


def test_a_class_without_samples_is_no_nearest_mean():
    sums = MomentSums(torch.eye(3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))
    assert (ncm_solution(sums)[1] < -1000).all()
