"""What TARGET and MFCL share: at the end of a task the server makes images out of the global net."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl.data.images import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload
from fedlscl.functional.objectives import cross_entropy, knowledge_distillation
from fedlscl.methods.fedavg import FedAvg
from fedlscl.modules.learner import ClassificationModule, Learner
from fedlscl.nets.cnn import MEAN, STD, SmallClassifier
from fedlscl.nets.net import Frozen, Net, fit

# Image synthesizers that learn from a classifier alone, without data (TARGET, arXiv 2303.06937; MFCL, 2311.07784).


class Synthesizer(nn.Module):
    """Noise (B, noise_dim) to images (B, 3, size, size) in 0..1: a linear layer, then doublings with a convolution.

    ``channels`` are those of the feature maps from the smallest, of size / 2^(len - 1) pixels, to the largest. Three
    of them give the nets of both papers for small images; at 224 pixels TARGET's first layer would have 103 M
    weights, and MFCL takes (64,) * 6.
    """

    def __init__(
        self, noise_dim: int, channels: Sequence[int], size: int, standardise: bool = False,
        mean: Sequence[float] = MEAN, std: Sequence[float] = STD,
    ) -> None:  # fmt: skip
        """``standardise`` ends in tanh and a BatchNorm without weights (MFCL), else a sigmoid does (TARGET).

        Standardised images are turned into pixels with the classifier's ``mean`` and ``std``.
        """
        super().__init__()
        self.start = start_size(channels, size)
        self.noise_dim, self.width = noise_dim, channels[0]
        self.project = nn.Linear(noise_dim, channels[0] * self.start**2)
        layers: list[nn.Module] = [nn.BatchNorm2d(channels[0])]
        for before, after in pairwise(channels):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1)]
            layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(channels[-1], 3, 3, padding=1))
        layers += (
            [nn.Tanh(), nn.BatchNorm2d(3, affine=False), Denormalize(mean, std)] if standardise else [nn.Sigmoid()]
        )
        self.layers = nn.Sequential(*layers)

    def forward(self, noise: Tensor) -> Tensor:
        """(B, noise_dim) to (B, 3, size, size)."""
        return self.layers(self.project(noise).view(-1, self.width, self.start, self.start))


class Denormalize(nn.Module):
    """Standardised images as pixels in 0..1: the classifier's own normalisation gives back what came in."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) to the same shape."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


class Statistics(NamedTuple):
    """Of a batch at the entrance of one BatchNorm layer, and what the layer remembers; (channels,) each."""

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


class SyntheticBatch(NamedTuple):
    """Images out of noise and what the teacher makes of them."""

    images: Tensor
    """(B, 3, size, size) in 0..1."""
    shown: Tensor
    """What the teacher saw of them."""
    logits: Tensor
    """(B, num_classes)."""
    statistics: list[Statistics]
    """By BatchNorm layer."""

    @property
    def head_logits(self) -> Tensor:
        """The teacher's head is the only one."""
        return self.logits


class GeneratorWithTeacher(Net):
    """A synthesizer and the frozen classifier that judges its images; noise takes the place of stored images.

    With ``batch_size`` the noise is learned, too: as a shift, which starts at zero.
    """

    def __init__(self, synthesizer: Synthesizer, teacher: Net, batch_size: int = 0, padding: int | None = None) -> None:
        """Where ``padding`` is given, the teacher sees images at random shifts of so many pixels, or mirrored."""
        super().__init__()
        self.synthesizer, self.teacher, self.padding = synthesizer, Frozen(teacher), padding
        self.shift = nn.Parameter(torch.zeros(batch_size or 1, synthesizer.noise_dim), requires_grad=batch_size > 0)

    @property
    def head(self) -> nn.Module:
        """The teacher's."""
        return self.teacher.net.head

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> SyntheticBatch:
        """Noise (B, noise_dim) to images, logits and statistics, with gradient to noise and synthesizer."""
        made = self.synthesizer(images + self.shift)
        shown = made if self.padding is None else jitter(made, self.padding)
        with norm_statistics(self.teacher) as statistics:
            logits = self.teacher.net(shown).head_logits
        return SyntheticBatch(made, shown, logits, statistics)


@contextmanager
def norm_statistics(net: nn.Module) -> Iterator[list[Statistics]]:
    """Fills a list with what enters each BatchNorm layer while the net runs."""
    found: list[Statistics] = []

    def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        found.append(Statistics(mean, variance, layer.running_mean, layer.running_var))

    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def jitter(images: Tensor, padding: int) -> Tensor:
    """Every image (B, 3, s, s) shifted by up to ``padding`` pixels with black moving in, and mirrored half the time."""
    count, size, device = len(images), images.shape[-1], images.device
    steps = torch.arange(size, device=device)
    rows, columns = (torch.randint(2 * padding + 1, (count, 1), device=device) + steps for _ in range(2))
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    taken = padded.gather(2, rows[:, None, :, None].expand(-1, 3, -1, padded.shape[3]))
    return taken.gather(3, columns[:, None, None, :].expand(-1, 3, size, -1))


def start_size(channels: Sequence[int], size: int) -> int:
    """Pixels of the smallest feature map."""
    factor = 2 ** (len(channels) - 1)
    if not channels or size % factor or size < factor:
        raise ValueError(
            f"synthesis_size {size} is no multiple of {factor}, which synthesis_channels {list(channels)} doubles up "
            "to: change one of them."
        )
    return size // factor


# Terms by which a classifier judges images made of noise, as pure functions (TARGET 2303.06937, MFCL 2311.07784).
#
# ``statistics``: rows (mean, variance, running mean, running variance) of a batch at each BatchNorm layer, (channels,)
# each.

Rows = Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
Averages = Sequence[tuple[Tensor, Tensor]]

EPSILON = 1e-8
"""Added to variances whose quotient is taken."""


def norm_distance(statistics: Rows, averages: Averages = (), momentum: float = 0.9) -> Tensor:
    """Sum over layers of ``||running var - v|| + ||running mean - m||`` (TARGET's L_BN).

    Where there are ``averages`` (mean, variance) of earlier batches, m and v are ``momentum`` parts of them.
    """
    terms = []
    for number, (mean, variance, running_mean, running_variance) in enumerate(statistics):
        if averages:
            earlier_mean, earlier_variance = averages[number]
            mean = torch.lerp(mean, earlier_mean, momentum)
            variance = torch.lerp(variance, earlier_variance, momentum)
        terms += [torch.linalg.vector_norm(running_variance - variance), torch.linalg.vector_norm(running_mean - mean)]
    return torch.stack(terms).sum()


def updated(averages: Averages, statistics: Rows, momentum: float = 0.9) -> list[tuple[Tensor, Tensor]]:
    """The averages after another batch; a first batch is its own."""
    now = [(mean.detach(), variance.detach()) for mean, variance, *_ in statistics]
    if not averages:
        return now
    return [
        (torch.lerp(m, earlier_m, momentum), torch.lerp(v, earlier_v, momentum))
        for (m, v), (earlier_m, earlier_v) in zip(now, averages, strict=True)
    ]


def norm_divergence(statistics: Rows) -> Tensor:
    """Mean over layers and channels of KL(N(running) || N(batch)) (MFCL's batch-statistics loss)."""
    terms = []
    for mean, variance, running_mean, running_variance in statistics:
        v, r = variance + EPSILON, running_variance + EPSILON
        terms.append(((v / r).log() / 2 + (r + (running_mean - mean).square()) / (2 * v) - 0.5).mean())
    return torch.stack(terms).mean()


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the batch of KL(teacher || student) of logits (B, C), where both name the same class (TARGET's L_adv).

    Example:
        >>> disagreement(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(0.)
    """
    target, answer = teacher.float().log_softmax(1), student.float().log_softmax(1)
    divergence = F.kl_div(answer, target, reduction="none", log_target=True).sum(1)
    return (divergence * (teacher.argmax(1) == student.argmax(1))).mean()


def unevenness(logits: Tensor) -> Tensor:
    """``1 + sum p log p / log C`` of the batch's mean softmax p: 0 where classes are even, 1 for one class (MFCL).

    Example:
        >>> unevenness(torch.tensor([[1e4, 0.0], [0.0, 1e4]])).item()
        0.0
    """
    p = logits.float().softmax(1).mean(0)
    return 1 + torch.special.entr(p).sum().neg() / math.log(max(len(p), 2))


def roughness(images: Tensor) -> Tensor:
    """Mean squared distance of images (B, C, h, w) from their blur: Gaussian, 5 x 5, sigma 1, reflected (MFCL)."""
    steps = torch.arange(-2.0, 3.0, device=images.device)
    line = (-steps.square() / 2).exp()
    kernel = torch.outer(line, line) / line.sum().square()
    weight = kernel.to(images.dtype).expand(images.shape[1], 1, 5, 5)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), weight, groups=images.shape[1])
    return F.mse_loss(images, blurred)


# Objectives of synthesizers at the server, and of TARGET's student.

BETAS = (0.5, 0.999)
"""Of TARGET's Adam."""


class InversionModule(Learner):
    """TARGET: noise and a copy of the synthesizer learn images of given classes that a student finds hard.

    Gradients add up in ``slow``, the synthesizer that outlives the batch (FOMAML); ``best`` is the batch of the lowest
    objective so far.
    """

    def __init__(
        self,
        net: GeneratorWithTeacher,
        student: Net,
        slow: nn.Module,
        classes: Tensor,
        averages: Averages,
        lambda_label: float,
        lambda_norm: float,
        lambda_adversarial: float,
        lr_noise: float,
        **optimisation: Any,
    ) -> None:
        """``averages`` are BatchNorm statistics of earlier batches; ``classes`` the columns that teacher and S know."""
        super().__init__(net, lr_of={"shift": lr_noise}, **optimisation)
        self.student, self.averages = Frozen(student), averages
        self.slow: Iterable[Tensor] = list(slow.parameters())
        self.lambda_label, self.lambda_norm, self.lambda_adversarial = lambda_label, lambda_norm, lambda_adversarial
        self.register_buffer("classes", classes, persistent=False)
        self.best: Tensor | None = None
        self.lowest = torch.tensor(torch.inf)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Oh CE(f(x), y) + bn L_BN + adv L_adv for noise ``batch.images`` (B, noise_dim)."""
        dream = self.net(batch.images)
        terms = {
            "label": self.lambda_label * cross_entropy(dream.logits, batch.labels, self.classes),
            "norm": self.lambda_norm * norm_distance(dream.statistics, self.averages),
        }
        if self.lambda_adversarial:
            answers = self.student.net(dream.shown).head_logits[:, self.classes]
            terms["adversarial"] = -self.lambda_adversarial * disagreement(dream.logits[:, self.classes], answers)
        self._keep(dream.images.detach(), torch.stack(list(terms.values())).sum().detach())
        self.latest = updated(self.averages, dream.statistics)
        return terms

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Hand the copy's gradients on."""
        for slow, fast in zip(self.slow, self.net.synthesizer.parameters(), strict=True):
            gradient = fast.grad.to(slow.device)
            slow.grad = gradient.clone() if slow.grad is None else slow.grad + gradient

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with the rates of synthesizer and noise, and TARGET's betas."""
        optimizer = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["betas"] = BETAS
        return optimizer

    def _keep(self, images: Tensor, loss: Tensor) -> None:
        is_better = loss < self.lowest.to(loss.device)
        self.best = images if self.best is None else torch.where(is_better, images, self.best)
        self.lowest = torch.where(is_better, loss, self.lowest.to(loss.device))


class ImitationModule(Learner):
    """TARGET: a student learns the teacher's answers on synthetic images, by SGD."""

    def __init__(self, net: Net, teacher: Net, classes: Tensor, temperature: float, lr: float) -> None:
        """``classes`` are the columns that it learns."""
        super().__init__(net.requires_grad_(True), lr=lr)
        self.teacher, self.temperature = Frozen(teacher), temperature
        self.register_buffer("classes", classes, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``T^2 KL(teacher || student)``."""
        answers = self.net(batch.images).head_logits[:, self.classes]
        wanted = self.teacher(batch.images).head_logits[:, self.classes]
        return {"distillation": knowledge_distillation(answers, wanted, self.temperature)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with the momentum and weight decay of TARGET's code."""
        return torch.optim.SGD(self.net.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)


class SynthesisModule(Learner):
    """MFCL: a synthesizer learns images that the teacher is sure about, of all classes, with its own statistics."""

    def __init__(
        self,
        net: GeneratorWithTeacher,
        classes: Tensor,
        temperature: float,
        lambda_even: float,
        lambda_norm: float,
        lambda_smooth: float,
        **optimisation: Any,
    ) -> None:
        """``classes`` are the teacher's columns."""
        super().__init__(net, **optimisation)
        self.temperature = temperature
        self.lambda_even, self.lambda_norm, self.lambda_smooth = lambda_even, lambda_norm, lambda_smooth
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("std", net.teacher.net.small.std.view(3, 1, 1), persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """CE(f(x) / tau, argmax f(x)) + w_ie IE + w_bn L_BN + w_noise L_smooth for noise (B, noise_dim)."""
        dream = self.net(batch.images)
        logits = dream.logits[:, self.classes]
        return {
            "certainty": cross_entropy(logits / self.temperature, logits.argmax(1)),
            "evenness": self.lambda_even * unevenness(logits),
            "norm": self.lambda_norm * norm_divergence(dream.statistics),
            "smoothness": self.lambda_smooth * roughness(dream.images / self.std),
        }


# Local objectives that replay synthetic images of old classes: TARGET's and MFCL's.


class SyntheticDistillationModule(ClassificationModule):
    """TARGET: new classes from real images, the old net's answers about old ones from synthetic images."""

    def __init__(
        self,
        net: SmallClassifier,
        previous: SmallClassifier,
        synthetic: Tensor,
        old_classes: Tensor,
        num_batches: int,
        alpha: float,
        temperature: float,
        classes: Tensor | None = None,
        **optimisation: Any,
    ) -> None:
        """``synthetic`` (N, 3, h, w) uint8 is gone through once in ``num_batches`` steps, in a new order each time."""
        super().__init__(net, classes, **optimisation)
        self.previous, self.alpha, self.temperature = Frozen(previous), alpha, temperature
        self.num_batches = max(1, min(num_batches, len(synthetic) // 2))
        self.waiting: list[Tensor] = []
        self.register_buffer("synthetic", synthetic, persistent=False)
        self.register_buffer("old_classes", old_classes, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """CE on real images + alpha KD on synthetic ones: its gradient is that of the paper's term, without T^2."""
        terms, images = super().loss(batch), self._draw()
        answers = self.net(images).head_logits[:, self.old_classes]
        kept = knowledge_distillation(answers, self.previous(images).head_logits[:, self.old_classes], self.temperature)
        return {**terms, "distillation": self.alpha / self.temperature**2 * kept}

    def _draw(self) -> Tensor:
        if not self.waiting:
            self.waiting = list(torch.randperm(len(self.synthetic)).tensor_split(self.num_batches))
        return self.synthetic[self.waiting.pop().to(self.synthetic.device)]


class MimickingModule(ClassificationModule):
    """MFCL: body from new classes and the old net's features, head balanced over old and new classes."""

    def __init__(
        self,
        net: SmallClassifier,
        previous: SmallClassifier,
        synthesizer: Synthesizer,
        old_classes: Tensor,
        classes: Tensor,
        replay_size: int,
        lambda_head: float,
        lambda_features: float,
        **optimisation: Any,
    ) -> None:
        """``replay_size`` images of the synthesizer go with every batch of real ones."""
        super().__init__(net, classes, **optimisation)
        self.previous, self.synthesizer, self.replay_size = Frozen(previous), Frozen(synthesizer), replay_size
        self.lambda_head, self.lambda_features = lambda_head, lambda_features
        self.register_buffer("old_classes", old_classes, persistent=False)
        self.register_buffer("known", torch.cat([old_classes, classes]).unique(), persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """L_CE + w_ft L_FT + w_kd L_KD, from one pass of real and synthetic images."""
        noise = torch.randn(self.replay_size, self.synthesizer.net.noise_dim).to(self.old_classes.device)
        parts = (batch.images, self.synthesizer(noise))
        images = torch.cat([fit(part, self.net.small.image_size) for part in parts])
        now, before = self.net(images), self.previous(images)
        made = before.logits[len(batch.labels) :, self.old_classes].argmax(1)
        labels = torch.cat([batch.labels, self.old_classes[made]])
        balanced = cross_entropy(self.net.head(now.features.detach()), labels, self.known)
        moved = F.linear(now.features - before.features, self.previous.net.head.weight[self.old_classes])
        return {
            "cross_entropy": cross_entropy(now.logits[: len(batch.labels)], batch.labels, self.classes),
            "head": self.lambda_head * balanced,
            "features": self.lambda_features * moved.float().square().mean(),
        }


SYNTHESIS = "synthesis."
"""Begins the names of what the server adds to its answer and clients keep."""

CLASSES = SYNTHESIS + "classes"
"""The old classes: what any client had met when the images were made."""


@dataclass(kw_only=True)
class DataFree(FedAvg):
    """FedAvg of CNNs whose server synthesises at the end of every task but the run's last."""

    averages: ClassVar = True
    noise_dim: int = 256
    """Width of the synthesizer's input."""
    synthesis_size: int = 32
    """Pixels of synthetic images; the CNN scales them to its own input."""
    synthesis_channels: Sequence[int] = (128, 128, 64)
    """Feature maps of the synthesizer, doubling in size up to ``synthesis_size``; both papers' for small images."""
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool), init=False, repr=False)
    parcel: Payload = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse sizes that the synthesizer cannot reach, and nets without batch statistics of their own."""
        super().__post_init__()
        start_size(self.synthesis_channels, self.synthesis_size)
        if self.foundation is not None:
            raise ValueError(f"foundation is none of {type(self).__name__}'s: leave it out, it trains a small_model.")

    @abstractmethod
    def synthesise(self, teacher: Net, classes: Tensor) -> Iterator[Stage]:
        """Learn from the global net what it knows of ``classes`` and put what clients need into ``parcel``."""

    def server_stages(self, uploads: list[Upload], progress: Progress) -> Iterator[Stage]:
        """Note new classes, and synthesise where another task follows."""
        if not progress.last:
            return
        met = torch.stack([upload.class_counts for upload in uploads]).sum(0) > 0
        self.seen = met | self.seen if len(self.seen) else met
        if not progress.final:
            teacher = self.build_net(0, StreamShape(len(met)))
            teacher.load_state_dict(self.average(uploads))
            classes = self.seen.nonzero()[:, 0]
            self.parcel = {CLASSES: classes}
            yield from self.synthesise(teacher, classes)

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """The average, and what was synthesised."""
        parcel, self.parcel = self.parcel, {}
        return [{**answer, **parcel} for answer in super().aggregate(uploads, progress)]

    def download(self, client: Client, payload: Payload) -> None:
        """Take over the average and keep the rest."""
        kept = {name: value for name, value in payload.items() if name.startswith(SYNTHESIS)}
        client.memory |= kept
        super().download(client, {name: value for name, value in payload.items() if name not in kept})

    def end_task(self, client: Client) -> None:
        """The global model becomes the teacher."""
        client.snapshot()
