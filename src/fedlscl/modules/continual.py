"""Stage 2 of Fed-LSCL: small-model continual fine-tuning on the buffer (Eq. 4)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedlscl.data.batch import Batch
from fedlscl.modules.collaborative import GENERATOR_LR, HEAD_LR, as_collaborator, describe
from fedlscl.modules.learner import LR, Learner
from fedlscl.nets.collaborator import Collaborator
from fedlscl.nets.net import Frozen
from fedlscl.objectives import consistency, cross_entropy


class ContinualFineTuningModule(Learner):
    """Classify replayed samples while features E and generated weights W of old ones stay where they were.

    The predecessor (theta^{n-1}, phi^{n-1}) is frozen. Samples of classes outside ``old_classes`` take part in the
    cross-entropy only (ours: the paper replays the buffer alone, where all samples are old).
    """

    def __init__(
        self,
        net: Collaborator | Mapping[str, Any],
        previous: Collaborator | Mapping[str, Any],
        classes: Tensor | None = None,
        old_classes: Tensor | None = None,
        counts: Tensor | None = None,
        lambda_features: float = 1.0,
        lambda_lora: float = 1.0,
        lr: float = LR,
        generator_lr: float = GENERATOR_LR,
        head_lr: float = HEAD_LR,
        freeze_norm: bool = True,
    ) -> None:
        """``classes`` are the columns of the cross-entropy; None means all, for ``old_classes`` too.

        ``counts`` of samples by class balance the softmax.
        """
        net, previous = as_collaborator(net), as_collaborator(previous)
        super().__init__(net, lr=lr, lr_of={"generator": generator_lr, "head": head_lr}, freeze_norm=freeze_norm)
        self.save_hyperparameters(
            {
                "net": describe(net),
                "previous": describe(previous),
                "lambda_features": lambda_features,
                "lambda_lora": lambda_lora,
                "lr": lr,
                "generator_lr": generator_lr,
                "head_lr": head_lr,
                "freeze_norm": freeze_norm,
            }
        )
        self.previous = Frozen(previous)
        self.lambda_features, self.lambda_lora = lambda_features, lambda_lora
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("old_classes", old_classes, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, lambda_E ||E - E'||^2 and lambda_W ||W - W'||^2."""
        now = self.net(batch.images, batch.prefix)
        with torch.no_grad():
            features, lora = self.previous.net.generate(batch.images)
        old = torch.ones_like(batch.labels) if self.old_classes is None else torch.isin(batch.labels, self.old_classes)
        return {
            "cross_entropy": cross_entropy(now.logits, batch.labels, self.classes, self.counts),
            "features": self.lambda_features * consistency(now.features, features, old),
            "lora": self.lambda_lora * consistency(now.lora, lora, old),
        }
