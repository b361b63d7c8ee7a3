"""Objectives over any net: cross-entropy alone, and with the terms of FedProx, EWC and LwF."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fedlscl.data.batch import Batch
from fedlscl.modules.learner import Learner
from fedlscl.nets.net import Frozen, Net
from fedlscl.objectives import consolidation, cross_entropy, distillation, proximal


class ClassificationModule(Learner):
    """Cross-entropy over the columns ``classes`` (all where not given)."""

    classes: Tensor | None
    counts: Tensor | None

    def __init__(
        self, net: Net, classes: Tensor | None = None, counts: Tensor | None = None, **optimisation: Any
    ) -> None:
        """``counts`` of samples by class balance the softmax; ``optimisation`` is Learner's lr, lr_of and so on."""
        super().__init__(net, **optimisation)
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("counts", counts, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy."""
        logits = self.net(batch.images, batch.prefix).logits
        return {"cross_entropy": cross_entropy(logits, batch.labels, self.classes, self.counts)}


class ProximalModule(ClassificationModule):
    """FedProx's local objective: a quadratic pull of strength ``mu`` towards the weights it starts from."""

    def __init__(self, net: Net, mu: float, classes: Tensor | None = None, **optimisation: Any) -> None:
        """The anchor w_g is a copy of the net's trainable weights as they are now."""
        super().__init__(net, classes, **optimisation)
        self.mu = mu
        self.anchor = nn.ParameterList(p.detach().clone() for p in trainable(net).values()).requires_grad_(False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and ``mu / 2 ||w - w_g||^2``."""
        pull = self.mu * proximal(trainable(self.net).values(), self.anchor)
        return {**super().loss(batch), "proximal": pull}


class ConsolidationModule(ClassificationModule):
    """EWC: moving a weight costs as much as its Fisher information says (Kirkpatrick et al., arXiv 1612.00796)."""

    def __init__(
        self,
        net: Net,
        anchor: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor],
        strength: float,
        classes: Tensor | None = None,
        **optimisation: Any,
    ) -> None:
        """``anchor`` and ``fisher`` are by parameter name; parameters without an entry move freely."""
        super().__init__(net, classes, **optimisation)
        self.strength, self.names = strength, sorted(fisher)
        self.anchor = nn.ParameterList(anchor[name].detach() for name in self.names).requires_grad_(False)
        self.fisher = nn.ParameterList(fisher[name].detach() for name in self.names).requires_grad_(False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and ``strength / 2 sum F (w - w*)^2``."""
        weights = trainable(self.net)
        penalty = consolidation([weights[name] for name in self.names], self.anchor, self.fisher)
        return {**super().loss(batch), "consolidation": self.strength * penalty}


class DistillationModule(ClassificationModule):
    """LwF: the previous net's answers about old classes are kept on the new images (arXiv 1606.09282)."""

    def __init__(
        self,
        net: Net,
        previous: Net,
        old_classes: Tensor,
        alpha: float,
        temperature: float,
        classes: Tensor | None = None,
        **optimisation: Any,
    ) -> None:
        """``old_classes`` are the logit columns that are distilled, with weight ``alpha``."""
        super().__init__(net, classes, **optimisation)
        self.previous, self.alpha, self.temperature = Frozen(previous), alpha, temperature
        self.register_buffer("old_classes", old_classes, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the new classes and distillation over the old ones, from one forward pass."""
        logits = self.net(batch.images, batch.prefix).trained
        answers = self.previous(batch.images, batch.prefix).trained[:, self.old_classes]
        kept = distillation(logits[:, self.old_classes], answers, self.temperature)
        return {
            "cross_entropy": cross_entropy(logits, batch.labels, self.classes, self.counts),
            "distillation": self.alpha * kept,
        }


def trainable(net: nn.Module) -> dict[str, Tensor]:
    """The net's trainable parameters by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}
