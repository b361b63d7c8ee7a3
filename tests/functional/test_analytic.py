import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from fedlscl.functional.analytic import ABSENT, MomentSums, discriminant_solution, moment_sums, ridge_solution

WIDTH, CLASSES = 5, 4


def draw(seed, sizes):
    """Features (n, WIDTH) and labels (n,) with so many samples of each class."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    centres = torch.randn(len(sizes), WIDTH, generator=random)
    return centres[labels] + 0.7 * torch.randn(len(labels), WIDTH, generator=random), labels


@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=CLASSES, max_size=CLASSES), st.data())
def test_sums_over_parts_are_the_sums_over_all(seed, sizes, data):
    """In any cut and any order: clients and tasks add up."""
    features, labels = draw(seed, sizes)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = data.draw(st.integers(0, len(labels)))
    parts = [moment_sums(features[ids], labels[ids], CLASSES) for ids in (order[:cut], order[cut:])]
    whole = moment_sums(features, labels, CLASSES)
    for name in MomentSums._fields:
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    assert whole.products[-1].tolist() == sizes


@given(st.integers(0, 2**32), st.floats(0.01, 100))
def test_only_directions_of_features_count(seed, scale):
    features, labels = draw(seed, [3] * CLASSES)
    for left, right in zip(
        moment_sums(features, labels, CLASSES), moment_sums(scale * features, labels, CLASSES), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**32), st.lists(st.integers(2, 9), min_size=CLASSES, max_size=CLASSES))
def test_ridge_is_scikit_learns(seed, sizes):
    features, labels = draw(seed, sizes)
    sums = moment_sums(features, labels, CLASSES)
    weight, bias = ridge_solution(sums, 0.3)
    x = np.pad(F.normalize(features.double()).numpy(), ((0, 0), (0, 1)), constant_values=1)
    alpha = 0.3 * (x**2).sum() / (WIDTH + 1)
    reference = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(x, np.eye(CLASSES)[labels.numpy()])
    np.testing.assert_allclose(torch.cat([weight, bias[:, None]], 1), reference.coef_, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 2**32), st.integers(3, 9), st.sampled_from([0.05, 0.5, 1.0]))
def test_discriminant_is_scikit_learns_for_equally_frequent_classes(seed, size, shrinkage):
    features, labels = draw(seed, [size] * CLASSES)
    weight, bias = discriminant_solution(moment_sums(features, labels, CLASSES), shrinkage)
    x = F.normalize(features.double())
    # It shrinks each class towards its own trace; the mean over equally frequent classes is the same.
    reference = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Shrunk(shrinkage))
    reference.fit(x.numpy(), labels.numpy())
    found = x @ weight.double().T + bias.double()
    expected = torch.from_numpy(reference.decision_function(x.numpy()))
    torch.testing.assert_close(found - found[:, :1], expected - expected[:, :1], rtol=1e-3, atol=1e-3)


class Shrunk:
    """Covariance about the mean, shrunk towards a multiple of the identity."""

    def __init__(self, shrinkage):
        self.shrinkage = shrinkage

    def fit(self, x):
        covariance = np.cov(x.T, bias=True)
        target = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        self.covariance_ = (1 - self.shrinkage) * covariance + self.shrinkage * target
        return self


@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=CLASSES, max_size=CLASSES))
def test_full_shrinkage_is_the_nearest_class_mean(seed, sizes):
    features, labels = draw(seed, sizes)
    weight, bias = discriminant_solution(moment_sums(features, labels, CLASSES), 1.0)
    x = F.normalize(features.double())
    means = torch.stack([x[labels == label].mean(0) for label in range(CLASSES)])
    distances = torch.cdist(x, means)
    scores = x @ weight.double().T + bias.double()
    chosen = distances.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-3, atol=1e-3)


def test_a_class_counts_by_its_mean_however_often_it_was_seen():
    """Doubling one class's samples leaves means as they are, and so its score against the others at equal spread."""
    features, labels = draw(0, [4] * CLASSES)
    sums = moment_sums(features, labels, CLASSES)
    doubled = MomentSums(2 * sums.gram, 2 * sums.products)
    for left, right in zip(discriminant_solution(sums, 0.3), discriminant_solution(doubled, 0.3), strict=True):
        torch.testing.assert_close(left, right)


def test_a_class_that_nobody_met_never_wins():
    features, labels = draw(0, [4] * CLASSES)
    sums = moment_sums(features, labels, CLASSES + 2)
    weight, bias = discriminant_solution(sums, 0.3)
    assert bias[CLASSES:].tolist() == [ABSENT] * 2 and not weight[CLASSES:].any()
    assert (F.normalize(features) @ weight.T + bias).argmax(1).max() < CLASSES
    seen = discriminant_solution(moment_sums(features, labels, CLASSES), 0.3)
    torch.testing.assert_close(weight[:CLASSES], seen[0])


def test_one_sample_of_one_class_has_a_solution():
    sums = moment_sums(torch.randn(1, WIDTH), torch.tensor([1]), CLASSES)
    assert all(value.isfinite().all() for value in discriminant_solution(sums, 0.2))
    assert all(value.isfinite().all() for value in ridge_solution(sums, 0.01))
