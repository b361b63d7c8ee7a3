"""What keeps a single client out of sight: masked sums and noise. Both are OFF by default."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fedlscl.distillation import symmetric, upper_triangle
from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.federated.statistics import moment_flaw
from fedlscl.methods import secure
from fedlscl.noise import Secrets, epsilon, noised, noisy_moment

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

    def objection(self, upload: Upload) -> str:
        """Whether moments are any of unit features; masked ones look like nothing."""
        if self.secure_sum or "moments" not in upload.payload:
            return ""
        moment = symmetric(upload.payload["moments"], len(upload.payload["generator"]))
        return moment_flaw(moment, noisy=self.noise_multiplier > 0)

    def answer_to_all(
        self, uploads: list[Upload], progress: Progress, heads: Callable[[list[Payload], Progress], Payload]
    ) -> Payload:
        """Of secure sums: everybody's key at first, later those of Eq. 5 and what ``heads`` makes of the others."""
        if self.members is None:
            answer = secure.introduction(uploads, progress)
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
