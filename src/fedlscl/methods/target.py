"""TARGET (Zhang et al., ICCV 2023, arXiv 2303.06937): FedAvg with distillation on images that the server makes.

The synthesis is Fast-DFKD's: a copy of the synthesizer and noise are optimised for each batch of images, and the
copy's gradients move the synthesizer (FOMAML). Ours: old classes are those that any client has met, and a client's
cross-entropy is over its own classes of the task; a class can be old to others and new to it.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlscl.data import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Stage, StreamShape
from fedlscl.methods.data_free import (
    BETAS,
    CLASSES,
    SYNTHESIS,
    DataFree,
    GeneratorWithTeacher,
    ImitationModule,
    InversionModule,
    Synthesizer,
    SyntheticDistillationModule,
)
from fedlscl.modules.learner import ClassificationModule
from fedlscl.nets.net import Net

IMAGES = SYNTHESIS + "images"
"""The synthetic set, (N, 3, size, size) uint8."""

PADDING = 4
"""Pixels by which the teacher sees synthetic images shifted."""


@dataclass(kw_only=True)
class TARGET(DataFree):
    """FedAvg whose clients keep the old global model's answers on a synthetic set that comes down once per task."""

    card: ClassVar = MethodCard(
        "ICCV 2023",
        "2303.06937",
        trains="CNN and head from scratch; the server an image synthesizer and a student",
        uploads="CNN, head",
    )

    alpha: float = 25.0
    """Weight of the distillation on synthetic images."""
    temperature: float = 2.0
    """T of that distillation, which carries no factor T^2."""
    synthesis_rounds: int = 60
    """Batches of synthetic images (200 for larger images in the released code; the number is ours)."""
    synthesis_batch: int = 64
    """Images of each (256 in the released code)."""
    synthesis_steps: int = 50
    """Steps for each."""
    warmup_rounds: int = 20
    """Batches before the student takes part (the released CIFAR setting never gets that far)."""
    lambda_label: float = 0.5
    """Weight of the target classes' cross-entropy."""
    lambda_norm: float = 10.0
    """Weight of the distance from the BatchNorm statistics."""
    lambda_adversarial: float = 1.0
    """Weight of the student's disagreement."""
    synthesis_lr: float = 2e-3
    """Learning rate of the synthesizer."""
    noise_lr: float = 0.01
    """Learning rate of the noise."""
    student_steps: int = 100
    """SGD steps of the student after each batch (400 in the released code)."""
    student_lr: float = 0.2
    """Its learning rate, which falls to zero along a cosine over the batches."""
    student_temperature: float = 20.0
    """T of its distillation, which carries T^2."""

    def stages(self, client: Client) -> Iterator[Stage]:
        """Plain training until there are synthetic images; who missed the round that brought them has none."""
        loader = client.loader(client.train_ids, self.batch_size)
        if client.previous is None or CLASSES not in client.memory:
            module = ClassificationModule(client.net, client.classes, lr=self.lr)
        else:
            module = SyntheticDistillationModule(
                client.net,
                client.previous,
                client.memory[IMAGES],
                client.memory[CLASSES],
                -(-len(client.train_ids) // self.batch_size),
                self.alpha,
                self.temperature,
                client.classes,
                lr=self.lr,
            )
        yield Stage("train", module, loader, self.local_epochs)

    def synthesise(self, teacher: Net, classes: Tensor) -> Iterator[Stage]:
        """Batch after batch of images; a new synthesizer and a new student in every task."""
        student = self.build_net(0, StreamShape(len(self.seen)))
        slow = Synthesizer(self.noise_dim, self.synthesis_channels, self.synthesis_size)
        meta = torch.optim.Adam(slow.parameters(), self.synthesis_lr * self.synthesis_steps, BETAS)
        images, averages = [], []
        for number in range(self.synthesis_rounds):
            is_warm = number >= self.warmup_rounds
            module = InversionModule(
                GeneratorWithTeacher(deepcopy(slow), teacher, self.synthesis_batch, PADDING),
                student,
                slow,
                classes,
                averages,
                self.lambda_label,
                self.lambda_norm,
                self.lambda_adversarial * is_warm,
                self.noise_lr,
                lr=self.synthesis_lr,
            )
            yield Stage("synthesis", module, [self._wish(classes)] * self.synthesis_steps, 1)
            meta.step()
            meta.zero_grad()
            assert module.best is not None
            images.append((255 * module.best).round().to("cpu", torch.uint8))
            averages = module.latest
            if is_warm:
                rate = self.student_lr * (1 + math.cos(math.pi * number / self.synthesis_rounds)) / 2
                imitation = ImitationModule(student, teacher, classes, self.student_temperature, rate)
                yield Stage("student", imitation, self._draws(torch.cat(images)), 1)
        self.parcel[IMAGES] = torch.cat(images)

    def _wish(self, classes: Tensor) -> Batch:
        """Noise, and a class for each image, all of them equally likely."""
        labels = classes[torch.randint(len(classes), (self.synthesis_batch,))]
        return Batch(torch.randn(len(labels), self.noise_dim), labels, torch.full_like(labels, -1))

    def _draws(self, images: Tensor) -> list[Batch]:
        nothing = torch.full((self.synthesis_batch,), -1)
        chosen = torch.randint(len(images), (self.student_steps, self.synthesis_batch))
        return [Batch(images[rows], nothing, nothing) for rows in chosen]
