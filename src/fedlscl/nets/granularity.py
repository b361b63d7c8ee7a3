"""Prompts of two granularities: a shared input prompt and private class-wise prefixes (FedMGP, arXiv 2407.00113)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedlscl.nets.net import Net
from fedlscl.nets.prefix import Prefixes, run_blocks
from fedlscl.nets.prompts import Prompted, PromptedViT, cosine, uniform
from fedlscl.nets.vit import Foundation


class MultiGranularityViT(Net):
    """A coarse prompted ViT (P_g, its keys and h_g) that is shared, and fine prefixes, keys and heads that are not.

    The fine pass keeps the coarse prompt at the input, without gradient. Its own prefix is that of the image's class:
    known in training, else the nearest key to what the coarse pass sees, among the classes met so far.
    """

    foundation: Foundation

    def __init__(
        self, coarse: PromptedViT, num_classes: int, blocks: Sequence[int], length: int, hidden: int, num_tasks: int
    ) -> None:
        """Fine prefixes of ``length`` tokens stand in ``blocks``; each task has a head with ``hidden`` units."""
        super().__init__()
        if not blocks:
            raise ValueError("fine_blocks is empty: name one block or more.")
        self.foundation, self.coarse = coarse.foundation, coarse
        self.fine = Prefixes(self.foundation, blocks, num_classes, length)
        self.fine_keys = uniform(num_classes, self.foundation.width)
        self.fine_heads = nn.ModuleList(_mlp(self.foundation.width, hidden, num_classes) for _ in range(num_tasks))
        self.register_buffer("task_of_class", torch.full((num_classes,), -1))

    @property
    def head(self) -> nn.Module:
        """h_g, the head that is shared."""
        return self.coarse.head

    @property
    def prefix_key(self) -> str:
        """That of the coarse net: the plain ViT's features."""
        return self.coarse.prefix_key

    def frozen_prefix(self, images: Tensor) -> Tensor:
        """Features (B, width) of the plain ViT, the coarse query."""
        return self.coarse.frozen_prefix(images)

    def meet(self, classes: Tensor, task: int) -> None:
        """New classes (C,) belong to the head of ``task``."""
        self.task_of_class[classes] = task

    def forward(self, images: Tensor, prefix: Tensor | None = None, slots: Tensor | None = None) -> Prompted:
        """Classify stored images (B, 3, h, w) with the prefixes of classes ``slots`` (B,), matched where not given.

        The logit of a class comes from the head of its task.
        """
        model, first = self.foundation, min(self.fine.blocks)
        with torch.no_grad():
            shared = run_blocks(model, self.coarse.enter(images, prefix)[0], 0, first, {})
            query = self.coarse.read(run_blocks(model, shared, first, model.depth, {}))
        similarity = cosine(query, self.fine_keys)
        if slots is None:
            slots = similarity.masked_fill(self.task_of_class < 0, -2).argmax(1)
        features = self.coarse.read(run_blocks(model, shared, first, model.depth, self.fine(slots)))
        by_task = torch.stack([head(features) for head in self.fine_heads], 1)  # (B, tasks, num_classes)
        owners = self.task_of_class.clamp(min=0).expand(len(features), 1, -1)
        chosen = slots[:, None]
        return Prompted(features, by_task.gather(1, owners)[:, 0], similarity.gather(1, chosen)[:, 0], chosen)


def _mlp(width: int, hidden: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
