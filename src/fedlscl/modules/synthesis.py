"""Objectives of synthesizers at the server, and of TARGET's student."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fedlscl.data.batch import Batch
from fedlscl.modules.learner import Learner
from fedlscl.nets.net import Frozen, Net
from fedlscl.nets.synthesizer import Dreamer
from fedlscl.objectives import cross_entropy, distillation
from fedlscl.synthesis import Averages, disagreement, norm_distance, norm_divergence, roughness, unevenness, updated

BETAS = (0.5, 0.999)
"""Of TARGET's Adam."""


class InversionModule(Learner):
    """TARGET: noise and a copy of the synthesizer learn images of given classes that a student finds hard.

    Gradients add up in ``slow``, the synthesizer that outlives the batch (FOMAML); ``best`` is the batch of the lowest
    objective so far.
    """

    def __init__(
        self,
        net: Dreamer,
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
            answers = self.student.net(dream.shown).trained[:, self.classes]
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
        answers = self.net(batch.images).trained[:, self.classes]
        wanted = self.teacher(batch.images).trained[:, self.classes]
        return {"distillation": distillation(answers, wanted, self.temperature)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with the momentum and weight decay of TARGET's code."""
        return torch.optim.SGD(self.net.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)


class SynthesisModule(Learner):
    """MFCL: a synthesizer learns images that the teacher is sure about, of all classes, with its own statistics."""

    def __init__(
        self,
        net: Dreamer,
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
