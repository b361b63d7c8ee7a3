"""Local objective of PILoRA: prototypes by distance, and a LoRA module that keeps out of earlier ones' way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedlscl.data.batch import Batch
from fedlscl.modules.learner import Learner
from fedlscl.nets.lora_vit import LoraViT
from fedlscl.objectives import cross_entropy


class PrototypeModule(Learner):
    """Distance-based cross-entropy and prototype loss, orthogonality to earlier modules and sparsity of this one."""

    def __init__(
        self,
        net: LoraViT,
        task: int,
        classes: Tensor | None = None,
        lambda_prototype: float = 1e-3,
        gamma_orthogonal: float = 0.5,
        lambda_sparse: float = 0.01,
        **optimisation: Any,
    ) -> None:
        """``net`` has a PrototypeHead; ``classes`` are the columns of the cross-entropy, all where not given."""
        super().__init__(net, **optimisation)
        self.task, self.lambda_prototype = task, lambda_prototype
        self.gamma_orthogonal, self.lambda_sparse = gamma_orthogonal, lambda_sparse
        self.register_buffer("classes", classes, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """DCE, lambda_pl mean d_y, gamma_ort sum_{s<t} ||A_s A_t^T||_1, and lambda_1 ||A_t||_1; norms entry-wise."""
        logits = self.net(batch.images, batch.prefix).logits
        own = -self.net.head.temperature * logits.gather(1, batch.labels[:, None]).mean()
        overlaps = [overlap(layer.down[self.task], list(layer.down)[: self.task]) for layer in self.net.lora]
        sizes = [layer.down[self.task].abs().sum() for layer in self.net.lora]
        return {
            "cross_entropy": cross_entropy(logits, batch.labels, self.classes),
            "prototype": self.lambda_prototype * own,
            "orthogonality": self.gamma_orthogonal * torch.stack(overlaps).sum(),
            "sparsity": self.lambda_sparse * torch.stack(sizes).sum(),
        }


def overlap(current: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """sum_s ||A_s A_t^T||_1, entry-wise, of reading factors (rank, in_features); no gradient reaches the earlier ones.

    Example:
        >>> overlap(torch.tensor([[1.0, 0.0]]), [torch.tensor([[0.0, 5.0]]), torch.tensor([[-2.0, 1.0]])])
        tensor(2.)
    """
    if not len(earlier):
        return current.new_zeros(())
    with torch.autocast(current.device.type, enabled=False):
        return (torch.cat([factor.detach() for factor in earlier]) @ current.mT).abs().sum()
