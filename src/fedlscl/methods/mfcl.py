"""MFCL (Babakniya et al., NeurIPS 2023, arXiv 2311.07784): FedAvg with a synthesizer that the server trains.

Ours: the balanced cross-entropy is over the client's own classes of the task and the old ones. The synthesizer and the
server's part are in target.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from typing_extensions import override

from fedlscl.data.loader import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Stage
from fedlscl.federated.payload import Payload, outgoing, under
from fedlscl.functional.objectives import cross_entropy
from fedlscl.methods.target import CLASSES, SYNTHESIS, DataFree, GeneratorWithTeacher, Statistics, Synthesizer
from fedlscl.modules import ClassificationModule, Learner
from fedlscl.nets.net import Frozen, Net, fit
from fedlscl.options import Count, NonNegative, Positive, Whole

NET = SYNTHESIS + "net."
"""Prefix of the synthesizer's weights in a payload and in a client's memory."""
EPSILON = 1e-8
"""Added to variances before their quotient."""


class SynthesisModule(Learner):
    """Train a synthesizer of images of all classes, predicted with certainty, with the teacher's BatchNorm statistics.

    ``classes`` are the teacher's columns.
    """

    def __init__(self, net: GeneratorWithTeacher, classes: Tensor, options: "MFCL") -> None:
        super().__init__(net, options.synthesis_lr)
        self.options = options
        self.register_buffer("classes", classes, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """CE(f(x) / tau, argmax f(x)) + w_ie IE + w_bn L_BN + w_noise L_smooth for noise (B, noise_dim)."""
        options, output = self.options, self.net(batch.images)
        logits, std = output.logits[:, self.classes], self.net.teacher.net.small.std
        return {
            "certainty": cross_entropy(logits / options.synthesis_temperature, logits.argmax(1)),
            "evenness": options.lambda_even * unevenness(logits),
            "norm": options.lambda_norm * norm_divergence(output.statistics),
            "smoothness": options.lambda_smooth * roughness(output.images / std.view(3, 1, 1)),
        }


def unevenness(logits: Tensor) -> Tensor:
    """``1 + sum p log p / log C`` of the batch's mean softmax p: 0 for uniform classes, 1 for a single class.

    Example:
        >>> unevenness(torch.tensor([[1e4, 0.0], [0.0, 1e4]])).item()
        0.0
    """
    p = logits.float().softmax(1).mean(0)
    return 1 + torch.special.entr(p).sum().neg() / math.log(max(len(p), 2))


def norm_divergence(statistics: Sequence[Statistics]) -> Tensor:
    """Mean over layers and channels of KL(N(running) || N(batch)), the batch-statistics loss."""
    terms = []
    for mean, variance, running_mean, running_variance in statistics:
        v, r = variance + EPSILON, running_variance + EPSILON
        terms.append(((v / r).log() / 2 + (r + (running_mean - mean).square()) / (2 * v) - 0.5).mean())
    return torch.stack(terms).mean()


def roughness(images: Tensor) -> Tensor:
    """Mean squared distance of images (B, C, h, w) from their blur: Gaussian, 5 x 5, sigma 1, reflected."""
    return F.mse_loss(images, gaussian_blur(images, [5, 5], [1.0, 1.0]))


class MimickingModule(ClassificationModule):
    """The clients' objective: body from new classes and the old net's features, head balanced over all classes.

    Images of the synthesizer are added to every batch of real ones.
    """

    def __init__(self, client: Client, synthesizer: Synthesizer, options: "MFCL") -> None:
        super().__init__(client.net, client.classes, lr=options.lr)
        self.previous, self.synthesizer, self.options = Frozen(client.previous), Frozen(synthesizer), options
        self.register_buffer("old_classes", client.memory[CLASSES], persistent=False)
        self.register_buffer("known", torch.cat([self.old_classes, client.classes]).unique(), persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """L_CE + w_ft L_FT + w_kd L_KD, from one forward pass of real and synthetic images."""
        noise = torch.randn(self.options.replay_size, self.synthesizer.net.noise_dim)
        synthetic = self.synthesizer(noise.to(self.old_classes.device, non_blocking=True))
        images = torch.cat([fit(part, self.net.small.image_size) for part in (batch.images, synthetic)])
        now, before = self.net(images), self.previous(images)
        predicted = before.logits[len(batch.labels) :, self.old_classes].argmax(1)
        labels = torch.cat([batch.labels, self.old_classes[predicted]])
        balanced = cross_entropy(self.net.head(now.features.detach()), labels, self.known)
        moved = F.linear(now.features - before.features, self.previous.net.head.weight[self.old_classes])
        return {
            "cross_entropy": cross_entropy(now.logits[: len(batch.labels)], batch.labels, self.classes),
            "head": self.options.lambda_head * balanced,
            "features": self.options.lambda_features * moved.float().square().mean(),
        }


@dataclass(kw_only=True)
class MFCL(DataFree):
    """FedAvg whose clients replay images of a synthesizer, which is trained further and downloaded once per task."""

    card: ClassVar = MethodCard(
        "NeurIPS 2023", "2311.07784", "CNN and head from scratch; the server an image synthesizer", "CNN, head"
    )
    noise_dim: Count = 1000
    """Width of the synthesizer's input."""
    replay_size: Count = 128
    """Synthetic images added to every batch of real ones."""
    lambda_head: NonNegative = 1.0
    """w_ft, of the cross-entropy over old and new classes that trains the head alone."""
    lambda_features: NonNegative = 0.1
    """w_kd, of the features' distance through the old head."""
    synthesis_steps: Whole = 500
    """Steps of the synthesizer per task (pi; 100 in the released code, the number is ours)."""
    synthesis_batch: Count = 128
    """Images per step."""
    synthesis_lr: Positive = 1e-3
    """Learning rate of the synthesizer."""
    synthesis_temperature: Positive = 1000.0
    """tau, the temperature of the teacher's logits in the certainty term."""
    lambda_even: NonNegative = 1.0
    """w_ie, of the classes' unevenness."""
    lambda_norm: NonNegative = 50.0
    """w_bn, of the divergence from the BatchNorm statistics."""
    lambda_smooth: NonNegative = 1e-3
    """w_noise, of the distance from a blurred copy."""
    synthesizer: Payload = field(default_factory=dict, init=False, repr=False)
    """Its weights after the last task."""

    @override
    def replay(self, client: Client) -> Learner:
        return MimickingModule(client, self._build_synthesizer(client.net, under(NET, client.memory)), self)

    def synthesise(self, teacher: Net, classes: Tensor) -> Iterator[Stage]:
        """Train the previous task's synthesizer against the new global net."""
        synthesizer = self._build_synthesizer(teacher, self.synthesizer)
        module = SynthesisModule(GeneratorWithTeacher(synthesizer, teacher), classes, self)
        unlabelled = torch.full((self.synthesis_batch,), -1)
        noise = [torch.randn(self.synthesis_batch, self.noise_dim) for _ in range(self.synthesis_steps)]
        yield Stage("synthesis", module, [Batch(values, unlabelled, unlabelled) for values in noise], 1)
        self.synthesizer = outgoing(synthesizer.state_dict())
        self.broadcast |= {NET + name: value for name, value in self.synthesizer.items()}

    def _build_synthesizer(self, classifier: Net, weights: Payload) -> Synthesizer:
        shape = self.noise_dim, self.synthesis_channels, self.synthesis_size
        net = Synthesizer(*shape, standardise=True, **classifier.small.normalisation)
        if weights:
            net.load_state_dict(weights)
        return net
