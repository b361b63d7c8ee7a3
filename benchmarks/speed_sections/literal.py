"""The literal path: what a straightforward implementation of Fed-LSCL computes.

All blocks of the frozen ViT run for every image at every step, as timm writes them: the last block for all tokens,
attention fused. The ViT's weights are frozen; autograd starts at the adapted block, as it does for anybody. LoRA is the
same batched update (deltas of B x D x D are not formed: that would only make the path slower). Images are resized at
every step, the CNN's memory format is torch's default, and Stage 2 runs the predecessor's CNN at every step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from fedlscl.modules import ContinualFineTuningModule
from fedlscl.nets.net import SmallModel, prepare
from fedlscl.nets.vit import Foundation, adapted


@contextmanager
def literal_path() -> Iterator[None]:
    """Everything in the block computes literally; nets must be built in it, and caches be given no budget."""
    with (
        patch.object(Foundation, "features", _features),
        patch.object(SmallModel, "forward", _small),
        patch.object(ContinualFineTuningModule, "_predecessor", _predecessor),
    ):
        yield


def _features(self: Foundation, tokens: Tensor, block: int, updates: Mapping | None = None) -> Tensor:
    if block == self.depth:
        return tokens
    with adapted((self.linear(*place), update) for place, update in (updates or {}).items()):
        x = self.vit.blocks[block:](tokens)
    return self.vit.forward_head(self.vit.norm(x))


def _small(self: SmallModel, images: Tensor) -> Tensor:
    self.to(memory_format=torch.contiguous_format)
    x = self.cnn.forward_features(prepare(images, self.image_size, self.mean, self.std))
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


@torch.no_grad()
def _predecessor(self: ContinualFineTuningModule, batch) -> tuple[Tensor, Tensor]:
    return self.previous.net.generate(batch.images)
