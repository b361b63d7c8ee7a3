"""FedBE (Huo et al., arXiv 2506.05977): trainable blocks inserted into a frozen ViT, a part of them for each client.

Only abstract and introduction were at hand: new blocks are the only trainable ones, and the server hands each client
some of them by its data and capacity, anew in every round. Block expansion is LLaMA Pro's (arXiv 2401.02415); the
allocation rule, the blocks' places and all numbers are our reconstruction, not the authors'.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.modules.learner import ClassificationModule
from fedlscl.nets.heads import make_head
from fedlscl.nets.net import Classification, Net
from fedlscl.nets.vit import Block, FoundationConfig, FrozenViTNet, foundation, is_plain, run_block

# Who trains which part of a model: blocks for clients by importance and label balance (FedBE).


def allocate(
    importance: Sequence[Sequence[float]], counts: Sequence[Sequence[int]], capacities: Sequence[int], beta: float
) -> list[list[int]]:
    """Give every client as many distinct blocks as its capacity says (our reconstruction).

    Slot by slot, clients of large capacity first, each takes a block that nobody has, or else the one of highest
    importance - beta KL(labels of the block's clients || labels of all); ties go to the lowest index.

    Args:
        importance: of each block to each client.
        counts: samples by class of each client; whole numbers, so that equal shares diverge by exactly zero.
        capacities: blocks per client, at most as many as there are.
        beta: weight of the divergence.

    Example:
        >>> allocate([[1.0, 1.0], [1.0, 1.0]], [[5, 0], [0, 5]], [1, 1], beta=0.1)
        [[0], [1]]
    """
    blocks = range(len(importance[0]))
    everybody = [sum(column) for column in zip(*counts, strict=True)]
    pooled = [[0] * len(everybody) for _ in blocks]
    chosen: list[list[int]] = [[] for _ in capacities]

    def rank(client: int, block: int) -> tuple[bool, float, int]:
        is_free = not any(block in taken for taken in chosen)
        divergence = kl_divergence([a + b for a, b in zip(pooled[block], counts[client], strict=True)], everybody)
        return is_free, importance[client][block] - beta * divergence, -block

    for slot in range(max(capacities)):
        for client in sorted(range(len(capacities)), key=lambda i: (-capacities[i], i)):
            if slot < capacities[client]:
                block = max((b for b in blocks if b not in chosen[client]), key=lambda b: rank(client, b))
                chosen[client].append(block)
                pooled[block] = [a + b for a, b in zip(pooled[block], counts[client], strict=True)]
    return [sorted(taken) for taken in chosen]


def kl_divergence(counts: Sequence[int], reference: Sequence[int]) -> float:
    """KL(p || q) of two histograms of whole numbers, the first within the second; 0 for an empty one.

    Example:
        >>> kl_divergence([3, 6], [1, 2]), round(kl_divergence([4, 0], [4, 4]), 4)
        (0.0, 0.6931)
    """
    total, whole = sum(counts), sum(reference)
    return math.fsum(
        n / total * math.log((n * whole) / (q * total)) for n, q in zip(counts, reference, strict=True) if n
    )


# Block expansion (LLaMA Pro; Wu et al., ACL 2024, arXiv 2401.02415): new ViT blocks between frozen ones.


class ExpandedViT(FrozenViTNet):
    """A frozen ViT whose blocks form groups of even size, each followed by a trainable copy of its last block.

    The copies' output layers begin at zero, weights and biases, so that each is the identity bit for bit.

    Args:
        config: the frozen ViT.
        head: features (B, width) to logits; has ``weight`` with one row per class.
        num_expanded: groups, and so new blocks.
    """

    def __init__(self, config: FoundationConfig, head: nn.Module, num_expanded: int) -> None:
        super().__init__(foundation(config))
        self.places = expansion_places(self.foundation.depth, num_expanded)
        """Each new block stands behind so many frozen ones."""
        self.expanded = nn.ModuleList([identity_copy(self.foundation.block(place - 1)) for place in self.places])
        # Tokens at the depth would be features already.
        self.entry = min(self.places[0], self.foundation.depth - 1)
        self.head = head

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

    def set_trainable(self, blocks: Collection[int]) -> None:
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


BLOCKS, CHANGES = "blocks", "changes"
"""What a client remembers: its blocks (capacity,), and how far each of them moved in the last training."""


@dataclass(kw_only=True)
class FedBE(Method):
    """Clients train the expanded blocks that the server allocates to them, and the head."""

    card: ClassVar = MethodCard(
        "arXiv 2025",
        "2506.05977",
        trains="expanded blocks that the server allocates, head; frozen ViT",
        uploads="those blocks, head",
    )

    averages: ClassVar = True
    batch_size: int = 16
    """Images per step (ours)."""
    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT."""
    num_expanded: int = 4
    """New blocks, spread evenly over the depth (ours)."""
    capacities: Sequence[int] = (2,)
    """Blocks that a client can train, handed out to the clients in turn (ours)."""
    allocation: Literal["greedy", "random", "all"] = "greedy"
    """Who trains which block: by importance and label balance, by chance, or everybody everything (all ours)."""
    beta: float = 0.1
    """Weight of the label divergence against the importance of a block (ours)."""
    block_lr: float = 1e-4
    """Learning rate of the blocks (ours); ``lr`` is that of the head."""
    importance: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def build_net(self, client: int, stream: StreamShape) -> ExpandedViT:
        """The expanded ViT with a linear head."""
        if not self.capacities or min(self.capacities) < 1:
            raise ValueError(f"capacities {list(self.capacities)} leave clients without a block: give 1 or more each.")
        head = make_head("linear", foundation(self.foundation).width, stream.num_classes)
        return ExpandedViT(self.foundation, head, self.num_expanded)

    def stages(self, client: Client) -> Iterator[Stage]:
        """Train the allocated blocks and the head; note how far each block moved."""
        blocks = self._blocks(client)
        client.net.set_trainable(blocks)
        before = [_flat(client.net.expanded[block]) for block in blocks]
        module = ClassificationModule(client.net, client.classes, lr=self.lr, lr_of={"expanded": self.block_lr})
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)
        moves = [_flat(client.net.expanded[block]) - old for block, old in zip(blocks, before, strict=True)]
        client.memory[CHANGES] = torch.stack([move.square().mean().sqrt() for move in moves]).cpu()

    def upload(self, client: Client) -> Payload:
        """The trained blocks, how far they moved (RMS), and the head."""
        blocks = self._blocks(client)
        kept = ("head.", *(f"expanded.{block}." for block in blocks))
        state = {name: value for name, value in client.net.state_dict().items() if name.startswith(kept)}
        return outgoing({**state, BLOCKS: torch.tensor(blocks), CHANGES: client.memory[CHANGES]})

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """Head and changes of as many blocks as the client can train, and those blocks."""
        chosen = upload.payload[BLOCKS].tolist()
        if sorted({*chosen} & {*range(self.num_expanded)}) != chosen:
            raise ValueError(f"blocks are not some of {self.num_expanded} in order")
        kept = ("head.", *(f"expanded.{block}." for block in chosen))
        shape = {"size": (self._capacity(upload.client),), "device": "meta"}
        choice = {BLOCKS: torch.empty(dtype=torch.int64, **shape), CHANGES: torch.empty(**shape)}
        return {name: value for name, value in net.state_dict().items() if name.startswith(kept)} | choice

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Average each block over those who trained it, and allocate blocks for the next round."""
        answer: Payload = {}
        for part in ("head.", *(f"expanded.{block}." for block in range(self.num_expanded))):
            states = [{n: v for n, v in upload.payload.items() if n.startswith(part)} for upload in uploads]
            trained = [replace(u, payload=s) for u, s in zip(uploads, states, strict=True) if s and u.num_samples]
            answer |= self.average(trained) if trained else {}
        for upload in uploads:
            known = self.importance.get(upload.client, torch.zeros(2, self.num_expanded, dtype=torch.float64)).clone()
            known[0, upload.payload[BLOCKS]] += upload.payload[CHANGES].double()
            known[1, upload.payload[BLOCKS]] += 1
            self.importance[upload.client] = known
        return [{**answer, BLOCKS: torch.tensor(blocks)} for blocks in self._allocate(uploads)]

    def download(self, client: Client, payload: Payload) -> None:
        """Take over the blocks that changed, the head, and the allocation."""
        client.memory[BLOCKS] = payload[BLOCKS]
        changed = {name: value for name, value in payload.items() if name != BLOCKS}
        client.net.load_state_dict({**client.net.state_dict(), **changed})

    def _capacity(self, client: int) -> int:
        if self.allocation == "all":
            return self.num_expanded
        return min(self.capacities[client % len(self.capacities)], self.num_expanded)

    def _blocks(self, client: Client) -> list[int]:
        """What the server allocated; before its first word, blocks in turn over all clients."""
        if BLOCKS in client.memory:
            return client.memory[BLOCKS].tolist()
        start = sum(self._capacity(earlier) for earlier in range(client.id))
        return sorted((start + slot) % self.num_expanded for slot in range(self._capacity(client.id)))

    def _allocate(self, uploads: list[Upload]) -> list[list[int]]:
        capacities = [self._capacity(upload.client) for upload in uploads]
        if self.allocation == "random":
            return [sorted(torch.randperm(self.num_expanded)[:capacity].tolist()) for capacity in capacities]
        reports = [self.importance[upload.client] for upload in uploads]
        # Optimism: a block that a client never trained counts 1, far above any change that is ever reported.
        importance = [torch.where(times > 0, sums / times.clamp(min=1), 1.0).tolist() for sums, times in reports]
        counts = [upload.class_counts.tolist() for upload in uploads]
        return allocate(importance, counts, capacities, self.beta)


def _flat(block: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(block.parameters()).detach()
