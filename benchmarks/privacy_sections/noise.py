"""Noise on moments: what is left of the attacks, and the epsilon that each amount is worth."""

import math
from typing import Any

import torch
from torch import Tensor

from fedlscl.functional.privacy import MOMENT_BOUND, epsilon, noisy_moment
from privacy_sections.inversion import Attacker, Change, reconstructed
from privacy_sections.membership import SHARES, Population, Score, Scores, attack, likelihood, of_moment, with_one
from privacy_sections.world import KNOWLEDGE, World

MULTIPLIERS = (0.0, 0.0003, 0.001, 0.01, 0.1, 1.0)
DELTA = 1e-5
KNOWN = "client's net"
TRIED = 8
"""Sets of its own on which the attacker tries the mechanism."""
LARGEST = 1e6
"""Beyond it epsilon says nothing, and the accountant is not asked."""


def noisy(multiplier: float) -> Change:
    """What a moment becomes."""
    return lambda moment: noisy_moment(moment, multiplier, "seed") if multiplier else moment


def on_noisy(multiplier: float, shadow: Tensor, n: int) -> Scores:
    """The likelihood ratio of who knows the mechanism, and what its output is on average: from sets of its own."""
    change = noisy(multiplier)
    expected = sum(change(second_moment_of(part)).double() for part in shadow.split(n)[:TRIED]) / min(
        TRIED, len(shadow) // n
    )
    added = multiplier * MOMENT_BOUND

    def scores(rows: Tensor, population: Population) -> dict[str, Score]:
        moment = change(second_moment_of(rows))
        found = {f"likelihood {s:g}": likelihood(moment, population, s, n, added, expected) for s in SHARES}
        return found if multiplier else found | of_moment(rows, population)

    return scores


def second_moment_of(rows: Tensor) -> Tensor:
    """Mean of e e^T over rows e, in the float32 in which it travels."""
    return (rows.mT @ rows / len(rows)).float()


def noise(world: World, attacker: Attacker, pairs: int, sizes: dict[int, int]) -> list[dict[str, Any]]:
    """Attacks of who knows the client's net on one noisy moment, by multiplier and number of samples."""
    client, net = KNOWLEDGE[KNOWN]
    sent, seen = with_one(world.features[client, "own"]), with_one(world.features[net, "own"])
    others, rows = with_one(world.features[net, "others"]), []
    shadow = with_one(world.features[net, "shadow"])
    population = Population(shadow)
    for multiplier in MULTIPLIERS:
        for n, repeats in sizes.items():
            torch.manual_seed(0)
            told = attack(sent, seen, others, population, n, repeats, on_noisy(multiplier, shadow, n))
            row = {"multiplier": multiplier, "n": n, **told, **budgets(multiplier, n)}
            if n <= len(attacker.images) // 2:
                made = reconstructed(attacker, KNOWN, pairs, n, 16, noisy(multiplier))
                row |= {name: made[name] for name in ("psnr", "other set psnr", "cosine")}
            rows.append(row)
    return rows


def budgets(multiplier: float, n: int) -> dict[str, float | None]:
    """Epsilon of one release for a whole client, and for one of its n samples where all others stay as they are.

    Of e e^T the norm is 2. A client's whole moment may be as large as the bound; another sample in place of one moves
    the mean by sqrt(8) / n at most, since no two e have a negative product.
    """
    return {
        "client epsilon": bounded_epsilon(multiplier),
        "sample epsilon": bounded_epsilon(multiplier * MOMENT_BOUND * n / math.sqrt(8)),
    }


def bounded_epsilon(multiplier: float) -> float | None:
    """Epsilon at `DELTA` of one release; none where it would be beyond `LARGEST`."""
    return epsilon(multiplier, 1, DELTA) if multiplier and 0.5 / multiplier**2 < LARGEST else None
