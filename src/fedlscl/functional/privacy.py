"""Sums under pairwise masks (secure aggregation) and Gaussian noise with an accountant.

Secure sums (Bonawitz et al., CCS 2017, doi 10.1145/3133956.3133982): numbers become integers modulo 2^64. Every two
clients agree on a key (X25519) and expand it into one mask (ChaCha20), which one of them adds and the other subtracts:
all masks cancel exactly, in any order. Reduced: there are no secret shares, so a sum that lacks a member is refused.

Noise is client-level: two federations are neighbours if one has zeros instead of one client's contribution. Its
standard deviation is multiplier * bound on every number, where bound is the L2 norm that contributions are clipped to.
"""

import math
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedlscl.functional.analytic import MOMENT_BOUND, pack_symmetric, unpack_symmetric

FRACTION_BITS = 36
"""Numbers are rounded to multiples of 2^-36; sums may reach 2^27."""
KEY_BYTES = 32
"""Of a private or public key."""
REMEDY = "resume from the last checkpoint when all members are online, or set secure_sum to false"
Secrets = Literal["seed", "system"]
"""Source of private keys and noise: the run's public seed, or the operating system's randomness."""


def encode(values: Tensor, num_members: int) -> Tensor:
    """Fixed point in int64, of the same shape; ``num_members`` such tensors can be added without overflow.

    Example:
        >>> encode(torch.tensor([1.0, -0.5]), 3)
        tensor([ 68719476736, -34359738368])
    """
    limit = 2.0 ** (63 - FRACTION_BITS) / num_members
    largest = values.abs().max().item() if values.numel() else 0.0
    if not largest < limit:
        raise ValueError(f"values in a secure sum of {num_members} members must be < {limit:.3g}, got {largest:.3g}.")
    return (values.double() * 2.0**FRACTION_BITS).round().to(torch.int64)


def decode(words: Tensor) -> Tensor:
    """Numbers from fixed point, or from a sum of fixed-point words, in float64."""
    return words.double() * 2.0**-FRACTION_BITS


def new_private_key() -> Tensor:
    """An X25519 private key (32,) uint8 from the operating system's randomness."""
    return torch.frombuffer(bytearray(os.urandom(KEY_BYTES)), dtype=torch.uint8)


def public_key(private: Tensor) -> Tensor:
    """The public key (32,) uint8 that belongs to a private one."""
    raw = x25519().X25519PrivateKey.from_private_bytes(private.numpy().tobytes()).public_key().public_bytes_raw()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def masked(
    terms: Mapping[str, Tensor], me: int, private: Tensor, public_keys: Mapping[int, Tensor], context: str
) -> dict[str, Tensor]:
    """One member's terms plus its masks, int64: uniform noise without the members' private keys.

    ``terms`` are summands by name, of the same names and shapes at every member; ``me`` is the member's number among
    those of all ``public_keys``. ``context`` names the sum, such as task and round: different terms under one context
    reveal their difference.
    """
    words = {name: encode(terms[name], len(public_keys)) for name in sorted(terms)}
    flat = torch.cat([torch.empty(0, dtype=torch.int64), *(value.flatten() for value in words.values())])
    for other, key in public_keys.items():
        if other != me:
            mask = pair_mask(private, key, f"{context}/{min(me, other)}/{max(me, other)}", len(flat))
            flat = flat + mask if me < other else flat - mask  # int64 wraps at 2^64
    parts = flat.split([value.numel() for value in words.values()])
    return {name: part.view_as(words[name]).clone() for name, part in zip(words, parts, strict=True)}


def unmasked_sum(uploads: Mapping[int, Mapping[str, Tensor]], members: Sequence[int]) -> dict[str, Tensor]:
    """Sums over all members in float64, by name, from the members' ``masked`` inputs."""
    missing, unknown = sorted(set(members) - set(uploads)), sorted(set(uploads) - set(members))
    if missing:
        raise ValueError(f"the secure sum lacks clients {missing}, whose masks do not cancel: {REMEDY}.")
    if unknown:
        raise ValueError(f"clients {unknown} have no keys in common with the {len(members)} members: {REMEDY}.")
    shapes = {member: {name: words.shape for name, words in uploads[member].items()} for member in members}
    for member in members:
        if shapes[member] != shapes[members[0]]:
            raise ValueError(f"client {member} sends other names or shapes than client {members[0]}: {REMEDY}.")
    return {name: decode(torch.stack([uploads[m][name] for m in members]).sum(0)) for name in shapes[members[0]]}


def pair_mask(private: Tensor, public: Tensor, context: str, length: int) -> Tensor:
    """The mask (length,), int64, that two members share: ChaCha20 under a key for them and the context alone."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    theirs = x25519().X25519PublicKey.from_public_bytes(public.numpy().tobytes())
    secret = x25519().X25519PrivateKey.from_private_bytes(private.numpy().tobytes()).exchange(theirs)
    key = HKDF(SHA256(), KEY_BYTES, salt=None, info=f"fedlscl secure sum {context}".encode()).derive(secret)
    # The key serves one stream, so that a constant nonce repeats nothing.
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * length))
    return torch.from_numpy(np.frombuffer(stream, "<i8").astype(np.int64))


def x25519() -> ModuleType:
    """The module of the optional package ``cryptography``."""
    try:
        from cryptography.hazmat.primitives.asymmetric import x25519
    except ImportError as error:
        raise ValueError("secure_sum needs the package cryptography: pip install 'fedlscl[secure]'.") from error
    return x25519


def clipped(values: Tensor, bound: float) -> Tensor:
    """The values, scaled down to L2 norm ``bound`` if theirs is larger.

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

    The projection depends on the noisy matrix alone and costs no privacy; without it Eq. 5 may have no minimum.
    """
    upper = noised(pack_symmetric(moment).double(), MOMENT_BOUND, multiplier, secrets)
    values, vectors = torch.linalg.eigh(unpack_symmetric(upper, len(moment)))
    return ((vectors * values.clamp(min=0)) @ vectors.mT).to(moment.dtype)


def epsilon(multiplier: float, releases: int, delta: float) -> float:
    """Epsilon at ``delta`` of all of a client's ``releases``, Gaussian mechanisms with one noise multiplier.

    Together they are exactly one Gaussian mechanism with multiplier / sqrt(releases), whose epsilon Google's
    dp-accounting computes (Balle & Wang, ICML 2018, arXiv 1805.06530).
    """
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError as error:
        raise ValueError("noise_multiplier needs an accountant: pip install 'fedlscl[noise]'.") from error
    return get_epsilon_gaussian(multiplier / math.sqrt(releases), delta)
