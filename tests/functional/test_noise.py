import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.functional.distillation import second_moment
from fedlscl.functional.privacy import MOMENT_BOUND, clipped, epsilon, gaussian, noised, noisy_moment


@given(st.integers(0, 2**32), st.sampled_from([1e-3, 1.0, 50.0]), st.sampled_from([0.0, 1e-8, 1.0, 1e6]))
def test_clipping_bounds_the_norm_and_keeps_the_direction(seed, bound, scale):
    values = scale * torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = clipped(values, bound)
    assert found.norm() <= bound * (1 + 1e-12)
    if values.norm() <= bound:
        assert torch.equal(found, values)
    else:
        torch.testing.assert_close(found * values.norm(), values * bound)


@given(st.integers(0, 2**32), st.integers(1, 9))
def test_no_second_moment_is_larger_than_its_bound(seed, samples):
    e = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))
    assert second_moment(torch.nn.functional.normalize(e)).norm() <= MOMENT_BOUND + 1e-6


@pytest.mark.parametrize("secrets", ["seed", "system"])
def test_noise_is_standard_normal(secrets):
    """A hundred thousand draws: moments within ten standard errors, shares below quantiles likewise."""
    torch.manual_seed(0)
    draws = gaussian(torch.Size([100, 1000]), secrets)
    assert draws.shape == (100, 1000) and draws.dtype == torch.float64 and draws.isfinite().all()
    error = 10 / draws.numel() ** 0.5
    assert draws.mean().abs() < error and (draws.square().mean() - 1).abs() < error * 2**0.5
    for quantile in (0.01, 0.25, 0.9):
        assert abs((draws < NormalDist().inv_cdf(quantile)).double().mean() - quantile) < error / 2


@pytest.mark.parametrize(("secrets", "repeats"), [("seed", True), ("system", False)])
def test_only_the_seed_repeats_noise(secrets, repeats):
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(gaussian(torch.Size([4]), secrets))
    assert torch.equal(*draws) == repeats


def test_noise_is_the_multiplier_times_the_bound():
    torch.manual_seed(0)
    values = 100 * torch.ones(40000)
    noise = noised(values, 3.0, 0.5, "seed") - clipped(values, 3.0)
    assert abs(noise.std().item() / 1.5 - 1) < 0.03 and noise.dtype == values.dtype
    assert torch.equal(noised(values, 3.0, 0.0, "seed"), clipped(values, 3.0))


def test_a_noisy_moment_is_a_second_moment_still():
    torch.manual_seed(0)
    moment = second_moment(torch.nn.functional.normalize(torch.randn(9, 6)))
    noisy = noisy_moment(moment, 0.2, "seed")
    assert torch.equal(noisy, noisy.mT) or (noisy - noisy.mT).abs().max() < 1e-12
    assert torch.linalg.eigvalsh(noisy).min() > -1e-12
    assert not torch.allclose(noisy, moment, atol=1e-2)
    torch.testing.assert_close(noisy_moment(moment, 0.0, "seed"), moment, rtol=0, atol=1e-12)


@pytest.mark.parametrize("multiplier", [0.7, 3.0, 40.0])
@pytest.mark.parametrize("releases", [1, 2, 50])
def test_epsilon_solves_the_gaussian_mechanisms_own_equation(multiplier, releases):
    """delta = N(1 / 2s - eps s) - exp(eps) N(-1 / 2s - eps s), Balle & Wang, Theorem 8, s = multiplier / sqrt(n)."""
    sigma = multiplier / math.sqrt(releases)

    def normal(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    value = epsilon(multiplier, releases, 1e-5)
    delta = normal(0.5 / sigma - value * sigma) - math.exp(value) * normal(-0.5 / sigma - value * sigma)
    assert delta == pytest.approx(1e-5, rel=1e-3)
