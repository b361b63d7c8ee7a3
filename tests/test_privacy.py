"""Pieces of benchmarks/privacy.py with known answers, and all of it once on images of noise."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import privacy  # noqa: E402
from privacy_sections import page  # noqa: E402
from privacy_sections.membership import Population, attack, auc, of_features, of_mean, of_moment, with_one  # noqa: E402
from privacy_sections.moments import closest, guesses  # noqa: E402
from privacy_sections.noise import budgets, on_noisy  # noqa: E402
from privacy_sections.reconstruction import quality, ridge_decoder  # noqa: E402

from fedlscl.functional.distillation import Sums, client_terms, second_moment  # noqa: E402
from fedlscl.functional.privacy import epsilon, noisy_moment  # noqa: E402

DIM = 12


@pytest.fixture
def features():
    """Unit vectors around a common mean."""
    generator = torch.Generator().manual_seed(0)
    return normalize(torch.randn(1500, DIM, generator=generator) + 0.5)


def test_the_moment_of_one_sample_is_its_feature(features):
    found = guesses(second_moment(features[:1]).float(), 4)
    torch.testing.assert_close(found, features[:1].expand(2, -1), atol=1e-5, rtol=0)


def test_the_moment_of_two_samples_is_both_features(features):
    found = guesses(second_moment(features[:2]).float(), 4)
    torch.testing.assert_close(closest(found, features[:2]), torch.ones(2), atol=1e-5, rtol=0)


def test_of_many_samples_no_guess_is_one(features):
    assert closest(guesses(second_moment(features[:200]), 4), features[:200]).max() < 0.99


def test_noise_hides_even_one_sample(features):
    torch.manual_seed(0)
    found = guesses(noisy_moment(second_moment(features[:1]), 100.0, "seed"), 0)
    assert closest(found, features[:1]).item() < 0.7


def test_what_two_clients_sum_gives_each_the_other_ones_moment(features):
    own, other = (client_terms(torch.zeros(DIM + 1, 1), second_moment(part)) for part in (features[:5], features[5:6]))
    left = Sums(*map(torch.sub, map(sum, zip(own, other, strict=True)), own))
    torch.testing.assert_close(guesses(left.moments, 0)[0], features[5], atol=1e-5, rtol=0)


def rows(features):
    sent, others, shadow = (with_one(part) for part in features.split(500))
    return sent, sent, others, Population(shadow)


@pytest.mark.parametrize("scores", [of_moment, of_features, of_mean])
def test_a_set_of_one_is_told_from_all_others(features, scores):
    assert attack(*rows(features), 1, 9, scores)["auc"] > 0.95


def test_members_of_sets_below_the_dimension_are_told_apart_and_of_large_ones_hardly(features):
    few, many = (attack(*rows(features), n, 9, of_moment)["auc"] for n in (6, 500))
    assert few > 0.99 and many < 0.7


def test_whom_the_client_has_never_seen_cannot_be_told_apart(features):
    sent, _, others, population = rows(features)
    strangers = with_one(normalize(torch.randn(500, DIM, generator=torch.Generator().manual_seed(1)) + 0.5))
    assert abs(attack(sent, strangers, others, population, 50, 30, of_moment)["auc"] - 0.5) < 0.05


def test_endless_noise_leaves_no_member_and_hardly_any_noise_does(features):
    torch.manual_seed(0)
    shadow = with_one(features[1000:])
    told = [attack(*rows(features), 50, 60, on_noisy(noise, shadow, 50))["auc"] for noise in (1e-4, 1e6)]
    assert told[0] > 0.6 and abs(told[1] - 0.5) < 0.05


def test_auc_counts_pairs_and_halves_ties():
    assert auc(torch.tensor([2.0]), torch.tensor([1.0])) == 1
    assert auc(torch.tensor([1.0]), torch.tensor([2.0])) == 0
    assert auc(torch.ones(3), torch.ones(5)) == 0.5


def test_budgets_are_the_accountants():
    assert budgets(1.0, 100)["client epsilon"] == epsilon(1.0, 1, 1e-5)
    assert budgets(1.0, 100)["sample epsilon"] == pytest.approx(epsilon(100 / math.sqrt(2), 1, 1e-5))
    assert budgets(0.0, 1) == {"client epsilon": None, "sample epsilon": None}


def test_another_sample_moves_a_moment_no_further_than_the_budget_says(features):
    n = 10
    before, after = (second_moment(part) for part in (features[:n], torch.cat([-features[:1], features[1:n]])))
    assert (before - after).norm() <= math.sqrt(8) / n


def test_a_linear_camera_is_inverted():
    images = torch.rand(300, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mean((2, 3), keepdim=True)
    images = images.expand(-1, -1, 16, 16)
    features = images[:, :, 0, 0] @ torch.tensor([[1.0, 2, 0], [0, 1, 3], [2, 0, 1]])
    found = ridge_decoder(features[:200], images[:200])(features[200:])
    assert quality(found, images[200:]).psnr.min() > 40


def test_equal_images_have_ssim_one_and_grey_ones_the_psnr_of_their_error():
    images = torch.rand(2, 3, 16, 16)
    assert quality(images, images).ssim.allclose(torch.ones(2))
    black, grey = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.1)
    assert quality(grey, black).psnr.item() == pytest.approx(20, abs=1e-3)


@pytest.mark.slow
def test_all_of_it_runs_and_writes_its_pages(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(200) % 4
    np.savez(
        tmp_path / "noise.npz", train_images=images, train_labels=labels, test_images=images[:8], test_labels=labels[:8]
    )
    monkeypatch.setattr(privacy, "SETS", {1: 9, 8: 3, 64: 3})
    monkeypatch.setattr(privacy, "NOISY", {1: 6, 8: 3})
    sizes = {"feature_dim": 32, "shadow": 64, "own": 40, "others": 30, "victims": 10, "epochs": 1, "steps": 2}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    place = [f"--data_root={tmp_path}", "--dataset=noise.npz", "--small_model=test_resnet", f"--out={tmp_path / 'out'}"]
    assert privacy.main([*place, *options]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    alone = [
        row["auc"] for row in found["members"] if row["n"] == 1 and row["knowledge"] in ("untrained", "frozen ViT")
    ]
    assert len(alone) == 4 and min(alone) > 0.9
    for name in ("README.md", "psnr.svg", "auc.svg", "noise.svg", "strip.png"):
        assert (tmp_path / "out" / name).stat().st_size > 500


@pytest.mark.publish
@pytest.mark.skipif(not (privacy.OUT / "results.json").is_file(), reason="benchmarks/privacy.py was not run")
def test_tables_on_the_page_are_those_of_the_results():
    text = page.PAGE.read_text()
    assert len(page.MARKED.findall(text)) == len(page.TABLES)
    assert page.filled(text, privacy.OUT) == text
