"""Objective of prompt methods: classify, and pull the keys of the prompts in use towards the images that use them."""

from typing import Any

from torch import Tensor

from fedlscl.data.batch import Batch
from fedlscl.modules.classification import ClassificationModule
from fedlscl.nets.granularity import MultiGranularityViT
from fedlscl.nets.prefix import PrefixedViT
from fedlscl.nets.prompts import PromptedViT
from fedlscl.objectives import cross_entropy


class PromptingModule(ClassificationModule):
    """Cross-entropy - lambda * mean over the batch of cos(query, key), summed over each image's prompts.

    Keys learn from the second term only; everything else from the first.
    """

    def __init__(
        self,
        net: PromptedViT | PrefixedViT | MultiGranularityViT,
        lambda_pull: float,
        classes: Tensor | None = None,
        slot_of_class: Tensor | None = None,
        **optimisation: Any,
    ) -> None:
        """``slot_of_class`` (num_classes,) is the prompt that each class trains; the net chooses where not given."""
        super().__init__(net, classes, **optimisation)
        self.lambda_pull = lambda_pull
        self.register_buffer("slot_of_class", slot_of_class, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the task's classes, and the pull."""
        slots = () if self.slot_of_class is None else (self.slot_of_class[batch.labels],)
        output = self.net(batch.images, batch.prefix, *slots)
        return {
            "cross_entropy": cross_entropy(output.logits, batch.labels, self.classes),
            "pull": -self.lambda_pull * output.match.mean(),
        }
