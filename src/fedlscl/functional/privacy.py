"""Sums under pairwise masks (secure aggregation) and Gaussian noise with an accountant."""

import math
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


# Sums that a server learns without seeing a summand (Bonawitz et al., CCS 2017, doi 10.1145/3133956.3133982).
#
# Numbers become integers modulo 2^64. Every two clients agree on a key (X25519) and expand it into one mask (ChaCha20),
# which one of them adds and the other subtracts: all masks cancel exactly, in whatever order they are added.
#
# Reduced: there are no secret shares, so a sum that lacks a member cannot be unmasked and is refused.

FRACTION_BITS = 36
"""Numbers are rounded to multiples of 2^-36; sums may reach 2^27."""
KEY_BYTES = 32
"""Of a private or public key."""
REMEDY = "go on from the last checkpoint when all members are there, or train without secure_sum"


def encode(values: Tensor, num_members: int) -> Tensor:
    """Fixed point in int64, of the same shape; ``num_members`` such tensors can be added without overflow.

    Example:
        >>> encode(torch.tensor([1.0, -0.5]), 3)
        tensor([ 68719476736, -34359738368])
    """
    limit = 2.0 ** (63 - FRACTION_BITS) / num_members
    largest = values.abs().max().item() if values.numel() else 0.0
    if not largest < limit:
        raise ValueError(
            f"a value of {largest:.3g} cannot be summed over {num_members} members: stay below {limit:.3g}."
        )
    return (values.double() * 2.0**FRACTION_BITS).round().to(torch.int64)


def decode(words: Tensor) -> Tensor:
    """What ``encode`` gave, or a sum of such, in float64."""
    return words.double() * 2.0**-FRACTION_BITS


def new_private_key() -> Tensor:
    """An X25519 private key (32,) uint8 from the operating system's randomness."""
    return torch.frombuffer(bytearray(os.urandom(KEY_BYTES)), dtype=torch.uint8)


def public_key(private: Tensor) -> Tensor:
    """The public key (32,) uint8 that belongs to a private one."""
    raw = x25519().X25519PrivateKey.from_private_bytes(_bytes(private)).public_key().public_bytes_raw()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def masked(
    terms: Mapping[str, Tensor], me: int, private: Tensor, public_keys: Mapping[int, Tensor], context: str
) -> dict[str, Tensor]:
    """One member's terms as int64 that look uniform to whoever lacks the members' private keys.

    Args:
        terms: what is to be summed, by name; the same names and shapes at every member.
        me: the member's number.
        private: its private key.
        public_keys: of all members by number, its own included.
        context: what the sum is, such as task and round. A pair's mask is the same whenever its keys and the context
            are: two uploads of different terms under one context give away their difference.
    """
    words = {name: encode(terms[name], len(public_keys)) for name in sorted(terms)}
    flat = np.concatenate(
        [np.empty(0, np.uint64), *(value.flatten().numpy().view(np.uint64) for value in words.values())]
    )
    for other, key in public_keys.items():
        if other != me:
            mask = pair_mask(private, key, f"{context}/{min(me, other)}/{max(me, other)}", len(flat))
            flat = flat + mask if me < other else flat - mask
    parts = torch.from_numpy(flat.view(np.int64)).split([value.numel() for value in words.values()])
    return {name: part.reshape(words[name].shape).clone() for name, part in zip(words, parts, strict=True)}


def unmasked_sum(uploads: Mapping[int, Mapping[str, Tensor]], members: Sequence[int]) -> dict[str, Tensor]:
    """Sums over all members in float64, by name; ``uploads`` is what ``masked`` gave each of them.

    Raises:
        ValueError: naming the members that are missing, who were not invited, or whose terms differ in name or shape.
    """
    missing, strangers = sorted(set(members) - set(uploads)), sorted(set(uploads) - set(members))
    if missing:
        raise ValueError(f"the secure sum lacks clients {missing}, whose masks stay in it: {REMEDY}.")
    if strangers:
        raise ValueError(f"clients {strangers} have agreed on no keys with the {len(members)} members: {REMEDY}.")
    first = uploads[members[0]]
    for member in members:
        if {n: v.shape for n, v in uploads[member].items()} != {n: v.shape for n, v in first.items()}:
            raise ValueError(f"client {member} sends other names or shapes than client {members[0]}: {REMEDY}.")
    return {name: decode(_add([uploads[member][name] for member in members])) for name in first}


def pair_mask(private: Tensor, public: Tensor, context: str, length: int) -> "NDArray[np.uint64]":
    """The mask (length,) that two members share: ChaCha20 under a key for them and the context alone."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    keys = x25519()
    secret = keys.X25519PrivateKey.from_private_bytes(_bytes(private)).exchange(
        keys.X25519PublicKey.from_public_bytes(_bytes(public))
    )
    key = HKDF(SHA256(), KEY_BYTES, salt=None, info=f"fedlscl secure sum {context}".encode()).derive(secret)
    # The key serves one stream, so that a constant nonce repeats nothing.
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * length))
    return np.frombuffer(stream, "<u8").astype(np.uint64)


def x25519() -> ModuleType:
    """The module of the optional package ``cryptography``."""
    try:
        from cryptography.hazmat.primitives.asymmetric import x25519
    except ImportError as error:
        raise ValueError("secure_sum needs the package cryptography: pip install 'fedlscl[secure]'.") from error
    return x25519


def _add(words: Sequence[Tensor]) -> Tensor:
    total = np.zeros(words[0].shape, np.uint64)  # wraps at 2^64 as the masks do
    for part in words:
        total = total + part.numpy().view(np.uint64)
    return torch.from_numpy(total.view(np.int64))


def _bytes(key: Tensor) -> bytes:
    return key.numpy().tobytes()


# The Gaussian mechanism for what a client uploads, and the privacy that it is worth.
#
# Client level: two federations are neighbours if one of them has zeros in place of one client's contribution. Noise has
# standard deviation multiplier * bound on every number, where bound is the L2 norm to which a contribution is clipped.

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
