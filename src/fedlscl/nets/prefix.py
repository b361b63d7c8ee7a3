"""Prefix tuning of the frozen ViT, one prefix for each image (DualPrompt, ECCV 2022, arXiv 2204.04799)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedlscl.nets.blocks import is_plain, run_block
from fedlscl.nets.classifier import FoundationClassifier
from fedlscl.nets.prompts import Prompted, cosine, embed, uniform
from fedlscl.nets.vit import Foundation, FoundationConfig


class Prefixes(nn.Module):
    """One prefix for each of some blocks and slots, (blocks, 2, slots, length, width): keys, then values; U(-1, 1)."""

    def __init__(self, model: Foundation, blocks: Sequence[int], slots: int, length: int) -> None:
        super().__init__()
        for block in blocks:
            check_plain(model, block)
        self.blocks = tuple(blocks)
        self.prompts = uniform(len(self.blocks), 2, slots, length, model.width)

    def forward(self, slots: Tensor) -> dict[int, Tensor]:
        """The prefix (2, B, length, width) that each block gives to images with these slots (B,)."""
        # Index each block alone: one index over all blocks and a reshape would mix keys and values with the batch.
        return {block: prompts[:, slots] for block, prompts in zip(self.blocks, self.prompts, strict=True)}


class PrefixedViT(FoundationClassifier):
    """DualPrompt: a general prefix in early blocks, an expert one for each slot in later blocks, CLS to the head.

    Queries and their cache are those of `PromptedViT`.
    """

    def __init__(
        self, config: FoundationConfig, num_classes: int, general: Sequence[int], expert: Sequence[int],
        general_length: int, expert_length: int, slots: int,
    ) -> None:  # fmt: skip
        """``general`` and ``expert`` are blocks, lengths are in tokens."""
        super().__init__(config, num_classes)
        if both := sorted(set(general) & set(expert)):
            raise ValueError(f"block {both[0]} has a general and an expert prefix: give each block one.")
        self.general = Prefixes(self.foundation, general, 1, general_length)
        self.expert = Prefixes(self.foundation, expert, slots, expert_length)
        self.keys = uniform(slots, self.foundation.width)

    def forward(self, images: Tensor, prefix: Tensor | None = None, slots: Tensor | None = None) -> Prompted:
        """Classify stored images (B, 3, h, w) with the experts ``slots`` (B,), by nearest key where not given."""
        similarity = cosine(self.frozen_prefix(images) if prefix is None else prefix, self.keys)
        slots = similarity.argmax(1) if slots is None else slots
        prefixes = self.general(torch.zeros_like(slots)) | self.expert(slots)
        last = max(prefixes, default=-1) + 1
        x = run_blocks(self.foundation, embed(self.foundation, images), 0, last, prefixes)
        if last == self.foundation.depth:
            x = self.foundation.vit.forward_head(self.foundation.vit.norm(x))
        features = self.foundation.features(x, last)
        chosen = slots[:, None]
        return Prompted(features, self.head(features), similarity.gather(1, chosen)[:, 0], chosen)


def run_blocks(model: Foundation, x: Tensor, start: int, stop: int, prefixes: Mapping[int, Tensor]) -> Tensor:
    """Tokens (B, N, width) after blocks ``start`` to ``stop - 1``, with the prefix of those that have one."""
    for index, block in enumerate(model.vit.blocks[start:stop], start):
        x = run_block(block, x, prefixes.get(index))
    return x


def check_plain(model: Foundation, index: int) -> None:
    """Refuse a block that is beyond the ViT, or that is written in another way than `run_block`."""
    block = model.block(index)
    if not is_plain(block):
        raise ValueError(f"block {index} of {model.config.name} takes no prefix: choose a plain vit_* or deit_* model.")
