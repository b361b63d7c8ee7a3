"""Secure sums and noise for the uploads of Fed-LSCL, both off by default (all of this is ours; not in the paper).

Secure sums: in the run's first exchange a client sends a fresh public key and nothing else, and the server broadcasts
all keys; every later upload is masked. Private keys stay in the client's memory, hence in its checkpoint.
"""

import logging
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor
from typing_extensions import override

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional import privacy
from fedlscl.functional.analytic import pack_symmetric, unpack_symmetric
from fedlscl.functional.distillation import Sums, client_terms, solve
from fedlscl.options import Interval, NonNegative, Positive

MEMBERS, KEYS = "members", "public_keys"
"""Names in the answer to the first exchange."""
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
    secrets: privacy.Secrets = "seed"
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
            privacy.epsilon(self.noise_multiplier, 1, self.noise_delta)

    @property
    @override
    def masks_sums(self) -> bool:
        return self.secure_sum

    @property
    @override
    def adds_noise(self) -> bool:
        return self.noise_multiplier > 0

    def remember_start(self, client: Client) -> None:
        """Keep the generator's public start, from which noisy uploads measure its change."""
        if self.noise_multiplier and START not in client.memory:
            client.memory |= outgoing({START: client.net.generator.matrix})

    def release(self, client: Client, moment: Tensor) -> Payload:
        """Phi and the packed C, (p, p), with noise if configured."""
        generator = client.net.generator.matrix.cpu()
        if self.noise_multiplier:
            start = client.memory[START]
            generator = start + privacy.noised(generator - start, self.clip_norm, self.noise_multiplier, self.secrets)
            moment = privacy.noisy_moment(moment, self.noise_multiplier, self.secrets)
        return outgoing({"generator": generator, "moments": pack_symmetric(moment).float()})

    def advertise_key(self, client: Client) -> Payload:
        """Draw a key pair, and upload its public half."""
        size = (privacy.KEY_BYTES,)
        key = torch.randint(256, size, dtype=torch.uint8) if self.secrets == "seed" else privacy.new_private_key()
        client.memory[PRIVATE] = key
        return {KEYS: privacy.public_key(key)}

    def masked_input(self, client: Client, payload: Payload) -> Payload:
        """The client's summands of this round, masked: C and C Phi instead of Phi."""
        terms: Payload = {}
        if payload:
            generator = payload["generator"]
            moments, products = client_terms(generator, unpack_symmetric(payload["moments"], len(generator)))
            terms = {"moments": pack_symmetric(moments), "products": products}
            client.memory |= {OWN + name: value for name, value in terms.items()}
        return mask(client, terms, f"{client.task}/{client.round}")

    def secure_answer(self, uploads: list[Upload], progress: Progress) -> Payload:
        """All public keys at first; later the sums of Eq. 5."""
        if self.members is not None:
            total = self.unmask_sums({upload.client: upload.payload for upload in uploads})
            if total:
                self.account(progress)
            return total
        if len(uploads) < 2:
            raise ValueError("secure_sum must have two clients or more, got 1: its sum would be that client's upload.")
        if progress.last:
            raise ValueError(
                "secure_sum needs a second exchange in the first task, since the first one agrees on keys only: set "
                "rounds_per_task to 2 or more and server_every to round."
            )
        self.members = torch.tensor([upload.client for upload in uploads])
        return {MEMBERS: self.members, KEYS: torch.stack([upload.payload[KEYS] for upload in uploads])}

    @override
    def mask_sums(self, client: Client, sums: Payload) -> Payload:
        return mask(client, sums, f"{client.task}/readout")

    @override
    def unmask_sums(self, summands: dict[int, Payload]) -> Payload:
        if self.members is None:
            raise ValueError("clients of a secure sum have agreed on no keys yet: set rounds_per_task to 2 or more.")
        return privacy.unmasked_sum(summands, self.members.tolist())

    def account(self, progress: Progress) -> None:
        """Count a round's two noisy tensors, and log epsilon at the end of a task."""
        if not self.noise_multiplier:
            return
        self.releases += 2
        if progress.last:
            value = privacy.epsilon(self.noise_multiplier, self.releases, self.noise_delta)
            warning = "" if self.secrets == "system" else " IN SIMULATION: noise from a public seed protects no client"
            logger.warning(
                f"task {progress.task + 1}: epsilon {value:.4g} at delta {self.noise_delta:g} for a client's "
                f"moments and generators so far (noise_multiplier {self.noise_multiplier:g}){warning}"
            )


def mask(client: Client, terms: Payload, context: str) -> Payload:
    """Any summands of a client that has all public keys, masked (int64); ``context`` must name one sum only."""
    keys = dict(zip(client.memory[MEMBERS].tolist(), client.memory[KEYS], strict=True))
    return privacy.masked(terms, client.id, client.memory[PRIVATE], keys, context)


def fused_generator(client: Client, total: Payload, lambda_proximal: float) -> Tensor:
    """Solve Eq. 5 with the sums of all clients minus the client's summands, (p, lora_dim)."""
    moments, products = (total[name] - client.memory.pop(OWN + name) for name in ("moments", "products"))
    others = Sums(unpack_symmetric(moments, len(products)), products)
    return solve(client.net.generator.matrix.cpu(), others, lambda_proximal)
