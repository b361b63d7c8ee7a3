"""Stage 1 of Fed-LSCL: large-small collaborative training on the current task (Eq. 3)."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from fedlscl.modules.learner import LR, ClassificationModule
from fedlscl.nets.collaborator import Collaborator, CollaboratorConfig
from fedlscl.nets.vit import FoundationConfig

GENERATOR_LR = 3e-4
"""Learning rate of Phi, the part of the generator that depends on the image (ours; the paper has one rate for all)."""

BIAS_LR = 1e-2
"""Learning rate of b, the generator's part that all images share (ours)."""

HEAD_LR = 2e-4
"""Learning rate of the head (ours): small, since rows are imprinted, and rows of few samples overfit."""


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
        parts = {"generator": generator_lr, "generator.bias": bias_lr, "head": head_lr}
        super().__init__(net, classes, counts, lr=lr, lr_of=parts, freeze_norm=freeze_norm)
        rates = {"lr": lr, "generator_lr": generator_lr, "bias_lr": bias_lr, "head_lr": head_lr}
        self.save_hyperparameters({"net": describe(net), **rates, "freeze_norm": freeze_norm})


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
