"""FedWeIT's local objective (arXiv 2003.03196, Eq. 2)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fedlscl.data.batch import Batch
from fedlscl.modules.classification import ClassificationModule
from fedlscl.nets.decomposed import DecomposedClassifier
from fedlscl.objectives import retention


class DecompositionModule(ClassificationModule):
    """Cross-entropy, weight decay, sparse weights of the task, and a base that stays where earlier tasks need it."""

    net: DecomposedClassifier

    def __init__(
        self,
        net: DecomposedClassifier,
        lambda_sparse: float,
        lambda_mask: float,
        lambda_retain: float,
        decay: float,
        classes: Tensor | None = None,
        **optimisation: Any,
    ) -> None:
        """Weights of ``||A_t||_1``, ``||m_t||_1``, the base's drift, and ``||.||^2 / 2`` of A_t, m_t and a first B."""
        super().__init__(net, classes, **optimisation)
        self.lambda_sparse, self.lambda_mask, self.lambda_retain = lambda_sparse, lambda_mask, lambda_retain
        self.decay = decay

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The terms, in the card's order; there is no drift in the first task."""
        layers, task = self.net.convolutions.values(), self.net.task
        adaptive, masks = [layer.adaptive[task] for layer in layers], [layer.mask[task] for layer in layers]
        decayed = adaptive + masks + ([layer.conv.weight for layer in layers] if task == 0 else [])
        terms = {
            **super().loss(batch),
            "decay": self.decay / 2 * total(value.square() for value in decayed),
            "sparsity": self.lambda_sparse * total(value.abs() for value in adaptive)
            + self.lambda_mask * total(value.abs() for value in masks),
        }
        if task == 0:
            return terms
        drift = [
            retention(layer.conv.weight, layer.anchor, torch.stack([m.sigmoid() for m in layer.mask[:task]]))
            for layer in layers
        ]
        return {**terms, "retention": self.lambda_retain * torch.stack(drift).sum()}


def total(values: Iterable[Tensor]) -> Tensor:
    """Sum over all entries of all tensors."""
    return torch.stack([value.sum() for value in values]).sum()
