"""Fed-LSCL (Yu et al., arXiv 2508.09489): large-small collaboration for federated continual learning.

`FedLSCL` follows Algorithm 1 from top to bottom; the functions below it are its steps, in the order of their use.

Deviations from the paper, most of them options: a cosine head with imprinted rows, the current task's samples beside
the buffer in Stage 2, a balanced softmax, BatchNorm in eval mode, second moments instead of raw features, Eq. 5 in
closed form with a scale-free lambda, secure sums, noise.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedlscl import modules
from fedlscl.data import Buffer
from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import Method, MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.analytic import MOMENT_BOUND, moment_error, packed_size, unpack_symmetric
from fedlscl.functional.distillation import Factors, one_by_one_distill, second_moment
from fedlscl.functional.objectives import cross_entropy
from fedlscl.functional.privacy import KEY_BYTES
from fedlscl.methods import privacy
from fedlscl.methods.fedavg import consolidate, consolidated
from fedlscl.nets.collaborator import Collaborator, CollaboratorConfig
from fedlscl.nets.net import Net
from fedlscl.options import Count, Interval, NonNegative, Positive, Whole

AUTO_RANK = 4
"""Rank of the factors that are sent by default (ours; measured in docs/costs.md)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIN_SPREAD = 0.05
"""Spread of E over the buffer below which a small model works as a constant (ours)."""
KEPT = "buffer_features"
"""In a client's memory: its predecessor's features E' of the buffer, constant during a task; W' is one product away."""
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Collaborative(Method):
    """A method that trains collaborators."""

    collaborator: CollaboratorConfig = field(default_factory=CollaboratorConfig)
    """The net of each client."""
    generator_lr: Positive = modules.GENERATOR_LR
    """Learning rate of Phi, the generator's part that depends on the image (ours; not in the paper)."""
    bias_lr: Positive = modules.BIAS_LR
    """Learning rate of b, the generator's part that all images share (ours; not in the paper)."""
    head_lr: Positive = modules.HEAD_LR
    """Learning rate of the head (ours; not in the paper)."""

    @property
    def rates(self) -> dict[str, Any]:
        """Learning rates of the CNN and of the other parts, by the names of an objective's arguments."""
        return {"lr": self.lr, "generator_lr": self.generator_lr, "bias_lr": self.bias_lr, "head_lr": self.head_lr}


@dataclass(kw_only=True)
class FedLSCL(privacy.PrivateSums, Collaborative):
    """Client CNNs generate LoRA weights for one frozen ViT; the server aggregates the generators only."""

    card: ClassVar = MethodCard(
        "arXiv 2025",
        "2508.09489",
        "small CNN, LoRA generator, head; frozen ViT",
        "generator; second moments of features",
    )
    small_models: Sequence[str] = ()
    """Small models assigned to the clients in turn, instead of collaborator.small_model (Fig. 4)."""
    small_weights: Sequence[str] = ()
    """Weights files assigned to the clients in turn, instead of collaborator.small_weights."""
    freeze_norm: bool = True
    """Keep the CNN's BatchNorm in eval mode from the first task: E has the same scale in training, at test and in all
    clients (ours). If false, the first task updates the statistics of a CNN that is not pretrained."""
    calibrate_norm: bool = False
    """Before the first task of two or more images, set BatchNorm's statistics to those of these images, once (ours)."""
    balance: bool = True
    """Balance the softmax by the client's samples of each class (ours; not in the paper)."""
    imprint: bool = True
    """Set a new class's head row to its mean feature at the task's start; a linear head ignores it (ours)."""
    continual: Literal["replay", "ewc", "lwf", "none"] = "replay"
    """Stage 2 (Eq. 4), or its replacement (end of Sec. 4.3)."""
    buffer_per_class: Whole = 20
    """M: samples of lowest loss kept of each class (Fig. 5)."""
    replay_current: bool = True
    """Mix as many samples per class of the current task into Stage 2 (ours; the paper replays the buffer alone)."""
    lambda_features: NonNegative = modules.CONSISTENCY
    """Weight of ||E - E'||^2 in Eq. 4 (its value is not in the paper)."""
    lambda_lora: NonNegative = modules.CONSISTENCY
    """Weight of ||W - W'||^2 in Eq. 4 (its value is not in the paper)."""
    consistent_bias: bool = True
    """If false, ||W - W'||^2 leaves out b, the part of W that all images share (ours)."""
    upload_rank: Count | Annotated[float, Interval("(0, 1)")] | Literal["exact", "auto"] = "auto"
    """What clients and server send of C and C Phi for Eq. 5: their best approximation of a rank (1 and more), or of a
    share of C's trace (below 1); 'exact' all of it; 'auto' rank 4, or all where that is smaller or where masks or noise
    need it (ours; see docs/costs.md)."""
    upload_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers of the factors; their largest values are sent apart in float32 (ours)."""
    distill: bool = True
    """One-by-One Distillation at the server; without it clients keep their own generators (Table 2)."""
    lambda_proximal: Positive = 1.0
    """lambda of Eq. 5, relative to the mean eigenvalue of the others' moments (ours)."""
    shared_initialisation: bool = True
    """All clients with the same small model start from the same weights (ours; not in the paper)."""
    ewc_strength: NonNegative = 100.0
    """Penalty of continual 'ewc'."""
    lwf_alpha: NonNegative = 1.0
    """Weight of continual 'lwf'."""

    def __post_init__(self) -> None:
        """Check options before a run depends on them."""
        super().__post_init__()
        if (rank := self.upload_rank) not in ("exact", "auto") and (self.secure_sum or self.noise_multiplier):
            what = "secure_sum: factors do not add up" if self.secure_sum else "noise, which is of the exact terms"
            raise ValueError(f"upload_rank must be exact with {what}, got {rank!r}.")
        if self.distill and self.collaborator.collaboration and len({name == "none" for name in self.small_models}) > 1:
            raise ValueError(
                "small_models must all be CNNs, or all 'none', for clients to fuse their generators, got "
                f"{', '.join(self.small_models)}: leave 'none' out, or set distill to false."
            )
        if self.noise_multiplier and not self.collaborator.unit_features:
            raise ValueError(
                "noise_multiplier must be 0 with raw features, whose moments have no bound, got "
                f"{self.noise_multiplier}: set collaborator.unit_features to true."
            )

    @property
    @override
    def has_equal_small_models(self) -> bool:
        return self.shared_initialisation and len({*self.small_models}) < 2 and len({*self.small_weights}) < 2

    def build_net(self, client: int, stream: StreamShape) -> Collaborator:
        """Build a collaborator with this client's small model."""
        if not self.shared_initialisation:
            torch.manual_seed(torch.initial_seed() + 1 + client)
        in_turn = {"small_model": self.small_models, "small_weights": self.small_weights}
        own = {name: values[client % len(values)] for name, values in in_turn.items() if values}
        return Collaborator(replace(self.collaborator, **own), stream.num_classes)

    def begin_task(self, client: Client) -> None:
        """Imprint the head's rows of the new classes."""
        if self._federates(client.net):
            self.remember_start(client)
        if self.calibrate_norm and client.net.has_small_model:
            calibrate(client)
        if self.imprint and len(client.train_ids):
            client.net.head.imprint(*class_means(client, client.train_ids, pick="tokens"))

    def stages(self, client: Client) -> Iterator[Stage]:
        """Lines 6 to 21 of Algorithm 1: train on the task, then, from the second task on, fine-tune on the buffer."""
        batches = client.loader(client.train_ids, self.batch_size)
        yield Stage("collaborative", self._first_stage(client), batches, self.local_epochs)
        if self.continual == "replay" and client.previous is not None and len(client.buffer):
            ids, columns = client.buffer.ids, client.old
            if self.replay_current:
                ids, columns = torch.cat([ids, draw_per_class(client, self.buffer_per_class)]), client.seen
            weights = self.lambda_features, self.lambda_lora, self.consistent_bias
            data = columns, client.old, self._counts(client, ids)
            module = modules.ContinualFineTuningModule(
                client.net, client.previous, *data, *weights, **self.rates, kept=kept_features(client, ids)
            )
            yield Stage("continual", module, client.loader(ids, self.batch_size), self.local_epochs)

    def upload(self, client: Client) -> Payload:
        """phi_i and the second moment of FS_i, the features of the buffer as it would be now (M = 0: of the task).

        CNN, head and images stay on the client. With ``secure_sum``, a public key at first, and then masked inputs.
        """
        if self.secure_sum and privacy.KEYS not in client.memory:
            return self.advertise_key(client)
        payload: Payload = {}
        if self._federates(client.net):
            moment = feature_moment(client, updated_buffer(client, self.buffer_per_class).ids)
            if rank := self._rank(client.net):
                generator = client.net.generator.matrix.cpu()
                return outgoing(packed_factors(Factors.of(generator, moment, rank), self.upload_dtype))
            payload = self.release(client, moment)
        return self.masked_input(client, payload) if self.secure_sum else payload

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """As ``upload``; nothing from a client that keeps its generator."""
        if self.secure_sum and self.members is None:
            return {privacy.KEYS: torch.empty(KEY_BYTES, dtype=torch.uint8, device="meta")}
        if not self._federates(net):
            return {}
        matrix = net.generator.matrix
        if rank := self._rank(net):
            return factors_spec(upload, matrix.shape, rank, self.upload_dtype)
        moments = torch.empty(packed_size(len(matrix)), device="meta")
        if self.secure_sum:
            return {"products": matrix.long(), "moments": moments.long()}
        return {"generator": matrix, "moments": moments}

    def check_upload(self, upload: Upload) -> str:
        """Whether moments can be those of the features; masked inputs cannot be checked."""
        payload, is_bounded = upload.payload, self.collaborator.unit_features
        if "factor" in payload:
            return factors_error(unpacked_factors(payload), self.upload_dtype, is_bounded)
        if "generator" in payload:
            moment = unpack_symmetric(payload["moments"], len(payload["generator"]))
            return moment_error(moment, unbounded=self.noise_multiplier > 0 or not is_bounded)
        return ""

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Eq. 5 for every client in closed form; with ``secure_sum`` the sums with which each client solves it.

        With factors, those of the other clients together, truncated: to four times the rank, or dropping a quarter of
        what a share drops. Clients have few directions in common, so that with five of them nothing is left out (ours;
        see docs/costs.md).
        """
        if self.secure_sum:
            return [self.secure_answer(uploads, progress)] * len(uploads)
        payloads = [upload.payload for upload in uploads]
        if "factor" in payloads[0]:
            factors = [unpacked_factors(payload) for payload in payloads]
            rank = AUTO_RANK if self.upload_rank == "auto" else float(self.upload_rank)
            rank = 4 * rank if rank >= 1 else 1 - (1 - rank) / 4
            others = [[part for part in factors if part is not own] for own in factors]
            return [packed_factors(Factors.merged(o, rank), self.upload_dtype) if o else {} for o in others]
        if "generator" not in payloads[0]:
            return [{} for _ in uploads]
        self.account(progress)
        generators = [payload["generator"] for payload in payloads]
        moments = [unpack_symmetric(payload["moments"], len(generators[0])) for payload in payloads]
        fused = one_by_one_distill(generators, moments, self.lambda_proximal)
        return [{"generator": generator} for generator in fused]

    def download(self, client: Client, payload: Payload) -> None:
        """Load the personalised generator, or solve for it from secure sums or factors."""
        if privacy.KEYS in payload:
            client.memory |= outgoing(payload)
        elif payload:
            generator = client.net.generator
            if self.secure_sum:
                fused = privacy.fused_generator(client, payload, self.lambda_proximal)
            elif "factor" in payload:
                fused = unpacked_factors(payload).solve(generator.matrix.cpu(), self.lambda_proximal)
            else:
                fused = payload["generator"]
            generator.load_matrix(fused)

    def end_task(self, client: Client) -> None:
        """Save the buffer and theta^n, phi^n as they are after the last aggregation."""
        client.buffer = updated_buffer(client, self.buffer_per_class)
        client.snapshot()
        if self.continual == "replay" and client.net.config.collaboration:
            client.memory[KEPT] = features = embedded(client, client.previous, client.buffer.ids)
            if client.task == 0 and client.net.has_small_model and len(features):
                warn_if_constant(client, features)
        if self.continual == "ewc":
            consolidate(client, samples=200, gamma=1.0)

    def _first_stage(self, client: Client) -> modules.Learner:
        config = client.net.config
        is_given = config.pretrained or bool(config.small_weights) or config.freeze_small or self.calibrate_norm
        freeze_norm = self.freeze_norm or client.task > 0 or is_given
        common: dict[str, Any] = {"counts": self._counts(client, client.train_ids), "freeze_norm": freeze_norm}
        rates = {"lr": self.lr, "lr_of": modules.part_rates(self.generator_lr, self.bias_lr, self.head_lr)}
        if self.continual == "lwf" and client.previous is not None:
            teacher = client.previous, client.old, self.lwf_alpha, 2.0
            return modules.DistillationModule(client.net, *teacher, client.classes, **common, **rates)
        if self.continual == "ewc" and (earlier := consolidated(client))[1]:
            penalty = *earlier, self.ewc_strength
            return modules.ConsolidationModule(client.net, *penalty, client.classes, **common, **rates)
        return modules.CollaborativeModule(client.net, client.classes, **common, **self.rates)

    def _counts(self, client: Client, ids: Tensor) -> Tensor | None:
        data = client.data.data
        return data.labels(ids).bincount(minlength=data.num_classes) if self.balance else None

    def _federates(self, net: Net) -> bool:
        return self.distill and net.config.collaboration

    def _rank(self, net: Net) -> float | None:
        """Rank of the factors to send, or share of the trace; None to send all."""
        if self.upload_rank == "auto":
            return None if self.masks_sums or self.adds_noise or net.feature_dim < AUTO_RANK else AUTO_RANK
        return None if self.upload_rank == "exact" else float(self.upload_rank)


def packed_factors(factors: Factors, dtype: str) -> Payload:
    """Factors as a message: divided by their largest values, which are sent apart."""
    payload: Payload = {"trace": factors.trace.float().reshape(1)}
    for name in ("factor", "projected"):
        value = getattr(factors, name)
        scale = value.abs().max()  # 0 without samples; a positive number in its place would be a norm to compare with
        rounded = (value / scale.where(scale > 0, 1)).to(DTYPES[dtype])
        payload |= {name: rounded, f"{name}_scale": scale.float().reshape(1)}
    return payload


def unpacked_factors(payload: Payload) -> Factors:
    """Factors from a message, in float64."""
    factor, projected = (payload[n].double() * payload[f"{n}_scale"].double() for n in ("factor", "projected"))
    return Factors(factor, projected, payload["trace"].double()[0])


def factors_spec(upload: Upload, shape: torch.Size, rank: float, dtype: str) -> Payload:
    """Names, shapes and dtypes of factors; a share of the trace leaves their rank to the sender."""
    size, lora_dim = shape
    limit = min(int(rank), size) if rank >= 1 else size
    sent = upload.payload["factor"].shape[-1] if "factor" in upload.payload else limit
    if not 1 <= sent <= limit or (rank >= 1 and sent != limit):
        raise ValueError(f"factors must have rank {limit}, got {sent}")
    with torch.device("meta"):
        return packed_factors(Factors(torch.empty(size, sent), torch.empty(sent, lora_dim), torch.empty(())), dtype)


def factors_error(factors: Factors, dtype: str, is_bounded: bool) -> str:
    """Why factors cannot be of a second moment, or ''."""
    gram = factors.factor.mT @ factors.factor
    slack = 4 * torch.finfo(DTYPES[dtype]).eps
    if gram.trace() > (1 + slack) * factors.trace + slack:
        return "factors are larger than the trace of their moments"
    if is_bounded and factors.trace > 1.02 * MOMENT_BOUND:
        return "moments are larger than those of unit features"
    off = (gram - gram.diagonal().diag()).abs().max()
    return "factors are not orthogonal" if off > slack * len(factors.factor) ** 0.5 * gram.trace() else ""


def draw_per_class(client: Client, per_class: int) -> Tensor:
    """Ids of up to ``per_class`` random training samples of each class of the current task."""
    ids = client.train_ids[torch.randperm(len(client.train_ids))]
    labels = client.data.data.labels(ids)
    return torch.cat([ids[labels == label][:per_class] for label in client.classes])


@torch.no_grad()
def updated_buffer(client: Client, per_class: int) -> Buffer:
    """B^n: the buffer so far and, of each class of the current task, the samples of lowest loss (Sec. 4.3)."""
    ids, classes = client.train_ids, client.classes.to(client.net.head.weight.device)
    losses = [
        cross_entropy(output.logits, batch.labels, classes, reduction="none").cpu()
        for batch, output in client.infer(ids)
    ]
    if not losses:
        return client.buffer
    return client.buffer.updated(ids, client.data.data.labels(ids), torch.cat(losses), per_class)


def feature_moment(client: Client, ids: Tensor) -> Tensor:
    """C_i of the samples' features; of the task's if there are none, and zero for a client without data (ours)."""
    ids = ids if len(ids) else client.train_ids
    if not len(ids):
        size = len(client.net.generator.matrix)
        return torch.zeros(size, size, dtype=torch.float64)
    return second_moment(embedded(client, client.net, ids))


def embedded(client: Client, net: Collaborator, ids: Tensor) -> Tensor:
    """E of some samples by one of the client's nets, (n, feature_dim), float32 on the CPU."""
    features = [e.float().cpu() for _, e in client.engine.infer(net, client.data, ids, part=net.embed)]
    return torch.cat([torch.empty(0, net.feature_dim), *features])


def kept_features(client: Client, ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """Ids and predecessor's features of the buffer, if it has all samples of old classes among ``ids`` (n,)."""
    old = ids[torch.isin(client.data.data.labels(ids), client.old)]
    if KEPT not in client.memory or not torch.isin(old, client.buffer.ids).all():
        return None
    return client.buffer.ids, client.memory[KEPT]


def warn_if_constant(client: Client, features: Tensor) -> None:
    """Log that a small model's features E (n, feature_dim) hardly depend on the image: it adds a constant (ours).

    Their spread is the root mean squared distance from their mean: 0 for a constant, at most 1 for unit norm.
    """
    spread = float((features - features.mean(0)).square().sum(1).mean().sqrt())
    if spread < MIN_SPREAD:
        logger.warning(
            f"client {client.id}: the small model's features E differ by {spread:.2g} between the images of its "
            f"buffer, less than {MIN_SPREAD}, so that it works as a constant: try another small_model, small_weights "
            "or calibrate_norm."
        )


@torch.no_grad()
def calibrate(client: Client) -> None:
    """Set the CNN's BatchNorm statistics to the means over the task's batches, without changing its weights.

    Only in the client's first task with two images or more: one image has no variance.
    """
    *earlier, now = [len(client.data.train_ids(task)) for task in range(client.task + 1)]
    if now < 2 or max(earlier, default=0) > 1:
        return
    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    momenta = {part: part.momentum for part in client.net.small.modules() if isinstance(part, batch_norm)}
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average

    def in_train_mode(images: Tensor) -> Tensor:
        for norm in momenta:
            norm.train()
        return client.net.small(images)

    for _ in client.infer(client.train_ids, part=in_train_mode):
        pass
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    client.net.eval()
