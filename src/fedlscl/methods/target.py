"""TARGET (Zhang et al., ICCV 2023, arXiv 2303.06937): FedAvg with distillation on images that the server synthesises.

The first part, up to `DataFree`, is shared with MFCL: at the end of a task the server trains an image synthesizer
against the global net, without data. Ours: old classes are those of any client so far, and a client's cross-entropy is
over its own classes of the task; a class can be old to others and new to it.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.data.loader import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload
from fedlscl.functional.objectives import cross_entropy, knowledge_distillation
from fedlscl.methods.fedavg import FedAvg
from fedlscl.modules import ClassificationModule, Learner
from fedlscl.nets.net import MEAN, STD, Frozen, Net
from fedlscl.options import Count, NonNegative, Positive, Whole


class Synthesizer(nn.Module):
    """Noise (B, noise_dim) to images (B, 3, size, size) in 0..1: a linear layer, then upsampling with convolutions.

    ``channels`` are those of the feature maps from the smallest, of size / 2^(len - 1) pixels, to the largest: three in
    both papers for small images, and (64,) * 6 in MFCL's at 224 pixels.
    """

    def __init__(
        self, noise_dim: int, channels: Sequence[int], size: int, standardise: bool = False,
        mean: Sequence[float] = MEAN, std: Sequence[float] = STD,
    ) -> None:  # fmt: skip
        """With ``standardise`` the last layers are tanh and a BatchNorm without weights (MFCL), else sigmoid (TARGET).

        Standardised images are turned into pixels in 0..1 with the classifier's ``mean`` and ``std``.
        """
        super().__init__()
        self.noise_dim, self.start, self.standardise = noise_dim, start_size(channels, size), standardise
        self.project = nn.Linear(noise_dim, channels[0] * self.start**2)
        layers: list[nn.Module] = [nn.BatchNorm2d(channels[0])]
        for before, after in pairwise(channels):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1)]
            layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(channels[-1], 3, 3, padding=1))
        last = [nn.Tanh(), nn.BatchNorm2d(3, affine=False)] if standardise else [nn.Sigmoid()]
        self.layers = nn.Sequential(*layers, *last)
        self.mean, self.std = (nn.Buffer(torch.tensor(v).view(3, 1, 1), persistent=False) for v in (mean, std))

    def forward(self, noise: Tensor) -> Tensor:
        """(B, noise_dim) to (B, 3, size, size)."""
        images = self.layers(self.project(noise).unflatten(1, (-1, self.start, self.start)))
        return (images * self.std.to(images) + self.mean.to(images)).clamp(0, 1) if self.standardise else images


def start_size(channels: Sequence[int], size: int) -> int:
    """Pixels of the smallest feature map."""
    factor = 2 ** (len(channels) - 1)
    if not channels or size % factor or size < factor:
        raise ValueError(
            "synthesis_size must be a positive multiple of 2 ** (len(synthesis_channels) - 1), "
            f"got {size} with synthesis_channels {list(channels)}."
        )
    return size // factor


class Statistics(NamedTuple):
    """Statistics (channels,) of a batch at the input of a BatchNorm layer, and the layer's running ones."""

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


class SyntheticBatch(NamedTuple):
    """Images (B, 3, size, size) in 0..1, and the teacher's input, logits (B, num_classes) and statistics by layer."""

    images: Tensor
    teacher_input: Tensor
    logits: Tensor
    statistics: list[Statistics]


class GeneratorWithTeacher(Net):
    """A synthesizer and the frozen classifier of its images; the input is noise instead of stored images.

    With ``batch_size`` the noise is trained, too: as a shift, which starts at zero. With ``padding`` the teacher gets
    the images shifted at random by up to so many pixels, and mirrored half the time.
    """

    def __init__(self, synthesizer: Synthesizer, teacher: Net, batch_size: int = 0, padding: int | None = None) -> None:
        super().__init__()
        self.synthesizer, self.teacher, self.padding = synthesizer, Frozen(teacher), padding
        self.shift = nn.Parameter(torch.zeros(batch_size or 1, synthesizer.noise_dim), requires_grad=batch_size > 0)

    @property
    def head(self) -> nn.Module:
        """The teacher's head."""
        return self.teacher.net.head

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> SyntheticBatch:
        """Noise (B, noise_dim) to images, logits and statistics, with gradient to noise and synthesizer."""
        synthetic = self.synthesizer(images + self.shift)
        teacher_input = synthetic if self.padding is None else jitter(synthetic, self.padding)
        with norm_statistics(self.teacher) as statistics:
            logits = self.teacher.net(teacher_input).logits
        return SyntheticBatch(synthetic, teacher_input, logits, statistics)


@contextmanager
def norm_statistics(net: nn.Module) -> Iterator[list[Statistics]]:
    """A list that collects the statistics at the input of each BatchNorm layer while the net runs."""
    found: list[Statistics] = []

    def collect(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)
        found.append(Statistics(mean, variance, layer.running_mean, layer.running_var))

    with ExitStack() as hooks:
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                hooks.enter_context(layer.register_forward_pre_hook(collect))
        yield found


def jitter(images: Tensor, padding: int) -> Tensor:
    """Every image (B, 3, s, s) shifted by up to ``padding`` pixels, filled with zeros, and mirrored half the time."""
    count, size, device = len(images), images.shape[-1], images.device
    steps = torch.arange(size, device=device)
    rows, columns = (torch.randint(2 * padding + 1, (count, 1), device=device) + steps for _ in range(2))
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    shifted = padded.gather(2, rows[:, None, :, None].expand(-1, 3, -1, padded.shape[3]))
    return shifted.gather(3, columns[:, None, None, :].expand(-1, 3, size, -1))


SYNTHESIS = "synthesis."
"""Prefix in payloads and in a client's memory of what the server synthesised."""
CLASSES = SYNTHESIS + "classes"
"""The old classes: those of any client when the images were synthesised."""


@dataclass(kw_only=True)
class DataFree(FedAvg):
    """FedAvg of CNNs whose server synthesises at the end of every task but the run's last."""

    supports_foundation: ClassVar = False
    averages: ClassVar = True
    noise_dim: Count = 256
    """Width of the synthesizer's input."""
    synthesis_size: Count = 32
    """Pixels of synthetic images; the CNN scales them to its own input."""
    synthesis_channels: Sequence[Count] = (128, 128, 64)
    """Feature maps of the synthesizer, doubling in size up to ``synthesis_size``; both papers' for small images."""
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool), init=False, repr=False)
    """(num_classes,): classes of any client so far."""
    broadcast: Payload = field(default_factory=dict, init=False, repr=False)
    """Tensors for the next download beside the average."""

    def __post_init__(self) -> None:
        """Also refuse sizes that the synthesizer cannot reach."""
        super().__post_init__()
        start_size(self.synthesis_channels, self.synthesis_size)

    @abstractmethod
    def replay(self, client: Client) -> Learner:
        """Objective of a client with ``previous`` that has what the server synthesised."""

    @override
    def objective(self, client: Client) -> Learner:
        # Cross-entropy in the first task, and of a client that missed the synthesised download.
        has_replay = client.previous is not None and CLASSES in client.memory
        return self.replay(client) if has_replay else super().objective(client)

    @abstractmethod
    def synthesise(self, teacher: Net, classes: Tensor) -> Iterator[Stage]:
        """Train a synthesizer of ``classes`` against the global net, and add what clients need to ``broadcast``."""

    def server_stages(self, uploads: list[Upload], progress: Progress) -> Iterator[Stage]:
        """In a task's last round, record its classes; synthesise if another task follows."""
        if not progress.last:
            return
        current = torch.stack([upload.class_counts for upload in uploads]).sum(0) > 0
        self.seen = current | self.seen if len(self.seen) else current
        if not progress.final:
            teacher = self.build_net(0, StreamShape(len(current)))
            teacher.load_state_dict(self.average(uploads))
            classes = self.seen.nonzero()[:, 0]
            self.broadcast = {CLASSES: classes}
            yield from self.synthesise(teacher, classes)

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """The average, and the result of the synthesis."""
        broadcast, self.broadcast = self.broadcast, {}
        return [{**average, **broadcast} for average in super().aggregate(uploads, progress)]

    def download(self, client: Client, payload: Payload) -> None:
        """Load the average and keep the rest."""
        synthesis = {name: value for name, value in payload.items() if name.startswith(SYNTHESIS)}
        client.memory |= synthesis
        super().download(client, {name: value for name, value in payload.items() if name not in synthesis})

    def end_task(self, client: Client) -> None:
        """The global model becomes the teacher."""
        client.snapshot()


# TARGET itself. Its synthesis is Fast-DFKD's: a copy of the synthesizer and noise are optimised for each batch of
# images, and the copy's gradients update the synthesizer (FOMAML).

IMAGES = SYNTHESIS + "images"
"""The synthetic set, (N, 3, size, size) uint8."""
PADDING = 4
"""Maximum shift in pixels of the images that the teacher gets."""
BETAS = (0.5, 0.999)
"""Of the synthesizer's Adam."""


class InversionModule(Learner):
    """Train noise and a copy of the synthesizer towards images of given classes on which teacher and student disagree.

    ``gradients`` are the copy's, summed over the steps, for the synthesizer that remains. ``best`` is the batch of the
    lowest objective so far. ``classes`` are the columns of teacher and student; ``averages`` are over earlier batches.
    """

    def __init__(
        self, net: GeneratorWithTeacher, student: Net, classes: Tensor, averages: Sequence[Statistics],
        options: "TARGET", is_warm: bool,
    ) -> None:  # fmt: skip
        super().__init__(net, options.synthesis_lr, lr_of={"shift": options.noise_lr})
        self.student, self.averages, self.options, self.is_warm = Frozen(student), averages, options, is_warm
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("lowest", torch.tensor(torch.inf), persistent=False)
        self.best: Any = None
        self.gradients: list[Tensor] = []

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Oh CE(f(x), y) + bn L_BN + adv L_adv for noise ``batch.images`` (B, noise_dim)."""
        output = self.net(batch.images)
        statistics = mixed(output.statistics, self.averages)
        terms = {
            "label": self.options.lambda_label * cross_entropy(output.logits, batch.labels, self.classes),
            "norm": self.options.lambda_norm * norm_distance(statistics),
        }
        if weight := self.options.lambda_adversarial * self.is_warm:
            student = self.student.net(output.teacher_input).logits[:, self.classes]
            terms["adversarial"] = -weight * disagreement(output.logits[:, self.classes], student)
        loss, images = torch.stack(list(terms.values())).sum().detach(), output.images.detach()
        self.best = images if self.best is None else torch.where(loss < self.lowest, images, self.best)
        self.lowest = torch.fmin(loss, self.lowest)
        self.latest = [Statistics(*(value.detach() for value in layer)) for layer in statistics]
        return terms

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the copy's gradients to ``gradients``, unless they overflowed, as some do in 16-mixed."""
        gradients = [fast.grad for fast in self.net.synthesizer.parameters()]
        is_finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        finite = [torch.where(is_finite, gradient, 0) for gradient in gradients]
        self.gradients = [a + b for a, b in zip(self.gradients, finite, strict=True)] if self.gradients else finite

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with TARGET's betas."""
        optimizer = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["betas"] = BETAS
        return optimizer


def mixed(statistics: list[Statistics], earlier: Sequence[Statistics], momentum: float = 0.9) -> list[Statistics]:
    """Mean and variance averaged over batches, with ``momentum`` for the earlier ones; a first batch has its own."""
    if not earlier:
        return statistics
    return [
        now._replace(mean=now.mean.lerp(old.mean, momentum), variance=now.variance.lerp(old.variance, momentum))
        for now, old in zip(statistics, earlier, strict=True)
    ]


def norm_distance(statistics: Sequence[Statistics]) -> Tensor:
    """Sum over layers of ``||running var - variance|| + ||running mean - mean||`` (L_BN)."""
    terms = []
    for mean, variance, running_mean, running_variance in statistics:
        terms += [torch.linalg.vector_norm(running_variance - variance), torch.linalg.vector_norm(running_mean - mean)]
    return torch.stack(terms).sum()


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the batch of KL(teacher || student) of logits (B, C), where both predict the same class (L_adv).

    Example:
        >>> disagreement(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(0.)
    """
    target, predicted = teacher.float().log_softmax(1), student.float().log_softmax(1)
    divergence = F.kl_div(predicted, target, reduction="none", log_target=True)
    return (divergence.sum(1) * (teacher.argmax(1) == student.argmax(1))).mean()


class ImitationModule(Learner):
    """Train a student by SGD to predict as the teacher on synthetic images, in the columns ``classes``."""

    def __init__(self, net: Net, teacher: Net, classes: Tensor, temperature: float, lr: float) -> None:
        super().__init__(net.requires_grad_(True), lr=lr)
        self.teacher, self.temperature = Frozen(teacher), temperature
        self.register_buffer("classes", classes, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``T^2 KL(teacher || student)``."""
        student = self.net(batch.images).logits[:, self.classes]
        teacher = self.teacher(batch.images).logits[:, self.classes]
        return {"distillation": knowledge_distillation(student, teacher, self.temperature)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with the momentum and weight decay of TARGET's code."""
        return torch.optim.SGD(self.net.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)


class SyntheticDistillationModule(ClassificationModule):
    """The clients' objective: new classes from real images, the old net's predictions on synthetic images.

    The synthetic images (N, 3, h, w) are iterated once in an epoch of real ones, in a new order each time.
    """

    def __init__(self, client: Client, options: "TARGET") -> None:
        super().__init__(client.net, client.classes, lr=options.lr)
        self.previous, self.options = Frozen(client.previous), options
        self.register_buffer("synthetic", client.memory[IMAGES], persistent=False)
        self.register_buffer("old_classes", client.memory[CLASSES], persistent=False)
        self.num_batches = max(1, min(-(-len(client.train_ids) // options.batch_size), len(self.synthetic) // 2))
        self.waiting: list[Tensor] = []

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """CE on real images + alpha KD on synthetic ones: its gradient is that of the paper's term, without T^2."""
        terms, images = super().loss(batch), self._draw()
        student = self.net(images).logits[:, self.old_classes]
        teacher = self.previous(images).logits[:, self.old_classes]
        kept = knowledge_distillation(student, teacher, self.options.temperature)
        return {**terms, "distillation": self.options.alpha / self.options.temperature**2 * kept}

    def _draw(self) -> Tensor:
        if not self.waiting:
            self.waiting = list(torch.randperm(len(self.synthetic)).tensor_split(self.num_batches))
        return self.synthetic[self.waiting.pop().to(self.synthetic.device, non_blocking=True)]


@dataclass(kw_only=True)
class TARGET(DataFree):
    """FedAvg whose clients distil the old global model on synthetic images, which are downloaded once per task."""

    card: ClassVar = MethodCard(
        "ICCV 2023", "2303.06937", "CNN and head from scratch; the server an image synthesizer and a student",
        "CNN, head",
    )  # fmt: skip
    alpha: NonNegative = 25.0
    """Weight of the distillation on synthetic images."""
    temperature: Positive = 2.0
    """T of that distillation, which carries no factor T^2."""
    synthesis_rounds: Whole = 60
    """Batches of synthetic images (200 for larger images in the released code; the number is ours)."""
    synthesis_batch: Count = 64
    """Images of each (256 in the released code)."""
    synthesis_steps: Whole = 50
    """Steps for each."""
    warmup_rounds: Whole = 20
    """Batches before the student is used (the released CIFAR setting has fewer batches than that)."""
    lambda_label: NonNegative = 0.5
    """Weight of the target classes' cross-entropy."""
    lambda_norm: NonNegative = 10.0
    """Weight of the distance from the BatchNorm statistics."""
    lambda_adversarial: NonNegative = 1.0
    """Weight of the student's disagreement."""
    synthesis_lr: Positive = 2e-3
    """Learning rate of the synthesizer."""
    noise_lr: Positive = 0.01
    """Learning rate of the noise."""
    student_steps: Whole = 100
    """SGD steps of the student after each batch (400 in the released code)."""
    student_lr: Positive = 0.2
    """Its learning rate, which falls to zero along a cosine over the batches."""
    student_temperature: Positive = 20.0
    """T of its distillation, which carries T^2."""

    @override
    def replay(self, client: Client) -> Learner:
        return SyntheticDistillationModule(client, self)

    def synthesise(self, teacher: Net, classes: Tensor) -> Iterator[Stage]:
        """Batches of images one after another, with a new synthesizer and a new student in every task."""
        student = self.build_net(0, StreamShape(len(self.seen)))
        slow = Synthesizer(self.noise_dim, self.synthesis_channels, self.synthesis_size)
        meta = torch.optim.Adam(slow.parameters(), self.synthesis_lr * self.synthesis_steps, BETAS)
        images, averages = [], []
        for number in range(self.synthesis_rounds):
            is_warm = number >= self.warmup_rounds
            fast = GeneratorWithTeacher(deepcopy(slow), teacher, self.synthesis_batch, PADDING)
            module = InversionModule(fast, student, classes, averages, self, is_warm)
            yield Stage("synthesis", module, [self._sample_batch(classes)] * self.synthesis_steps, 1)
            for parameter, gradient in zip(slow.parameters(), module.gradients, strict=True):
                parameter.grad = gradient.to(parameter.device)
            meta.step()
            meta.zero_grad()
            images.append((255 * module.best).round().to("cpu", torch.uint8))
            averages = module.latest
            if is_warm:
                rate = self.student_lr * (1 + math.cos(math.pi * number / self.synthesis_rounds)) / 2
                imitation = ImitationModule(student, teacher, classes, self.student_temperature, rate)
                chosen = torch.randint(len(images) * self.synthesis_batch, (self.student_steps, self.synthesis_batch))
                pixels, unlabelled = torch.cat(images), torch.full((self.synthesis_batch,), -1)
                yield Stage("student", imitation, [Batch(pixels[i], unlabelled, unlabelled) for i in chosen], 1)
        self.broadcast[IMAGES] = torch.cat(images)

    def _sample_batch(self, classes: Tensor) -> Batch:
        labels = classes[torch.randint(len(classes), (self.synthesis_batch,))]
        return Batch(torch.randn(len(labels), self.noise_dim), labels, torch.full_like(labels, -1))
