"""Fed-LSCL's local objectives: Stage 1, collaborative training (Eq. 3), and Stage 2, continual fine-tuning (Eq. 4)."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fedlscl.data.images import Batch
from fedlscl.functional.objectives import consistency, cross_entropy
from fedlscl.modules.learner import LR, ClassificationModule, Learner
from fedlscl.nets.collaborator import Collaborator, CollaboratorConfig
from fedlscl.nets.net import Frozen
from fedlscl.nets.vit import FoundationConfig

GENERATOR_LR = 3e-4
"""Learning rate of Phi, the part of the generator that depends on the image (ours; the paper has one rate for all)."""

BIAS_LR = 1e-2
"""Learning rate of b, the generator's part that all images share (ours)."""

HEAD_LR = 2e-4
"""Learning rate of the head (ours): small, since rows are imprinted, and rows of few samples overfit."""

CONSISTENCY = 0.01
"""Weight of both consistency terms (not in the paper): 1 and more slow down an adapter that still improves."""


class CollaborativeModule(ClassificationModule):
    """Minimise the cross-entropy of H(Theta + phi(theta(x))) over the CNN, the generator and the head.

    Example::

        net = Collaborator(CollaboratorConfig(small_model="resnet18"), num_classes=10)
        lightning.Trainer(max_epochs=5).fit(CollaborativeModule(net), datamodule=my_data)
    """

    def __init__(
        self,
        net: Collaborator | Mapping[str, Any],
        classes: Tensor | None = None,
        counts: Tensor | None = None,
        lr: float = LR,
        generator_lr: float = GENERATOR_LR,
        bias_lr: float = BIAS_LR,
        head_lr: float = HEAD_LR,
        freeze_norm: bool = False,
    ) -> None:
        """``net`` is a collaborator, or its description in a checkpoint."""
        net = as_collaborator(net)
        parts = part_rates(generator_lr, bias_lr, head_lr)
        super().__init__(net, classes, counts, lr=lr, lr_of=parts, freeze_norm=freeze_norm)
        rates = {"lr": lr, "generator_lr": generator_lr, "bias_lr": bias_lr, "head_lr": head_lr}
        self.save_hyperparameters({"net": describe(net), **rates, "freeze_norm": freeze_norm})


class ContinualFineTuningModule(Learner):
    """Cross-entropy on replayed samples, lambda_E ||E - E'||^2 and lambda_W ||W - W'||^2 (Eq. 4).

    E' and W' are of the frozen predecessor (theta^{n-1}, phi^{n-1}). Samples of classes outside ``old_classes`` enter
    the cross-entropy only (ours: the paper replays the buffer alone, where all samples are old).
    """

    def __init__(
        self,
        net: Collaborator | Mapping[str, Any],
        previous: Collaborator | Mapping[str, Any],
        classes: Tensor | None = None,
        old_classes: Tensor | None = None,
        counts: Tensor | None = None,
        lambda_features: float = CONSISTENCY,
        lambda_lora: float = CONSISTENCY,
        consistent_bias: bool = True,
        lr: float = LR,
        generator_lr: float = GENERATOR_LR,
        bias_lr: float = BIAS_LR,
        head_lr: float = HEAD_LR,
        freeze_norm: bool = True,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Without ``consistent_bias``, W and W' lack b: lambda_W ||Phi^T E - Phi'^T E'||^2 (ours).

        ``classes`` are the columns of the cross-entropy; None is all, for ``old_classes`` too.

        ``counts`` of samples by class balance the softmax. ``kept`` are ids (n,) of samples and the predecessor's
        features E' of them (n, feature_dim), which need not be computed at every step; all samples of old classes must
        be among them.
        """
        net, previous = as_collaborator(net), as_collaborator(previous)
        parts = part_rates(generator_lr, bias_lr, head_lr)
        super().__init__(net, lr=lr, lr_of=parts, freeze_norm=freeze_norm)
        weights = {"lambda_features": lambda_features, "lambda_lora": lambda_lora, "consistent_bias": consistent_bias}
        rates = {"lr": lr, "generator_lr": generator_lr, "bias_lr": bias_lr, "head_lr": head_lr}
        nets = {"net": describe(net), "previous": describe(previous)}
        self.save_hyperparameters({**nets, **weights, **rates, "freeze_norm": freeze_norm})
        self.previous = Frozen(previous)
        self.lambda_features, self.lambda_lora = lambda_features, lambda_lora
        self.consistent_bias = consistent_bias
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("old_classes", old_classes, persistent=False)
        order = None if kept is None else kept[0].argsort()
        self.register_buffer("kept_ids", None if kept is None else kept[0][order], persistent=False)
        self.register_buffer("kept_features", None if kept is None else kept[1][order], persistent=False)

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        now = self.net(batch.images, batch.prefix)
        old = torch.ones_like(batch.labels) if self.old_classes is None else torch.isin(batch.labels, self.old_classes)
        features, before = self._predecessor(batch)
        lora = now.lora
        if not self.consistent_bias and lora.shape[1]:
            lora, before = lora - self.net.generator.bias, before - self.previous.net.generator.bias
        return {
            "cross_entropy": cross_entropy(now.logits, batch.labels, self.classes, self.counts),
            "features": self.lambda_features * consistency(now.features, features, old),
            "lora": self.lambda_lora * consistency(lora, before, old),
        }

    @torch.no_grad()
    def _predecessor(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """E' and W' of a batch; from kept features, where rows of samples that are not kept mean nothing."""
        net = self.previous.net
        if self.kept_ids is None or not len(self.kept_ids) or batch.augmented:
            return net.generate(batch.images)
        index = torch.searchsorted(self.kept_ids, batch.ids).clamp_max(len(self.kept_ids) - 1)
        features = self.kept_features[index]
        return features, net.generator(features)


def part_rates(generator_lr: float, bias_lr: float, head_lr: float) -> dict[str, float]:
    """Learning rates of a collaborator's parts other than the CNN, as `Learner` takes them."""
    return {"generator": generator_lr, "generator.bias": bias_lr, "head": head_lr}


def describe(net: Collaborator) -> dict[str, Any]:
    """Plain values from which ``as_collaborator`` builds a net of the same shapes."""
    return {"num_classes": net.num_classes, "config": asdict(net.config)}


def as_collaborator(net: Collaborator | Mapping[str, Any]) -> Collaborator:
    """The collaborator itself, or a new one from its description."""
    if isinstance(net, Collaborator):
        return net
    config = dict(net["config"])
    config["foundation"] = FoundationConfig(**config["foundation"])
    return Collaborator(CollaboratorConfig(**config), net["num_classes"])
