"""Local objectives that replay synthetic images of old classes: TARGET's and MFCL's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.data.batch import Batch
from fedlscl.modules.classification import ClassificationModule
from fedlscl.nets.net import Frozen, fit
from fedlscl.nets.small import SmallClassifier
from fedlscl.nets.synthesizer import Synthesizer
from fedlscl.objectives import cross_entropy, distillation


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
        answers = self.net(images).trained[:, self.old_classes]
        kept = distillation(answers, self.previous(images).trained[:, self.old_classes], self.temperature)
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
