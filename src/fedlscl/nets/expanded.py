"""Block expansion (LLaMA Pro; Wu et al., ACL 2024, arXiv 2401.02415): new ViT blocks between frozen ones."""

from collections.abc import Collection
from copy import deepcopy

import torch
from torch import Tensor, nn

from fedlscl.nets.blocks import Block, is_plain, run_block
from fedlscl.nets.net import Classification, Net, prepare
from fedlscl.nets.vit import Foundation, FoundationConfig, foundation


class ExpandedViT(Net):
    """A frozen ViT whose blocks form groups of even size, each followed by a trainable copy of its last block.

    The copies' output layers begin at zero, weights and biases, so that each is the identity bit for bit.

    Args:
        config: the frozen ViT.
        head: features (B, width) to logits; has ``weight`` with one row per class.
        num_expanded: groups, and so new blocks.
    """

    foundation: Foundation

    def __init__(self, config: FoundationConfig, head: nn.Module, num_expanded: int) -> None:
        super().__init__()
        self.foundation = foundation(config)
        self.places = expansion_places(self.foundation.depth, num_expanded)
        """Each new block stands behind so many frozen ones."""
        self.expanded = nn.ModuleList([identity_copy(self.foundation.block(place - 1)) for place in self.places])
        # Tokens at the depth would be features already.
        self.entry = min(self.places[0], self.foundation.depth - 1)
        self.head = head

    @property
    def prefix_key(self) -> str:
        """The ViT's weights, its input size and the block before which the first new one stands."""
        return f"{self.foundation.fingerprint}/{self.foundation.image_size}/{self.entry}"

    def frozen_prefix(self, images: Tensor) -> Tensor:
        """Tokens (B, N, width) behind the first group."""
        model = self.foundation.to(images.device)
        return model.tokens(prepare(images, model.image_size, model.mean, model.std), self.entry)

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Classification:
        """Classify stored images (B, 3, h, w)."""
        vit, depth = self.foundation.to(images.device).vit, self.foundation.depth
        tokens = self.frozen_prefix(images) if prefix is None else prefix.float()
        new: dict[int, Block] = dict(zip(self.places, self.expanded, strict=True))
        for place in range(self.entry, depth + 1):
            if place in new:
                tokens = run_block(new[place], tokens)
            if place < depth:
                tokens = run_block(vit.blocks[place], tokens)
        features = vit.forward_head(vit.norm(tokens))
        return Classification(features, self.head(features))

    def learn(self, blocks: Collection[int]) -> None:
        """Train these of the new blocks; the others stay as they are."""
        for number, block in enumerate(self.expanded):
            block.requires_grad_(number in blocks)


def expansion_places(depth: int, num_expanded: int) -> list[int]:
    """Behind how many of ``depth`` blocks each new one stands.

    Example:
        >>> expansion_places(12, 4), expansion_places(5, 2)
        ([3, 6, 9, 12], [2, 5])
    """
    if not 1 <= num_expanded <= depth:
        raise ValueError(f"num_expanded {num_expanded} does not fit a ViT of {depth} blocks: choose 1 to {depth}.")
    return [(number + 1) * depth // num_expanded for number in range(num_expanded)]


@torch.no_grad()
def identity_copy(block: Block) -> Block:
    """A trainable copy of a pre-norm block that adds nothing yet: its two output layers are zero.

    Raises:
        ValueError: if the block is no plain timm Block; in a post-norm one zeros would not be the identity.
    """
    if not is_plain(block):
        raise ValueError(
            f"a {type(block).__name__} cannot be expanded: choose a foundation with plain pre-norm blocks."
        )
    copy = deepcopy(block).requires_grad_(True)
    for layer in (copy.attn.proj, copy.mlp.fc2):
        for parameter in layer.parameters():
            parameter.zero_()
    return copy
