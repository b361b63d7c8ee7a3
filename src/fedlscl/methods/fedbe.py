"""FedBE (Huo et al., arXiv 2506.05977): trainable blocks inserted into a frozen ViT, some of them for each client.

Only abstract and introduction were available: new blocks are the only trainable ones, and the server allocates some of
them to each client by its data and capacity, anew in every round. Block expansion is LLaMA Pro's (arXiv 2401.02415);
the allocation rule, the positions of the blocks and all numbers are our reconstruction, not the authors'.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from typing_extensions import override

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.modules import ClassificationModule
from fedlscl.nets.net import LinearHead, Net, Output
from fedlscl.nets.vit import Block, FoundationConfig, FrozenViTNet, foundation, is_plain, run_block
from fedlscl.options import Count, NonNegative, Positive


class ExpandedViT(FrozenViTNet):
    """A frozen ViT whose blocks form groups of even size, each followed by a trainable copy of its last block.

    The copies' output layers begin at zero, weights and biases, so that each is the identity bit for bit.
    ``num_expanded`` is the number of groups, and so of new blocks.
    """

    def __init__(self, config: FoundationConfig, num_classes: int, num_expanded: int) -> None:
        super().__init__(foundation(config))
        self.positions = expansion_positions(self.foundation.depth, num_expanded)
        self.expanded = nn.ModuleList([identity_copy(self.foundation.block(after - 1)) for after in self.positions])
        # Foundation.tokens at the depth gives features, not tokens.
        self.entry = min(self.positions[0], self.foundation.depth - 1)
        self.head = LinearHead(self.foundation.width, num_classes)

    @override
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Output:
        vit, depth = self.foundation.to(images.device).vit, self.foundation.depth
        tokens = self.frozen_prefix(images) if prefix is None else prefix.float()
        new: dict[int, Block] = dict(zip(self.positions, self.expanded, strict=True))
        for index in range(self.entry, depth + 1):
            if index in new:
                tokens = run_block(new[index], tokens)
            if index < depth:
                tokens = run_block(vit.blocks[index], tokens)
        features = vit.forward_head(vit.norm(tokens))
        return Output(features, self.head(features))

    def set_trainable(self, blocks: Collection[int]) -> None:
        """Enable gradients for these of the new blocks only."""
        for number, block in enumerate(self.expanded):
            block.requires_grad_(number in blocks)


def expansion_positions(depth: int, num_expanded: int) -> list[int]:
    """How many of ``depth`` frozen blocks precede each new one.

    Example:
        >>> expansion_positions(12, 4), expansion_positions(5, 2)
        ([3, 6, 9, 12], [2, 5])
    """
    if not 1 <= num_expanded <= depth:
        raise ValueError(f"num_expanded must be between 1 and the ViT's {depth} blocks, got {num_expanded}.")
    return [(number + 1) * depth // num_expanded for number in range(num_expanded)]


@torch.no_grad()
def identity_copy(block: Block) -> Block:
    """A trainable copy of a pre-norm block that adds nothing yet: its two output layers are zero.

    In a post-norm block, which is refused, zeros would not be the identity.
    """
    if not is_plain(block):
        raise ValueError(f"foundation must have plain pre-norm blocks, got {type(block).__name__}: choose another ViT.")
    copy = deepcopy(block).cpu().requires_grad_(True)  # the process's ViT may be on a GPU already
    for parameter in [*copy.attn.proj.parameters(), *copy.mlp.fc2.parameters()]:
        parameter.zero_()
    return copy


def allocate(
    importance: Sequence[Sequence[float]], counts: Sequence[Sequence[int]], capacities: Sequence[int], beta: float
) -> list[list[int]]:
    """Allocate to every client as many distinct blocks as its capacity (our reconstruction).

    Slot by slot, clients of large capacity first, each gets a block that no client has yet, or else the one of highest
    importance - beta KL(labels of the block's clients || labels of all); ties go to the lowest index. ``importance`` is
    of each block to each client, ``counts`` are each client's samples by class.

    Example:
        >>> allocate([[1.0, 1.0], [1.0, 1.0]], [[5, 0], [0, 5]], [1, 1], beta=0.1)
        [[0], [1]]
    """
    blocks = range(len(importance[0]))
    overall = [sum(column) for column in zip(*counts, strict=True)]
    pooled = [[0] * len(overall) for _ in blocks]  # samples by class of each block's clients
    chosen: list[list[int]] = [[] for _ in capacities]

    def rank(client: int, block: int) -> tuple[bool, float, int]:
        is_free = not any(block in others for others in chosen)
        divergence = kl_divergence([a + b for a, b in zip(pooled[block], counts[client], strict=True)], overall)
        return is_free, importance[client][block] - beta * divergence, -block

    for slot in range(max(capacities)):
        for client in sorted(range(len(capacities)), key=lambda i: (-capacities[i], i)):
            if slot < capacities[client]:
                block = max((b for b in blocks if b not in chosen[client]), key=lambda b: rank(client, b))
                chosen[client].append(block)
                pooled[block] = [a + b for a, b in zip(pooled[block], counts[client], strict=True)]
    return [sorted(own) for own in chosen]


def kl_divergence(counts: Sequence[int], reference: Sequence[int]) -> float:
    """KL(p || q) of two histograms, the first within the second; 0 for an empty one, and exactly 0 for equal shares.

    Example:
        >>> kl_divergence([3, 6], [1, 2]), round(kl_divergence([4, 0], [4, 4]), 4)
        (0.0, 0.6931)
    """
    total, whole = sum(counts), sum(reference)
    return math.fsum(
        n / total * math.log((n * whole) / (q * total)) for n, q in zip(counts, reference, strict=True) if n
    )


BLOCKS, CHANGES = "blocks", "changes"
"""In a client's memory: its blocks (capacity,), and the RMS change of each in the last training."""


@dataclass(kw_only=True)
class FedBE(Method):
    """Clients train the expanded blocks that the server allocates to them, and the head."""

    card: ClassVar = MethodCard(
        "reconstruction, 2025", "2506.05977", "expanded blocks that the server allocates, head; frozen ViT",
        "those blocks, head",
    )  # fmt: skip
    averages: ClassVar = True
    batch_size: Count = 16
    """Images per step (ours)."""
    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT."""
    num_expanded: Count = 4
    """New blocks, spread evenly over the depth (ours)."""
    capacities: Sequence[Count] = (2,)
    """Blocks that a client can train; client i has entry i modulo the length (ours)."""
    allocation: Literal["greedy", "random", "all"] = "greedy"
    """By importance and label balance, at random, or all blocks to all clients (all ours)."""
    beta: NonNegative = 0.1
    """Weight of the label divergence against the importance of a block (ours)."""
    block_lr: Positive = 1e-4
    """Learning rate of the blocks (ours); ``lr`` is that of the head."""
    importance: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    """By client, (2, num_expanded): sum and number of the changes reported for each block."""

    @override
    def build_net(self, client: int, stream: StreamShape) -> ExpandedViT:
        if not self.capacities:
            raise ValueError("capacities must be one or more numbers, got none.")
        return ExpandedViT(self.foundation, stream.num_classes, self.num_expanded)

    def stages(self, client: Client) -> Iterator[Stage]:
        """Train the allocated blocks and the head, and record the change of each block."""
        numbers = self._blocks(client)
        client.net.set_trainable(numbers)
        blocks = [client.net.expanded[number] for number in numbers]
        before = [parameters_to_vector(block.parameters()).detach() for block in blocks]
        module = ClassificationModule(client.net, client.classes, lr=self.lr, lr_of={"expanded": self.block_lr})
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)
        moves = [parameters_to_vector(b.parameters()).detach() - old for b, old in zip(blocks, before, strict=True)]
        client.memory[CHANGES] = torch.stack([move.square().mean().sqrt() for move in moves]).cpu()

    def upload(self, client: Client) -> Payload:
        """The trained blocks, their changes, and the head."""
        blocks = self._blocks(client)
        state = _blocks_and_head(client.net.state_dict(), blocks)
        return outgoing({**state, BLOCKS: torch.tensor(blocks), CHANGES: client.memory[CHANGES]})

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        blocks = upload.payload[BLOCKS].tolist()
        if blocks != sorted(set(blocks)) or not set(blocks) <= set(range(self.num_expanded)):
            raise ValueError(f"blocks must be ascending indices below {self.num_expanded}, got {blocks}")
        changes = torch.empty(self._capacity(upload.client), device="meta")
        return {**_blocks_and_head(net.state_dict(), blocks), BLOCKS: changes.long(), CHANGES: changes}

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Average each block over the clients that trained it, and allocate blocks for the next round."""
        merged: Payload = {}
        for part in ("head.", *(f"expanded.{block}." for block in range(self.num_expanded))):
            states = [{n: v for n, v in upload.payload.items() if n.startswith(part)} for upload in uploads]
            parts = [replace(u, payload=s) for u, s in zip(uploads, states, strict=True) if s and u.num_samples]
            merged |= self.average(parts) if parts else {}
        for upload in uploads:
            known = self.importance.get(upload.client, torch.zeros(2, self.num_expanded, dtype=torch.float64)).clone()
            known[0, upload.payload[BLOCKS]] += upload.payload[CHANGES].double()
            known[1, upload.payload[BLOCKS]] += 1
            self.importance[upload.client] = known
        return [{**merged, BLOCKS: torch.tensor(blocks)} for blocks in self._allocate(uploads)]

    @override
    def download(self, client: Client, payload: Payload) -> None:
        client.memory[BLOCKS] = payload[BLOCKS]
        changed = {name: value for name, value in payload.items() if name != BLOCKS}
        client.net.load_state_dict(client.net.state_dict() | changed)

    def _capacity(self, client: int) -> int:
        if self.allocation == "all":
            return self.num_expanded
        return min(self.capacities[client % len(self.capacities)], self.num_expanded)

    def _blocks(self, client: Client) -> list[int]:
        if BLOCKS in client.memory:
            return client.memory[BLOCKS].tolist()
        # Before the first allocation by the server: consecutive blocks, client by client.
        start = sum(self._capacity(earlier) for earlier in range(client.id))
        return sorted((start + slot) % self.num_expanded for slot in range(self._capacity(client.id)))

    def _allocate(self, uploads: list[Upload]) -> list[list[int]]:
        capacities = [self._capacity(upload.client) for upload in uploads]
        if self.allocation == "random":
            return [sorted(torch.randperm(self.num_expanded)[:capacity].tolist()) for capacity in capacities]
        reports = [self.importance[upload.client] for upload in uploads]
        # Optimism: a block that a client has not trained counts 1, far above any reported change.
        importance = [torch.where(times > 0, sums / times.clamp(min=1), 1.0).tolist() for sums, times in reports]
        counts = [upload.class_counts.tolist() for upload in uploads]
        return allocate(importance, counts, capacities, self.beta)


def _blocks_and_head(state: Payload, blocks: Sequence[int]) -> Payload:
    prefixes = ("head.", *(f"expanded.{block}." for block in blocks))
    return {name: value for name, value in state.items() if name.startswith(prefixes)}
