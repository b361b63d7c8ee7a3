"""Secure sums and noise for the uploads of Fed-LSCL, both off by default (all of this is ours; not in the paper).

Secure sums: in the run's first exchange a client sends a fresh public key and nothing else, and the server broadcasts
all keys; every later upload is masked. Private keys stay in the client's memory, hence in its checkpoint.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor
from typing_extensions import override

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.analytic import moment_error, pack_symmetric, unpack_symmetric
from fedlscl.functional.distillation import Sums, client_terms, solve, subtract_terms
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
from fedlscl.options import Interval, NonNegative, Positive

MEMBERS, KEYS = "members", "public_keys"
"""Names in the answer to the first exchange."""
MOMENTS, PRODUCTS = "moments", "products"
"""Names of the two sums of Eq. 5 in a message."""
PRIVATE, OWN = "secure.private_key", "secure.own."
"""In a client's memory: its key; its summands of the current sums."""
START = "noise.start"
"""In a client's memory: its generator before any training, which the public seed determines."""
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PrivateSums(Method):
    """A method whose clients upload a generator and second moments."""

    secure_sum: bool = False
    """Mask uploads so that the server sees sums over clients only, and let each client solve Eq. 5 itself. The run's
    first exchange agrees on keys and aggregates nothing; a round without one of the clients ends the run."""
    noise_multiplier: NonNegative = 0.0
    """Gaussian noise on moments and generator, in units of their clipping norm. 0 is NO noise: uploads are exact and
    no epsilon holds. The sums of ``trainer.readouts`` get no noise."""
    clip_norm: Positive = 1.0
    """With noise, the norm to which the generator's distance from its public start is clipped."""
    noise_delta: Annotated[float, Interval("(0, 1)")] = 1e-5
    """The delta at which epsilon is logged after every task."""
    secrets: Secrets = "seed"
    """Source of private keys and noise. 'seed' is for SIMULATION ONLY: anyone who knows the run's seed can remove masks
    and noise. A deployment needs 'system', the operating system's randomness; such a run cannot be repeated."""
    members: Tensor | None = field(default=None, init=False, repr=False)
    """Clients that have agreed on keys."""
    releases: int = field(default=0, init=False, repr=False)
    """Noisy tensors that each client has sent so far."""

    def __post_init__(self) -> None:
        """Check options; noise also needs its accountant."""
        super().__post_init__()
        if self.noise_multiplier:
            epsilon(self.noise_multiplier, 1, self.noise_delta)

    def remember_start(self, client: Client) -> None:
        """Keep the generator's public start, from which noisy uploads measure its change."""
        if self.noise_multiplier and START not in client.memory:
            client.memory |= outgoing({START: client.net.generator.matrix})

    def release(self, client: Client, moment: Tensor) -> Payload:
        """Phi and the packed C, (p, p), with noise if configured."""
        generator = client.net.generator.matrix.cpu()
        if self.noise_multiplier:
            start = client.memory[START]
            generator = start + noised(generator - start, self.clip_norm, self.noise_multiplier, self.secrets)
            moment = noisy_moment(moment, self.noise_multiplier, self.secrets)
        return outgoing({"generator": generator, MOMENTS: pack_symmetric(moment).float()})

    def check_upload(self, upload: Upload) -> str:
        """Whether moments can be those of unit features; masked inputs cannot be checked."""
        if self.secure_sum or MOMENTS not in upload.payload:
            return ""
        moment = unpack_symmetric(upload.payload[MOMENTS], len(upload.payload["generator"]))
        return moment_error(moment, unbounded=self.noise_multiplier > 0 or not self.has_unit_features)

    @property
    def has_unit_features(self) -> bool:
        """Whether features have unit norm, which bounds their moments."""
        return True

    def secure_answer(self, uploads: list[Upload], progress: Progress) -> Payload:
        """All public keys at first; later the sums of Eq. 5."""
        if self.members is None:
            answer = broadcast_keys(uploads, progress)
            self.members = answer[MEMBERS]
            return answer
        total = self.unmask_sums({upload.client: upload.payload for upload in uploads})
        if total:
            self.account(progress)
        return total

    @property
    @override
    def masks_sums(self) -> bool:
        return self.secure_sum

    @property
    @override
    def adds_noise(self) -> bool:
        return self.noise_multiplier > 0

    @override
    def mask_sums(self, client: Client, sums: Payload) -> Payload:
        return mask(client, sums, f"{client.task}/readout")

    @override
    def unmask_sums(self, summands: dict[int, Payload]) -> Payload:
        if self.members is None:
            raise ValueError(
                "the clients of a secure sum have agreed on no keys yet: set rounds_per_task to 2 or more."
            )
        return unmasked_sum(summands, self.members.tolist())

    def account(self, progress: Progress) -> None:
        """Count a round's two noisy tensors, and log epsilon at the end of a task."""
        if not self.noise_multiplier:
            return
        self.releases += 2
        if progress.last:
            value = epsilon(self.noise_multiplier, self.releases, self.noise_delta)
            warning = "" if self.secrets == "system" else " IN SIMULATION: noise from a public seed protects no client"
            logger.warning(
                f"task {progress.task + 1}: epsilon {value:.4g} at delta {self.noise_delta:g} for a client's "
                f"moments and generators so far (noise_multiplier {self.noise_multiplier:g}){warning}"
            )


def has_peer_keys(client: Client) -> bool:
    """Whether the client knows all public keys."""
    return MEMBERS in client.memory


def advertise_keys(client: Client, secrets: Secrets) -> Payload:
    """Draw a key pair, and upload its public half."""
    seeded = secrets == "seed"
    client.memory[PRIVATE] = torch.randint(256, (KEY_BYTES,), dtype=torch.uint8) if seeded else new_private_key()
    return {KEYS: public_key(client.memory[PRIVATE])}


def advertised_spec() -> Payload:
    """Names, shapes and dtypes of ``advertise_keys``."""
    return {KEYS: torch.empty(KEY_BYTES, dtype=torch.uint8, device="meta")}


def broadcast_keys(uploads: list[Upload], progress: Progress) -> Payload:
    """All public keys, for all clients.

    Raises:
        ValueError: if there are fewer than two clients, or no later round in this task.
    """
    if len(uploads) < 2:
        raise ValueError("secure_sum must have two clients or more, got 1: its sum would be that client's upload.")
    if progress.last:
        raise ValueError(
            "secure_sum needs a second exchange in the first task, since the first one agrees on keys only: set "
            "rounds_per_task to 2 or more and server_every to round."
        )
    return {
        MEMBERS: torch.tensor([upload.client for upload in uploads]),
        KEYS: torch.stack([upload.payload[KEYS] for upload in uploads]),
    }


def masked_input(client: Client, payload: Payload) -> Payload:
    """The client's summands of this round, masked: C and C Phi instead of Phi."""
    terms = dict(payload)
    if "generator" in terms:
        generator = terms.pop("generator")
        own = client_terms(generator, unpack_symmetric(terms[MOMENTS], len(generator)))
        terms |= {MOMENTS: pack_symmetric(own.moments), PRODUCTS: own.products}
        client.memory |= {OWN + name: terms[name] for name in (MOMENTS, PRODUCTS)}
    return mask(client, terms, f"{client.task}/{client.round}")


def mask(client: Client, terms: Payload, context: str) -> Payload:
    """Any summands of a client that has all public keys, masked (int64); ``context`` must name one sum only."""
    keys = dict(zip(client.memory[MEMBERS].tolist(), client.memory[KEYS], strict=True))
    return masked(terms, client.id, client.memory[PRIVATE], keys, context)


def masked_spec(plain: Payload) -> Payload:
    """Names, shapes and dtypes of a masked input, given those of the plain upload."""
    return {PRODUCTS if name == "generator" else name: value.to(torch.int64) for name, value in plain.items()}


def apply_secure_answer(client: Client, payload: Payload, lambda_proximal: float) -> None:
    """Keep all public keys, or solve Eq. 5 with the sums of all clients minus the client's summands."""
    if KEYS in payload:
        client.memory |= outgoing({name: payload[name] for name in (MEMBERS, KEYS)})
        return
    if PRODUCTS in payload:
        own = _unpacked({name: client.memory.pop(OWN + name) for name in (MOMENTS, PRODUCTS)})
        generator = client.net.generator
        fused = solve(generator.matrix.cpu(), subtract_terms(_unpacked(payload), own), lambda_proximal)
        generator.load_matrix(fused.to(generator.weight.device))


def _unpacked(terms: Mapping[str, Tensor]) -> Sums:
    return Sums(unpack_symmetric(terms[MOMENTS], len(terms[PRODUCTS])), terms[PRODUCTS])
