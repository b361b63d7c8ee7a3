"""Prompts and prefixes for a frozen ViT."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl.nets.heads import FoundationClassifier, LinearHead
from fedlscl.nets.net import prepare
from fedlscl.nets.vit import Foundation, FoundationConfig, is_plain, run_block

# Input-level prompts for the frozen ViT, chosen from a pool by the image (L2P, CVPR 2022, arXiv 2112.08654).


class Prompted(NamedTuple):
    """Output of a net whose prompts are found by keys."""

    features: Tensor
    """What the head reads, (B, width)."""
    logits: Tensor
    """(B, num_classes)."""
    match: Tensor
    """Cosine between each image's query and the keys of its prompts, summed over these, (B,): the keys' gradient."""
    chosen: Tensor
    """The prompts of each image, (B, top), ascending."""

    @property
    def head_logits(self) -> Tensor:
        """The trained head is the only one."""
        return self.logits


class PromptPool(nn.Module):
    """Prompts P (size, length, width) with keys k (size, width); both start uniform in (-1, 1), as released."""

    def __init__(self, size: int, length: int, width: int, top: int, vote: bool = True) -> None:
        super().__init__()
        if not 1 <= top <= size:
            raise ValueError(f"top {top} prompts of a pool of {size}: choose 1 to {size}.")
        self.top, self.vote = top, vote
        self.prompts = uniform(size, length, width)
        self.keys = uniform(size, width)

    def choose(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts (B, top) whose keys are nearest to each query (B, width), and the sums (B,) of their cosines.

        With ``vote`` a training batch agrees on one choice. At test time an image never depends on its neighbours.
        """
        similarity = cosine(query, self.keys)
        chosen = similarity.argsort(dim=1, descending=True, stable=True)[:, : self.top]
        if self.vote and self.training:
            chosen = majority(chosen, len(self.keys))
        chosen = chosen.sort(1).values
        return chosen, similarity.gather(1, chosen).sum(1)


class PromptedViT(FoundationClassifier):
    """L2P: prompts join the image's tokens at the first block, and the head reads the mean of their outputs.

    The query that chooses is the plain ViT's feature, a constant of the image: it is the cached prefix, the same one
    that a FoundationClassifier has. Embedded tokens are not cached: 200 times the memory for 2 % of the work.
    """

    def __init__(self, config: FoundationConfig, num_classes: int, pool: PromptPool, hidden: int = 0) -> None:
        """``hidden`` units stand between features and head where not 0."""
        super().__init__(config, num_classes)
        self.pool = pool
        self.hidden = nn.Identity()
        if hidden:
            self.hidden = nn.Sequential(nn.Linear(self.foundation.width, hidden), nn.ReLU())
            self.head = LinearHead(hidden, num_classes)

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Prompted:
        """Classify stored images (B, 3, h, w)."""
        x, match, chosen = self.enter(images, prefix)
        for block in self.foundation.vit.blocks:
            x = run_block(block, x)
        features = self.read(x)
        return Prompted(features, self.head(self.hidden(features)), match, chosen)

    def enter(self, images: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N + prompts, width) of images with their prompts, and what ``PromptPool.choose`` said."""
        query = self.frozen_prefix(images) if prefix is None else prefix
        chosen, match = self.pool.choose(query)
        prompts = self.pool.prompts[chosen].flatten(1, 2)
        return insert(self.foundation, embed(self.foundation, images), prompts), match, chosen

    def read(self, x: Tensor) -> Tensor:
        """Mean (B, width) of the prompts' outputs among tokens (B, N + prompts, width) of the last block."""
        vit = self.foundation.vit
        start = vit.num_prefix_tokens
        count = self.pool.top * self.pool.prompts.shape[1]
        return vit.fc_norm(vit.norm(x[:, start : start + count]).mean(1))


def uniform(*shape: int) -> nn.Parameter:
    """A parameter drawn from U(-1, 1)."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1))


def cosine(query: Tensor, keys: Tensor) -> Tensor:
    """Cosines (B, M) of queries (B, width) and keys (M, width), in float32 under any autocast.

    Example:
        >>> cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([[1., 0.]])
    """
    with torch.autocast(query.device.type, enabled=False):
        return F.linear(F.normalize(query.float()), F.normalize(keys.float()))


def majority(chosen: Tensor, size: int) -> Tensor:
    """The most frequent ids of (B, top) as everybody's choice, (B, top); ties go to the lowest id.

    Example:
        >>> majority(torch.tensor([[0, 3], [3, 2]]), 4)
        tensor([[3, 0],
                [3, 0]])
    """
    votes = F.one_hot(chosen, size).sum((0, 1))
    return votes.argsort(dim=0, descending=True, stable=True)[: chosen.shape[1]].expand_as(chosen)


def embed(model: Foundation, images: Tensor) -> Tensor:
    """Tokens (B, N, width) that enter the first block, from stored images (B, 3, h, w)."""
    model = model.to(images.device)
    return model.tokens(prepare(images, model.image_size, model.mean, model.std), 0)


def insert(model: Foundation, tokens: Tensor, prompts: Tensor) -> Tensor:
    """Put prompts (B, P, width) between the class token and the patches of (B, N, width), all at its position."""
    vit = model.vit
    if vit.cls_token is not None and vit.pos_embed is not None and not vit.no_embed_class:
        prompts = prompts + vit.pos_embed[:, :1]
    start = vit.num_prefix_tokens
    return torch.cat([tokens[:, :start], vit.norm_pre(prompts), tokens[:, start:]], 1)


# Prefix tuning of the frozen ViT, one prefix for each image (DualPrompt, ECCV 2022, arXiv 2204.04799).


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
