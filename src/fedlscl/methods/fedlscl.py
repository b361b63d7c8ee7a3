"""Fed-LSCL (Yu et al., arXiv 2508.09489): large-small collaboration for federated continual learning.

Deviations from the paper, most of them fields: a cosine head with imprinted rows, the current task's samples
beside the buffer in Stage 2, a balanced softmax, BatchNorm at rest, analytic heads on the frozen and on the adapted
path, second moments instead of raw features, Eq. 5 in closed form with a scale-free lambda, secure sums, noise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedlscl.data import Buffer
from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.analytic import MomentSums, added, discriminant_solution, moment_sums, sums_error
from fedlscl.functional.distillation import one_by_one_distill, second_moment, symmetric
from fedlscl.functional.objectives import sample_losses
from fedlscl.methods import privacy as secure
from fedlscl.methods.fedavg import consolidate, consolidated
from fedlscl.methods.privacy import PrivateSums
from fedlscl.methods.training_free import add_sums, empty_sums
from fedlscl.modules.collaborative import GENERATOR_LR, HEAD_LR, CollaborativeModule
from fedlscl.modules.continual import CONSISTENCY, ContinualFineTuningModule
from fedlscl.modules.learner import ConsolidationModule, DistillationModule, Learner
from fedlscl.nets.collaborator import HEADS, Collaborator, CollaboratorConfig
from fedlscl.nets.net import Net

# Which samples Stage 2 replays (Sec. 4.3): those of lowest loss, kept in a buffer, and some of the current task.


class Survey(NamedTuple):
    """What one pass of the client's net over its task's samples tells."""

    buffer: Buffer
    """B^n: the buffer so far and, of each class of the current task, the samples of lowest loss."""
    sums: dict[str, MomentSums]
    """Behind each analytic head that was asked for; none for a client without samples."""


def scored_buffer(client: Client, per_class: int) -> Buffer:
    """B^n as the net is now."""
    return survey(client, per_class).buffer


@torch.no_grad()
def survey(client: Client, per_class: int, heads: Sequence[str] = ()) -> Survey:
    """Score the task's samples, and sum up what the given heads read of them."""
    ids, labels, losses = [], [], []
    sums: dict[str, MomentSums] = {}
    for batch, output in client.infer(client.train_ids):
        ids.append(batch.ids.cpu())
        labels.append(batch.labels.cpu())
        losses.append(sample_losses(output.head_logits, batch.labels, client.classes.to(batch.labels.device)).cpu())
        for head in heads:
            part = moment_sums(getattr(output, HEADS[head]), batch.labels, output.logits.shape[1])
            sums[head] = added(sums[head], part) if head in sums else part
    if not ids:
        return Survey(client.buffer, sums)
    return Survey(client.buffer.updated(torch.cat(ids), torch.cat(labels), torch.cat(losses), per_class), sums)


def feature_moment(client: Client, ids: Tensor) -> Tensor:
    """C_i of the samples' features; of the task's where there are none, and zero of a client without data (ours)."""
    ids = ids if len(ids) else client.train_ids
    if not len(ids):
        size = len(client.net.generator.matrix)
        return torch.zeros(size, size, dtype=torch.float64)
    return second_moment(torch.cat([e for _, (e, _) in client.infer(ids, part=client.net.generate)]))


def predecessor_features(client: Client) -> Tensor:
    """E' of the buffer's samples, (n, feature_dim), on the host: the predecessor stays as it is for a whole task.

    W' = phi'(E') is one product away and would be some thousand numbers per sample.
    """
    net = client.previous
    found = [e.float().cpu() for _, e in client.engine.infer(net, client.data, client.buffer.ids, part=net.embed)]
    return torch.cat(found) if found else torch.empty(0, net.config.feature_dim)


def draw_per_class(client: Client, per_class: int) -> Tensor:
    """Ids of up to ``per_class`` random training samples of each class of the current task."""
    ids = client.train_ids[torch.randperm(len(client.train_ids))]
    labels = client.data.data.labels(ids)
    return torch.cat([ids[labels == label][:per_class] for label in client.classes])


# The closed-form heads of a collaborator, from sums over all clients and tasks.


def sums_of(found: Mapping[str, MomentSums], heads: Sequence[str], net: Net, or_zeros: bool = False) -> Payload:
    """What a client adds to the sums behind its heads for its task; without samples nothing, or zeros."""
    payload: Payload = {}
    for head in heads:
        sums = found.get(head)
        if sums is None and or_zeros:
            sums = MomentSums(*(torch.zeros(part.shape) for part in empty_sums(net)))
        if sums is not None:
            payload |= {f"{head}.{name}": value for name, value in sums._asdict().items()}
    return payload


def heads_error(payload: Payload, counts: Tensor) -> str:
    """What shows that the sums behind a head are not of as many samples of each class as counted, (num_classes,)."""
    for head in HEADS:
        if f"{head}.gram" in payload:
            flaw = sums_error(MomentSums(*(payload[name] for name in _names(head))), counts)
            if flaw:
                return f"{head}.{flaw}"
    return ""


def with_sums(sums: Mapping[str, Tensor], head: str, payloads: Sequence[Payload]) -> dict[str, Tensor]:
    """The sums with what came for a head added."""
    added = dict(sums)
    add_sums(added, payloads, _names(head))
    return added


def solved_heads(sums: Mapping[str, Tensor], shrinkage: float) -> Payload:
    """Linear discriminants of all heads that there are sums for."""
    answer: Payload = {}
    for head in HEADS:
        if f"{head}.gram" in sums:
            moments = MomentSums(*(sums[name] for name in _names(head)))
            answer[f"{head}.weight"], answer[f"{head}.bias"] = discriminant_solution(moments, shrinkage)
    return answer


def _names(head: str) -> list[str]:
    return [f"{head}.{name}" for name in MomentSums._fields]


KEPT = "buffer_features"
"""Where a client keeps its predecessor's features of the buffer."""


@dataclass(kw_only=True)
class FedLSCL(PrivateSums):
    """Client CNNs generate LoRA weights for one frozen ViT; only the generators meet at the server."""

    card: ClassVar = MethodCard(
        "arXiv 2025",
        "2508.09489",
        trains="small CNN, LoRA generator, head; frozen ViT",
        uploads="generator; second moments of features; sums of ViT features",
    )

    collaborator: CollaboratorConfig = field(default_factory=CollaboratorConfig)
    """The net of each client."""
    small_models: Sequence[str] = ()
    """Small models handed out to the clients in turn, in place of collaborator.small_model (Fig. 4)."""
    generator_lr: float = GENERATOR_LR
    """Learning rate of the generator (ours; not in the paper)."""
    head_lr: float = HEAD_LR
    """Learning rate of the head (ours; not in the paper)."""
    freeze_norm: bool = True
    """Keep BatchNorm at rest from the start (ours): E means the same in training, at test and in all clients, but with
    MobileNetV3 from scratch hardly depends on the image. Otherwise the first task sets it, unless ``pretrained``."""
    balance: bool = True
    """Balance the softmax by the client's samples of each class (ours; not in the paper)."""
    shrinkage: float = 0.2
    """Of the analytic heads' covariance, 1 being nearest class mean (ours)."""
    imprint: bool = True
    """Set a new class's head row to its mean feature at the task's start; a linear head ignores it (ours)."""
    continual: Literal["replay", "ewc", "lwf", "none"] = "replay"
    """Stage 2 (Eq. 4), or what replaces it (end of Sec. 4.3)."""
    buffer_per_class: int = 20
    """M: samples of lowest loss kept of each class (Fig. 5)."""
    replay_current: bool = True
    """Mix as many samples per class of the current task into Stage 2 (ours; the paper replays the buffer alone)."""
    lambda_features: float = CONSISTENCY
    """Weight of ||E - E'||^2 in Eq. 4 (its value is not in the paper)."""
    lambda_lora: float = CONSISTENCY
    """Weight of ||W - W'||^2 in Eq. 4 (its value is not in the paper)."""
    distill: bool = True
    """One-by-One Distillation at the server; without it clients keep their own generators (Table 2)."""
    lambda_proximal: float = 1.0
    """lambda of Eq. 5, relative to the mean eigenvalue of the others' moments (ours)."""
    data_anchor: float = 0.0
    """Weight of keeping a generator's outputs on its own features in Eq. 5 (ours; 0 is the paper)."""
    shared_initialisation: bool = True
    """All clients with the same small model start from the same weights (ours; not in the paper)."""
    ewc_strength: float = 100.0
    """Penalty of continual 'ewc'."""
    lwf_alpha: float = 1.0
    """Weight of continual 'lwf'."""
    sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse values that would end the run later."""
        super().__post_init__()
        for name in ("generator_lr", "head_lr", "lambda_proximal", "shrinkage"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} cannot be used: choose more than 0.")
        if self.shrinkage > 1:
            raise ValueError(f"shrinkage {self.shrinkage} is no share: choose up to 1.")
        if self.buffer_per_class < 0:
            raise ValueError(f"buffer_per_class {self.buffer_per_class} cannot be kept: choose 0 or more.")
        shape = self.collaborator
        if self.noise_multiplier and (shape.analytic_weight > 0 or shape.adapted_weight > 0):
            raise ValueError(
                f"noise_multiplier {self.noise_multiplier} does not cover the analytic heads' sums: set "
                "collaborator.analytic_weight and collaborator.adapted_weight to 0."
            )

    def build_net(self, client: int, stream: StreamShape) -> Collaborator:
        """A collaborator with this client's small model."""
        if not self.shared_initialisation:
            torch.manual_seed(torch.initial_seed() + 1 + client)
        config = self.collaborator
        if self.small_models:
            config = replace(config, small_model=self.small_models[client % len(self.small_models)])
        return Collaborator(config, stream.num_classes)

    def begin_task(self, client: Client) -> None:
        """Imprint the rows of the new classes."""
        if self._federates(client):
            self.remember_start(client)
        if self.imprint and len(client.train_ids):
            client.net.head.imprint(*class_means(client, client.train_ids, pick="tokens"))

    def stages(self, client: Client) -> Iterator[Stage]:
        """Lines 6 to 21 of Algorithm 1: train on the task, then, from the second task on, fine-tune on the buffer."""
        yield Stage(
            "collaborative",
            self._stage_one(client),
            client.loader(client.train_ids, self.batch_size),
            self.local_epochs,
        )
        if self.continual == "replay" and client.previous is not None and len(client.buffer):
            ids = client.buffer.ids
            if self.replay_current:
                ids = torch.cat([ids, draw_per_class(client, self.buffer_per_class)])
            module = ContinualFineTuningModule(
                client.net,
                client.previous,
                classes=client.seen,
                old_classes=client.old,
                counts=self._counts(client, ids),
                lambda_features=self.lambda_features,
                lambda_lora=self.lambda_lora,
                lr=self.lr,
                generator_lr=self.generator_lr,
                head_lr=self.head_lr,
                kept=(client.buffer.ids, client.memory[KEPT]) if KEPT in client.memory else None,
            )
            yield Stage("continual", module, client.loader(ids, self.batch_size), self.local_epochs)

    def upload(self, client: Client) -> Payload:
        """phi_i and the second moment of FS_i, the features of what the buffer would be now (M = 0: of the task).

        With analytic heads also the second moments of the ViT's features: once per task of the frozen ones, in every
        round of the adapted ones. CNN, head and images stay on the client. The ViT feature of a class with one sample
        does not: it is a column of ``products``. With ``secure_sum``, a key at first, and then all of it masked.
        """
        if self.secure_sum and not secure.has_peer_keys(client):
            return secure.advertise_keys(client, self.secrets)
        is_first = secure.first_sum_of_task(client) if self.secure_sum else not client.num_synced_rounds
        wanted = {
            "analytic": self.collaborator.analytic_weight > 0 and is_first,
            "adapted": client.net.has_adapted_head,
        }
        heads = [head for head, is_wanted in wanted.items() if is_wanted]
        payload: Payload = {}
        if heads or self._federates(client):
            found = survey(client, self.buffer_per_class, heads)
            payload |= sums_of(found.sums, heads, client.net, or_zeros=self.secure_sum)
            if self._federates(client):
                payload |= self.released(client, feature_moment(client, found.buffer.ids))
        payload = outgoing(payload)
        return secure.masked_upload(client, payload) if self.secure_sum else payload

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """As ``upload``: sums may be missing after a task's first answer and of a client without samples."""
        if self.secure_sum and self.members is None:
            return secure.advertised_spec()
        expected: Payload = {}
        can_come = {"analytic": self.collaborator.analytic_weight > 0, "adapted": net.has_adapted_head}
        for head in HEADS:
            if f"{head}.gram" in upload.payload and can_come[head]:
                expected |= {f"{head}.{name}": value for name, value in empty_sums(net)._asdict().items()}
        if self.distill and net.config.collaboration:
            rows = len(net.generator.matrix)
            moments = torch.empty(rows * (rows + 1) // 2, device="meta")
            expected |= {"generator": net.generator.matrix, "moments": moments}
        return secure.masked_spec(expected) if self.secure_sum else expected

    def check_upload(self, upload: Upload) -> str:
        """As of moments; the sums behind heads have to be of as many samples as announced."""
        return super().check_upload(upload) or (
            "" if self.secure_sum else heads_error(upload.payload, upload.class_counts)
        )

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Eq. 5 for every client in closed form, and the analytic heads that follow from all sums so far."""
        if self.secure_sum:
            return [self.answer_to_all(uploads, progress, self._analytic_heads)] * len(uploads)
        common = self._analytic_heads([upload.payload for upload in uploads], progress)
        if "generator" not in uploads[0].payload:
            return [dict(common) for _ in uploads]
        self.account(progress)
        generators = [upload.payload["generator"] for upload in uploads]
        moments = [symmetric(upload.payload["moments"], len(upload.payload["generator"])) for upload in uploads]
        fused = one_by_one_distill(generators, moments, self.lambda_proximal, data_anchor=self.data_anchor)
        return [{"generator": generator, **common} for generator in fused]

    def download(self, client: Client, payload: Payload) -> None:
        """Take over the personalised generator and the analytic heads; of secure sums, solve for the generator."""
        if self.secure_sum:
            secure.apply_answer(client, payload, self.lambda_proximal, self.data_anchor)
        if "generator" in payload:
            client.net.generator.load_matrix(payload["generator"].to(client.net.head.weight.device))
        for head in HEADS:
            if f"{head}.weight" in payload:
                getattr(client.net, head).set(payload[f"{head}.weight"], payload[f"{head}.bias"])

    def end_task(self, client: Client) -> None:
        """Commit the buffer and keep theta^n, phi^n as they are after the last aggregation."""
        client.buffer = scored_buffer(client, self.buffer_per_class)
        client.snapshot()
        if self.continual == "replay" and client.net.config.collaboration:
            client.memory[KEPT] = predecessor_features(client)
        if self.continual == "ewc":
            consolidate(client, samples=200, gamma=1.0)

    def _stage_one(self, client: Client) -> Learner:
        rates = {
            "lr": self.lr,
            "freeze_norm": self.freeze_norm or client.task > 0 or self.collaborator.pretrained,
            "counts": self._counts(client, client.train_ids),
        }
        parts = {"lr_of": {"generator": self.generator_lr, "head": self.head_lr}, **rates}
        if self.continual == "lwf" and client.previous is not None:
            return DistillationModule(
                client.net, client.previous, client.old, self.lwf_alpha, 2.0, client.classes, **parts
            )
        anchor, fisher = consolidated(client)
        if fisher:
            return ConsolidationModule(client.net, anchor, fisher, self.ewc_strength, client.classes, **parts)
        return CollaborativeModule(
            client.net, client.classes, generator_lr=self.generator_lr, head_lr=self.head_lr, **rates
        )

    def _counts(self, client: Client, ids: Tensor) -> Tensor | None:
        if not self.balance:
            return None
        return torch.bincount(client.data.data.labels(ids), minlength=client.data.data.num_classes)

    def _analytic_heads(self, payloads: Sequence[Payload], progress: Progress) -> Payload:
        """Linear discriminants; sums of adapted features count for good from the task's last round on."""
        self.sums = with_sums(self.sums, "analytic", payloads)
        sums = with_sums(self.sums, "adapted", payloads)
        if progress.last:
            self.sums = sums
        return solved_heads(sums, self.shrinkage)

    def _federates(self, client: Client) -> bool:
        return self.distill and client.net.config.collaboration
