"""Secure sums and noise for the statistics that Fed-LSCL uploads."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.analytic import moment_error
from fedlscl.functional.distillation import Sums, client_terms, solve, subtract_terms, symmetric, upper_triangle
from fedlscl.functional.privacy import (
    KEY_BYTES,
    Secrets,
    epsilon,
    masked,
    new_private_key,
    noised,
    noisy_moment,
    public_key,
    unmasked_sum,
)
from fedlscl.methods import privacy as secure

# Secure sums within a method's hooks: keys in the run's first exchange, masked sums in all later ones.
#
# In the first exchange a client sends a fresh public key and nothing else, and the server hands everybody's around; it
# sums nothing. Private keys stay in the client's memory, hence in its checkpoint.

MEMBERS, KEYS = "members", "public_keys"
"""Names in the answer to the first exchange."""
MOMENTS, PRODUCTS = "moments", "products"
"""Names under which the two sums of Eq. 5 travel."""
PRIVATE, OWN, SUMMED = "secure.private_key", "secure.own.", "secure.task"
"""In a client's memory: its key; its share of the sums under way; the last task of which a sum came back."""


def advertise_keys(client: Client, secrets: Secrets) -> Payload:
    """Draw a key pair, whose public half is all that leaves."""
    seeded = secrets == "seed"
    client.memory[PRIVATE] = torch.randint(256, (KEY_BYTES,), dtype=torch.uint8) if seeded else new_private_key()
    return {KEYS: public_key(client.memory[PRIVATE])}


def advertised_spec() -> Payload:
    """Names, shapes and dtypes of an announcement."""
    return {KEYS: torch.empty(KEY_BYTES, dtype=torch.uint8, device="meta")}


def broadcast_keys(uploads: list[Upload], progress: Progress) -> Payload:
    """Everybody's public key, for everybody.

    Raises:
        ValueError: if there is nobody to hide behind, or the task has no later round to sum anything in.
    """
    if len(uploads) < 2:
        raise ValueError("secure_sum of one client would be what it sent: have two clients or more.")
    if progress.last:
        raise ValueError(
            "secure_sum agrees on keys in the run's first exchange and sums nothing in it, so that its task needs "
            "another one: set rounds_per_task to 2 or more and server_every to round."
        )
    return {
        MEMBERS: torch.tensor([upload.client for upload in uploads]),
        KEYS: torch.stack([upload.payload[KEYS] for upload in uploads]),
    }


def has_peer_keys(client: Client) -> bool:
    """Whether the client has everybody's key."""
    return MEMBERS in client.memory


def first_sum_of_task(client: Client) -> bool:
    """Whether no sum of the current task has come back to the client yet."""
    return SUMMED not in client.memory or int(client.memory[SUMMED]) != client.task


def masked_upload(client: Client, payload: Payload) -> Payload:
    """What the client adds to this round's sums, unreadable: C Phi in place of Phi, all else as it is."""
    terms = dict(payload)
    if "generator" in terms:
        generator = terms.pop("generator")
        own = client_terms(generator, symmetric(terms[MOMENTS], len(generator)))
        terms |= {MOMENTS: upper_triangle(own.moments), PRODUCTS: own.products}
        client.memory |= {OWN + name: terms[name] for name in (MOMENTS, PRODUCTS)}
    keys = dict(zip(client.memory[MEMBERS].tolist(), client.memory[KEYS], strict=True))
    return masked(terms, client.id, client.memory[PRIVATE], keys, f"{client.task}/{client.round}")


def masked_spec(expected: Payload) -> Payload:
    """Names, shapes and dtypes of a masked upload, given those of the plain one."""
    named = {PRODUCTS if name == "generator" else name: value for name, value in expected.items()}
    return {name: value.to(torch.int64) for name, value in named.items()}


def sums_of_all(uploads: list[Upload], members: Tensor) -> dict[str, Tensor]:
    """What the masked terms of all members add up to."""
    return unmasked_sum({upload.client: upload.payload for upload in uploads}, members.tolist())


def apply_answer(client: Client, payload: Payload, lambda_proximal: float, data_anchor: float) -> None:
    """Remember everybody's key, or solve Eq. 5 with the sums of all less one's own."""
    if KEYS in payload:
        client.memory |= outgoing({name: payload[name] for name in (MEMBERS, KEYS)})
        return
    client.memory[SUMMED] = torch.tensor(client.task)
    if PRODUCTS in payload:
        own = _matrices({name: client.memory.pop(OWN + name) for name in (MOMENTS, PRODUCTS)})
        others = subtract_terms(_matrices(payload), own)
        generator = client.net.generator
        fused = solve(generator.matrix.cpu(), others, lambda_proximal, data_anchor, own.moments)
        generator.load_matrix(fused.to(generator.weight.device))


def _matrices(terms: Mapping[str, Tensor]) -> Sums:
    return Sums(symmetric(terms[MOMENTS], len(terms[PRODUCTS])), terms[PRODUCTS])


# What keeps a single client out of sight: masked sums and noise. Both are OFF by default.

START = "noise.start"
"""A client's generator before any training, which the public seed gives, in its memory."""
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PrivateSums(Method):
    """A method whose clients upload a generator and second moments (all of this is ours; not in the paper)."""

    secure_sum: bool = False
    """Mask uploads so that the server learns sums over clients only, and let each client solve Eq. 5 for itself. The
    run's first exchange agrees on keys and fuses nothing; a round that lacks a client ends the run."""
    noise_multiplier: float = 0.0
    """Gaussian noise on moments and generator, in units of the norm that each is clipped to. 0 is NO noise: uploads
    are exact and no epsilon holds. Analytic heads have to be off, since their sums would travel without noise."""
    clip_norm: float = 1.0
    """With noise, the largest norm of what a generator has moved from its public start."""
    noise_delta: float = 1e-5
    """The delta at which epsilon is logged after every task."""
    secrets: Secrets = "seed"
    """Where private keys and noise come from. 'seed' is for SIMULATION ONLY: whoever knows the run's seed can take
    masks and noise off again. A deployment needs 'system', the operating system's randomness; no run repeats it."""
    members: Tensor | None = field(default=None, init=False, repr=False)
    """Clients that have agreed on keys."""
    releases: int = field(default=0, init=False, repr=False)
    """Noisy tensors that each client has sent so far."""

    def __post_init__(self) -> None:
        """Refuse noise that cannot be counted."""
        super().__post_init__()
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier {self.noise_multiplier} is no noise: choose 0 or more.")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm {self.clip_norm} leaves nothing: choose more than 0.")
        if not 0 < self.noise_delta < 1:
            raise ValueError(f"noise_delta {self.noise_delta} is no probability: choose more than 0, below 1.")
        if self.noise_multiplier:
            epsilon(self.noise_multiplier, 1, self.noise_delta)  # the accountant is there

    def remember_start(self, client: Client) -> None:
        """Keep the generator's public start where noise will need it."""
        if self.noise_multiplier and START not in client.memory:
            client.memory |= outgoing({START: client.net.generator.matrix})

    def released(self, client: Client, moment: Tensor) -> Payload:
        """Phi and the upper triangle of C, (p, p), as they may be seen."""
        generator = client.net.generator.matrix.cpu()
        if self.noise_multiplier:
            start = client.memory[START]
            generator = start + noised(generator - start, self.clip_norm, self.noise_multiplier, self.secrets)
            moment = noisy_moment(moment, self.noise_multiplier, self.secrets)
        return outgoing({"generator": generator, "moments": upper_triangle(moment).float()})

    def check_upload(self, upload: Upload) -> str:
        """Whether moments are any of unit features; masked ones look like nothing."""
        if self.secure_sum or "moments" not in upload.payload:
            return ""
        moment = symmetric(upload.payload["moments"], len(upload.payload["generator"]))
        return moment_error(moment, noisy=self.noise_multiplier > 0)

    def answer_to_all(
        self, uploads: list[Upload], progress: Progress, heads: Callable[[list[Payload], Progress], Payload]
    ) -> Payload:
        """Of secure sums: everybody's key at first, later those of Eq. 5 and what ``heads`` makes of the others."""
        if self.members is None:
            answer = secure.broadcast_keys(uploads, progress)
            self.members = answer[secure.MEMBERS]
            return answer
        total = secure.sums_of_all(uploads, self.members)
        common = heads([total], progress)
        if secure.PRODUCTS not in total:
            return common
        self.account(progress)
        return {name: total[name] for name in (secure.MOMENTS, secure.PRODUCTS)} | common

    def account(self, progress: Progress) -> None:
        """Count a round's two noisy tensors, and state epsilon at the end of a task."""
        if not self.noise_multiplier:
            return
        self.releases += 2
        if progress.last:
            value = epsilon(self.noise_multiplier, self.releases, self.noise_delta)
            warning = "" if self.secrets == "system" else " IN SIMULATION: noise from a public seed protects nobody"
            logger.warning(
                f"task {progress.task + 1}: epsilon {value:.4g} at delta {self.noise_delta:g} for a client's "
                f"moments and generators so far (noise_multiplier {self.noise_multiplier:g}){warning}"
            )
