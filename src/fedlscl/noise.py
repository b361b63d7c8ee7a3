"""The Gaussian mechanism for what a client uploads, and the privacy that it is worth.

Client level: two federations are neighbours if one of them has zeros in place of one client's contribution. Noise has
standard deviation multiplier * bound on every number, where bound is the L2 norm to which a contribution is clipped.
"""

import math
import os
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Secrets = Literal["seed", "system"]
"""Where what nobody may know is drawn: from the turn's public seed, or from the operating system's randomness."""
MOMENT_BOUND = 2.0
"""Largest trace, and norm, of a second moment C: the mean of e e^T over e = [E; 1] with E of unit norm."""


def clipped(values: Tensor, bound: float) -> Tensor:
    """The values, scaled down to L2 norm ``bound`` where theirs is larger.

    Example:
        >>> clipped(torch.tensor([3.0, 4.0]), 1.0)
        tensor([0.6000, 0.8000])
    """
    return values * (bound / max(values.double().norm().item(), bound))


def noised(values: Tensor, bound: float, multiplier: float, secrets: Secrets) -> Tensor:
    """Values of norm at most ``bound`` with Gaussian noise of standard deviation ``multiplier * bound``."""
    return clipped(values, bound) + multiplier * bound * gaussian(values.shape, secrets).to(values.dtype)


def gaussian(shape: torch.Size, secrets: Secrets) -> Tensor:
    """Independent standard normal numbers, float64."""
    if secrets == "seed":
        return torch.randn(shape, dtype=torch.float64)
    words = np.frombuffer(os.urandom(8 * math.prod(shape)), np.uint64) >> np.uint64(11)
    return torch.special.ndtri((torch.from_numpy(words.astype(np.float64)) + 0.5) / 2**53).reshape(shape)


def noisy_moment(moment: Tensor, multiplier: float, secrets: Secrets) -> Tensor:
    """A second moment (p, p) with noise on its upper triangle, mirrored, and the nearest positive semidefinite matrix.

    The last step looks at the noisy matrix alone and costs no privacy; without it Eq. 5 may have no minimum.
    """
    rows, columns = torch.triu_indices(*moment.shape)
    upper = noised(moment[rows, columns].double(), MOMENT_BOUND, multiplier, secrets)
    noisy = torch.zeros_like(moment, dtype=torch.float64)
    noisy[rows, columns] = upper
    noisy[columns, rows] = upper
    values, vectors = torch.linalg.eigh(noisy)
    return ((vectors * values.clamp(min=0)) @ vectors.mT).to(moment.dtype)


def epsilon(multiplier: float, releases: int, delta: float) -> float:
    """Epsilon at ``delta`` after so many Gaussian mechanisms of one noise multiplier, one client's view of all.

    Together they are exactly one Gaussian mechanism with multiplier / sqrt(releases), whose epsilon Google's
    dp-accounting computes (Balle & Wang, ICML 2018, arXiv 1805.06530).
    """
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError as error:
        raise ValueError("noise_multiplier needs an accountant: pip install 'fedlscl[noise]'.") from error
    return get_epsilon_gaussian(multiplier / math.sqrt(releases), delta)
