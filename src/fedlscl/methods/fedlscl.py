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

from fedlscl.data import Buffer
from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.analytic import MOMENT_BOUND, packed_size, unpack_symmetric
from fedlscl.functional.distillation import Factors, one_by_one_distill, second_moment
from fedlscl.functional.objectives import cross_entropy
from fedlscl.methods import privacy
from fedlscl.methods.fedavg import consolidate, consolidated
from fedlscl.modules import (
    BIAS_LR,
    CONSISTENCY,
    GENERATOR_LR,
    HEAD_LR,
    CollaborativeModule,
    ConsolidationModule,
    ContinualFineTuningModule,
    DistillationModule,
    Learner,
    part_rates,
)
from fedlscl.nets.collaborator import Collaborator, CollaboratorConfig
from fedlscl.nets.net import Net
from fedlscl.options import Count, Interval, NonNegative, Positive, Whole

AUTO_RANK = 4
"""Rank of the factors that are sent by default (ours; measured in docs/costs.md)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIN_SPREAD = 0.05
"""Spread of E over the buffer below which a small model works as a constant (ours)."""
logger = logging.getLogger(__name__)
KEPT = "buffer_features"
"""In a client's memory: its predecessor's features of the buffer."""


@dataclass(kw_only=True)
class FedLSCL(privacy.PrivateSums):
    """Client CNNs generate LoRA weights for one frozen ViT; the server aggregates the generators only."""

    card: ClassVar = MethodCard(
        "arXiv 2025",
        "2508.09489",
        trains="small CNN, LoRA generator, head; frozen ViT",
        uploads="generator; second moments of features",
    )

    collaborator: CollaboratorConfig = field(default_factory=CollaboratorConfig)
    """The net of each client."""
    small_models: Sequence[str] = ()
    """Small models assigned to the clients in turn, instead of collaborator.small_model (Fig. 4)."""
    small_weights: Sequence[str] = ()
    """Weights files assigned to the clients in turn, instead of collaborator.small_weights."""
    generator_lr: Positive = GENERATOR_LR
    """Learning rate of Phi, the generator's part that depends on the image (ours; not in the paper)."""
    bias_lr: Positive = BIAS_LR
    """Learning rate of b, the generator's part that all images share (ours; not in the paper)."""
    head_lr: Positive = HEAD_LR
    """Learning rate of the head (ours; not in the paper)."""
    freeze_norm: bool = True
    """Keep the CNN's BatchNorm in eval mode (fixed running statistics) from the first task (ours): E has the same scale
    in training, at test and in all clients, but with MobileNetV3 from scratch it hardly depends on the image. If false,
    the first task updates the statistics of a CNN that is not pretrained."""
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
    lambda_features: NonNegative = CONSISTENCY
    """Weight of ||E - E'||^2 in Eq. 4 (its value is not in the paper)."""
    lambda_lora: NonNegative = CONSISTENCY
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
        if self.noise_multiplier and not self.has_unit_features:
            raise ValueError(
                "noise_multiplier must be 0 with raw features, whose moments have no bound, got "
                f"{self.noise_multiplier}: set collaborator.unit_features to true."
            )

    @property
    @override
    def has_unit_features(self) -> bool:
        return self.collaborator.unit_features

    @property
    @override
    def has_equal_small_models(self) -> bool:
        return self.shared_initialisation and len({*self.small_models}) < 2 and len({*self.small_weights}) < 2

    def build_net(self, client: int, stream: StreamShape) -> Collaborator:
        """Build a collaborator with this client's small model."""
        if not self.shared_initialisation:
            torch.manual_seed(torch.initial_seed() + 1 + client)
        config = self.collaborator
        if self.small_models:
            config = replace(config, small_model=self.small_models[client % len(self.small_models)])
        if self.small_weights:
            config = replace(config, small_weights=self.small_weights[client % len(self.small_weights)])
        return Collaborator(config, stream.num_classes)

    def begin_task(self, client: Client) -> None:
        """Imprint the head's rows of the new classes."""
        if self._federates(client.net):
            self.remember_start(client)
        if self.calibrate_norm and client.net.has_small_model and is_first_with_two(client):
            calibrate(client)
        if self.imprint and len(client.train_ids):
            client.net.head.imprint(*class_means(client, client.train_ids, pick="tokens"))

    def stages(self, client: Client) -> Iterator[Stage]:
        """Lines 6 to 21 of Algorithm 1: train on the task, then, from the second task on, fine-tune on the buffer."""
        batches = client.loader(client.train_ids, self.batch_size)
        yield Stage("collaborative", self._first_stage(client), batches, self.local_epochs)
        if self.continual == "replay" and client.previous is not None and len(client.buffer):
            ids = client.buffer.ids
            if self.replay_current:
                ids = torch.cat([ids, draw_per_class(client, self.buffer_per_class)])
            module = ContinualFineTuningModule(
                client.net,
                client.previous,
                classes=client.seen if self.replay_current else client.old,
                old_classes=client.old,
                counts=self._counts(client, ids),
                lambda_features=self.lambda_features,
                lambda_lora=self.lambda_lora,
                consistent_bias=self.consistent_bias,
                lr=self.lr,
                **self._rates(),
                kept=kept_features(client, ids),
            )
            yield Stage("continual", module, client.loader(ids, self.batch_size), self.local_epochs)

    def upload(self, client: Client) -> Payload:
        """phi_i and the second moment of FS_i, the features of the buffer as it would be now (M = 0: of the task).

        CNN, head and images stay on the client. With ``secure_sum``, a public key at first, and then masked inputs.
        """
        if self.secure_sum and not privacy.has_peer_keys(client):
            return privacy.advertise_keys(client, self.secrets)
        payload: Payload = {}
        if self._federates(client.net):
            buffer = updated_buffer(client, self.buffer_per_class)
            moment = feature_moment(client, buffer.ids)
            if rank := self._rank(client.net):
                generator = client.net.generator.matrix.cpu()
                return outgoing(packed_factors(Factors.of(generator, moment, rank), self.upload_dtype))
            payload = outgoing(self.release(client, moment))
        return privacy.masked_input(client, payload) if self.secure_sum else payload

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """As ``upload``; nothing from a client that keeps its generator."""
        if self.secure_sum and self.members is None:
            return privacy.advertised_spec()
        expected: Payload = {}
        if self._federates(net):
            matrix = net.generator.matrix
            if rank := self._rank(net):
                return factors_spec(upload, matrix.shape, rank, self.upload_dtype)
            expected = {"generator": matrix, "moments": torch.empty(packed_size(len(matrix)), device="meta")}
        return privacy.masked_spec(expected) if self.secure_sum else expected

    @override
    def check_upload(self, upload: Upload) -> str:
        if "factor" in upload.payload:
            return factors_error(unpacked_factors(upload.payload), self.upload_dtype, self.has_unit_features)
        return super().check_upload(upload)

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Eq. 5 for every client in closed form; with ``secure_sum`` the sums with which each client solves it.

        With factors, those of the other clients together, truncated to ``answer_rank``.
        """
        if self.secure_sum:
            return [self.secure_answer(uploads, progress)] * len(uploads)
        if "factor" in uploads[0].payload:
            factors = [unpacked_factors(upload.payload) for upload in uploads]
            rank = answer_rank(AUTO_RANK if self.upload_rank == "auto" else float(self.upload_rank))
            others = [[part for part in factors if part is not own] for own in factors]
            return [packed_factors(Factors.merged(o, rank), self.upload_dtype) if o else {} for o in others]
        if "generator" not in uploads[0].payload:
            return [{} for _ in uploads]
        self.account(progress)
        generators = [upload.payload["generator"] for upload in uploads]
        moments = [unpack_symmetric(upload.payload["moments"], len(generators[0])) for upload in uploads]
        fused = one_by_one_distill(generators, moments, self.lambda_proximal)
        return [{"generator": generator} for generator in fused]

    def download(self, client: Client, payload: Payload) -> None:
        """Load the personalised generator, or solve for it from secure sums."""
        if self.secure_sum:
            privacy.apply_secure_answer(client, payload, self.lambda_proximal)
        if "factor" in payload:
            generator = client.net.generator
            fused = unpacked_factors(payload).solve(generator.matrix.cpu(), self.lambda_proximal)
            generator.load_matrix(fused.to(client.net.head.weight.device))
        if "generator" in payload:
            client.net.generator.load_matrix(payload["generator"].to(client.net.head.weight.device))

    def end_task(self, client: Client) -> None:
        """Save the buffer and theta^n, phi^n as they are after the last aggregation."""
        client.buffer = updated_buffer(client, self.buffer_per_class)
        client.snapshot()
        if self.continual == "replay" and client.net.config.collaboration:
            client.memory[KEPT] = features = predecessor_features(client)
            if client.task == 0 and client.net.has_small_model and len(features):
                warn_if_constant(client, features)
        if self.continual == "ewc":
            consolidate(client, samples=200, gamma=1.0)

    def _first_stage(self, client: Client) -> Learner:
        shape = client.net.config
        is_given = shape.pretrained or bool(shape.small_weights) or shape.freeze_small or self.calibrate_norm
        rates = {
            "lr": self.lr,
            "freeze_norm": self.freeze_norm or client.task > 0 or is_given,
            "counts": self._counts(client, client.train_ids),
        }
        parts = {"lr_of": part_rates(**self._rates())}
        if self.continual == "lwf" and client.previous is not None:
            teacher = client.previous, client.old, self.lwf_alpha, 2.0
            return DistillationModule(client.net, *teacher, client.classes, **parts, **rates)
        if self.continual == "ewc" and (consolidation := consolidated(client))[1]:
            return ConsolidationModule(client.net, *consolidation, self.ewc_strength, client.classes, **parts, **rates)
        return CollaborativeModule(client.net, client.classes, **rates, **self._rates())

    def _rates(self) -> dict[str, Any]:
        return {"generator_lr": self.generator_lr, "bias_lr": self.bias_lr, "head_lr": self.head_lr}

    def _counts(self, client: Client, ids: Tensor) -> Tensor | None:
        if not self.balance:
            return None
        return torch.bincount(client.data.data.labels(ids), minlength=client.data.data.num_classes)

    def _federates(self, net: Net) -> bool:
        return self.distill and net.config.collaboration

    def _rank(self, net: Net) -> float | None:
        """Rank of the factors to send, or share of the trace; None to send all."""
        if self.upload_rank != "auto":
            return None if self.upload_rank == "exact" else float(self.upload_rank)
        is_private = self.secure_sum or self.noise_multiplier > 0
        return None if is_private or net.feature_dim < AUTO_RANK else AUTO_RANK


def answer_rank(rank: float) -> float:
    """Rank or share of the server's answer, to uploads of a rank or share: four times the rank, a quarter of the rest.

    Clients have few directions in common, so that with five of them nothing is left out (ours; see docs/costs.md).
    """
    return 4 * rank if rank >= 1 else 1 - (1 - rank) / 4


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
    """Names, shapes and dtypes of factors; a share of the trace leaves their rank to the sender.

    Raises:
        ValueError: if the sender's rank is not possible.
    """
    size, lora_dim = shape
    limit = min(int(rank), size) if rank >= 1 else size
    sent = upload.payload.get("factor", torch.empty(size, limit)).shape[-1]
    if not 1 <= sent <= limit or (rank >= 1 and sent != limit):
        raise ValueError(f"factors must have rank {limit}, got {sent}")
    number = torch.empty(1, device="meta")
    empty = {"factor": (size, sent), "projected": (sent, lora_dim)}
    matrices = {name: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for name, shape in empty.items()}
    return {**matrices, "factor_scale": number, "projected_scale": number, "trace": number}


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
    ids, labels, losses = [], [], []
    for batch, output in client.infer(client.train_ids):
        ids.append(batch.ids.cpu())
        labels.append(batch.labels.cpu())
        classes = client.classes.to(batch.labels.device)
        losses.append(cross_entropy(output.logits, batch.labels, classes, reduction="none").cpu())
    if not ids:
        return client.buffer
    return client.buffer.updated(torch.cat(ids), torch.cat(labels), torch.cat(losses), per_class)


def feature_moment(client: Client, ids: Tensor) -> Tensor:
    """C_i of the samples' features; of the task's if there are none, and zero for a client without data (ours)."""
    ids = ids if len(ids) else client.train_ids
    if not len(ids):
        size = len(client.net.generator.matrix)
        return torch.zeros(size, size, dtype=torch.float64)
    return second_moment(torch.cat([e.cpu() for _, (e, _) in client.infer(ids, part=client.net.generate)]))


def kept_features(client: Client, ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """Ids and predecessor's features of the buffer, if it has all samples of old classes among ``ids`` (n,)."""
    old = ids[torch.isin(client.data.data.labels(ids), client.old)]
    if KEPT not in client.memory or not torch.isin(old, client.buffer.ids).all():
        return None
    return client.buffer.ids, client.memory[KEPT]


def predecessor_features(client: Client) -> Tensor:
    """E' of the buffer's samples, (n, feature_dim), on the CPU: constant during the next task.

    W' = phi'(E') is one product away and would be some thousand numbers per sample.
    """
    net = client.previous
    found = [e.float().cpu() for _, e in client.engine.infer(net, client.data, client.buffer.ids, part=net.embed)]
    return torch.cat(found) if found else torch.empty(0, net.feature_dim)


def feature_spread(features: Tensor) -> float:
    """Root mean squared distance of E (n, feature_dim) from its mean: 0 for a constant, at most 1 for unit norm (ours).

    Example:
        >>> feature_spread(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        0.7071067690849304
    """
    return float((features - features.mean(0)).square().sum(1).mean().sqrt())


def warn_if_constant(client: Client, features: Tensor) -> None:
    """Log that a small model's features E hardly depend on the image: then it contributes a constant (ours)."""
    spread = feature_spread(features)
    if spread < MIN_SPREAD:
        logger.warning(
            f"client {client.id}: the small model's features E differ by {spread:.2g} between the images of its "
            f"buffer, less than {MIN_SPREAD}, so that it works as a constant: try another small_model, small_weights "
            "or calibrate_norm."
        )


def is_first_with_two(client: Client) -> bool:
    """Whether the task is the client's first one with two images; one image has no variance."""
    counts = [len(client.data.train_ids(task)) for task in range(client.task + 1)]
    return counts[-1] > 1 and max(counts[:-1], default=0) < 2


@torch.no_grad()
def calibrate(client: Client) -> None:
    """Set the CNN's BatchNorm statistics to the means over the task's batches, without changing its weights."""
    norms = [part for part in client.net.small.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average

    def in_train_mode(images: Tensor) -> Tensor:
        for norm in norms:
            norm.train()
        return client.net.small(images)

    for _ in client.infer(client.train_ids, part=in_train_mode):
        pass
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    client.net.eval()
