"""Prompts for a frozen ViT: at its input (L2P, arXiv 2112.08654) and as prefixes (DualPrompt, arXiv 2204.04799)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl.nets.heads import FoundationClassifier, LinearHead
from fedlscl.nets.net import prepare
from fedlscl.nets.vit import Foundation, FoundationConfig, is_plain, run_block


class Prompted(NamedTuple):
    """Output of a net whose prompts are selected by keys."""

    features: Tensor
    """Input of the head, (B, width)."""
    logits: Tensor
    """(B, num_classes)."""
    match: Tensor
    """Sum (B,) over an image's prompts of the cosine between its query and their keys; it alone trains the keys."""
    chosen: Tensor
    """Indices of each image's prompts, (B, top), ascending."""

    @property
    def head_logits(self) -> Tensor:
        """The logits: there is one head."""
        return self.logits

    @property
    def head_input(self) -> Tensor:
        """The features."""
        return self.features


class PromptPool(nn.Module):
    """Prompts P (size, length, width) with keys k (size, width); both are drawn from U(-1, 1), as released."""

    def __init__(self, size: int, length: int, width: int, top: int, vote: bool = True) -> None:
        super().__init__()
        if not 1 <= top <= size:
            raise ValueError(f"top must be between 1 and the pool's {size} prompts, got {top}.")
        self.top, self.vote = top, vote
        self.prompts = uniform(size, length, width)
        self.keys = uniform(size, width)

    def choose(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (B, top) of the prompts with the keys nearest to queries (B, width), and their summed cosines (B,).

        With ``vote`` all images of a training batch get the same prompts. In evaluation mode each image has its own.
        """
        similarity = cosine(query, self.keys)
        chosen = similarity.argsort(dim=1, descending=True, stable=True)[:, : self.top]
        if self.vote and self.training:
            chosen = majority(chosen, len(self.keys))
        chosen = chosen.sort(1).values
        return chosen, similarity.gather(1, chosen).sum(1)


class PromptedViT(FoundationClassifier):
    """L2P: prompts join the image's tokens at the first block, and the head gets the mean of their outputs.

    The query is the plain ViT's feature, a constant of the image; it is the cached prefix. Embedded tokens are not
    cached: 200 times the memory for 2 % of the computation.
    """

    def __init__(self, config: FoundationConfig, num_classes: int, pool: PromptPool, hidden: int = 0) -> None:
        """``hidden`` units between features and head; none if 0."""
        super().__init__(config, num_classes)
        self.pool = pool
        self.hidden = nn.Identity()
        if hidden:
            self.hidden = nn.Sequential(nn.Linear(self.foundation.width, hidden), nn.ReLU())
            self.head = LinearHead(hidden, num_classes)

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Prompted:
        """Classify stored images (B, 3, h, w)."""
        x, match, chosen = self.embed_with_prompts(images, prefix)
        features = self.prompt_features(run_blocks(self.foundation, x, 0, self.foundation.depth, {}))
        return Prompted(features, self.head(self.hidden(features)), match, chosen)

    def tokens(self, images: Tensor, prefix: Tensor | None = None) -> Tensor:
        """All tokens (B, N + prompts, width) after the last norm."""
        x = self.embed_with_prompts(images, prefix)[0]
        return self.foundation.vit.norm(run_blocks(self.foundation, x, 0, self.foundation.depth, {}))

    def embed_with_prompts(self, images: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N + prompts, width) of images with their prompts, match (B,) and indices (B, top)."""
        query = self.frozen_prefix(images) if prefix is None else prefix
        chosen, match = self.pool.choose(query)
        prompts = self.pool.prompts[chosen].flatten(1, 2)
        return insert_prompts(self.foundation, embed(self.foundation, images), prompts), match, chosen

    def prompt_features(self, x: Tensor) -> Tensor:
        """Mean (B, width) of the prompts' outputs, from tokens (B, N + prompts, width) of the last block."""
        vit = self.foundation.vit
        start = vit.num_prefix_tokens
        count = self.pool.top * self.pool.prompts.shape[1]
        return vit.fc_norm(vit.norm(x[:, start : start + count]).mean(1))


class PrefixedViT(FoundationClassifier):
    """DualPrompt: a general prefix in early blocks, an expert prefix per slot in later blocks, CLS to the head.

    The query and its cache are those of `PromptedViT`.
    """

    def __init__(
        self, config: FoundationConfig, num_classes: int, general: Sequence[int], expert: Sequence[int],
        general_length: int, expert_length: int, slots: int,
    ) -> None:  # fmt: skip
        """``general`` and ``expert`` are block indices, lengths are in tokens."""
        super().__init__(config, num_classes)
        if both := sorted(set(general) & set(expert)):
            raise ValueError(f"general and expert blocks must be disjoint, got {both} in both.")
        self.general = Prefixes(self.foundation, general, 1, general_length)
        self.expert = Prefixes(self.foundation, expert, slots, expert_length)
        self.keys = uniform(slots, self.foundation.width)

    def forward(self, images: Tensor, prefix: Tensor | None = None, slots: Tensor | None = None) -> Prompted:
        """Classify stored images (B, 3, h, w) with the experts ``slots`` (B,), or with those of the nearest keys."""
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


class Prefixes(nn.Module):
    """Prefixes (blocks, 2, slots, length, width) of some blocks, keys then values, drawn from U(-1, 1)."""

    def __init__(self, model: Foundation, blocks: Sequence[int], slots: int, length: int) -> None:
        super().__init__()
        for block in blocks:
            if not is_plain(model.block(block)):
                name = model.config.name
                raise ValueError(f"foundation must be a plain vit_* or deit_* model, got {name} with block {block}.")
        self.blocks = tuple(blocks)
        self.prompts = uniform(len(self.blocks), 2, slots, length, model.width)

    def forward(self, slots: Tensor) -> dict[int, Tensor]:
        """The prefix (2, B, length, width) of images with these slots (B,) in each block."""
        # Index each block alone: one index over all blocks and a reshape would mix keys and values with the batch.
        return {block: prompts[:, slots] for block, prompts in zip(self.blocks, self.prompts, strict=True)}


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
    """The most frequent indices of (B, top), repeated for all rows (B, top); ties go to the lowest index.

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


def insert_prompts(model: Foundation, tokens: Tensor, prompts: Tensor) -> Tensor:
    """Put prompts (B, P, width) between class token and patches of (B, N, width), with the class token's position."""
    vit = model.vit
    if vit.cls_token is not None and vit.pos_embed is not None and not vit.no_embed_class:
        prompts = prompts + vit.pos_embed[:, :1]
    start = vit.num_prefix_tokens
    return torch.cat([tokens[:, :start], vit.norm_pre(prompts), tokens[:, start:]], 1)


def run_blocks(model: Foundation, x: Tensor, start: int, stop: int, prefixes: Mapping[int, Tensor]) -> Tensor:
    """Tokens (B, N, width) after blocks ``start`` to ``stop - 1``, each with its prefix if it has one."""
    for index, block in enumerate(model.vit.blocks[start:stop], start):
        x = run_block(block, x, prefixes.get(index))
    return x
