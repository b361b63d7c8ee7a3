"""FedL2P, FedDualP and FedMGP: prompts for a frozen ViT, at its input or as prefixes, averaged as in FedAvg."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.data.loader import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Progress, PublicImages, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.objectives import cross_entropy
from fedlscl.modules import ClassificationModule, Learner
from fedlscl.nets.net import Frozen, LinearHead, Net, Output
from fedlscl.nets.vit import (
    Foundation,
    FoundationClassifier,
    FoundationConfig,
    FrozenViTNet,
    foundation,
    is_plain,
    run_block,
)
from fedlscl.options import Count, NonNegative, Positive, Whole

PrefixOf = Literal["nearest", "another", "label"]
"""Whose prefix an image gets in FedMGP's fine training."""
Fusion = Literal["average", "distill"]
"""How FedMGP's server fuses the coarse parts."""


@dataclass
class Prompted(Output):
    """Output of a net whose prompts are selected by keys: features (B, width), logits (B, num_classes).

    ``match`` (B,) is the sum over an image's prompts of the cosine between its query and their keys; it alone trains
    the keys. ``chosen`` (B, top) are the prompts' indices, ascending.
    """

    match: Tensor
    chosen: Tensor


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

        With ``vote`` all images of a training batch get the same prompts.
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

    @override
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Prompted:
        x, match, chosen = self.embed_with_prompts(images, prefix)
        features = self.prompt_features(run_blocks(self.foundation, x))
        return Prompted(features, self.head(self.hidden(features)), match, chosen)

    def tokens(self, images: Tensor, prefix: Tensor | None = None) -> Tensor:
        """All tokens (B, N + prompts, width) after the last norm."""
        return self.foundation.vit.norm(run_blocks(self.foundation, self.embed_with_prompts(images, prefix)[0]))

    def embed_with_prompts(self, images: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N + prompts, width) of images with their prompts, match (B,) and indices (B, top)."""
        chosen, match = self.pool.choose(self.frozen_prefix(images) if prefix is None else prefix)
        prompts = self.pool.prompts[chosen].flatten(1, 2)
        return insert_prompts(self.foundation, self.frozen_prefix(images, 0), prompts), match, chosen

    def prompt_features(self, x: Tensor) -> Tensor:
        """Mean (B, width) of the prompts' outputs, from tokens (B, N + prompts, width) of the last block."""
        vit, count = self.foundation.vit, self.pool.top * self.pool.prompts.shape[1]
        return vit.fc_norm(vit.norm(x[:, vit.num_prefix_tokens :][:, :count]).mean(1))


class PrefixedViT(FoundationClassifier):
    """DualPrompt: a general prefix in early blocks, an expert prefix per slot in later ones; queries as in L2P."""

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
        x = run_blocks(self.foundation, self.frozen_prefix(images, 0), 0, last, prefixes)
        if last == self.foundation.depth:
            x = self.foundation.vit.forward_head(self.foundation.vit.norm(x))
        features, chosen = self.foundation.features(x, last), slots[:, None]
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
    """Cosines (B, M) of queries (B, width) and keys (M, width), in float32 under any autocast."""
    with torch.autocast(query.device.type, enabled=False):
        return F.linear(F.normalize(query.float()), F.normalize(keys.float()))


def majority(chosen: Tensor, size: int) -> Tensor:
    """The most frequent indices of (B, top), repeated for all rows (B, top); ties go to the lowest index.

    Example:
        >>> majority(torch.tensor([[0, 3], [3, 2]]), 4).tolist()
        [[3, 0], [3, 0]]
    """
    votes = F.one_hot(chosen, size).sum((0, 1))
    return votes.argsort(dim=0, descending=True, stable=True)[: chosen.shape[1]].expand_as(chosen)


def insert_prompts(model: Foundation, tokens: Tensor, prompts: Tensor) -> Tensor:
    """Put prompts (B, P, width) between class token and patches of (B, N, width), with the class token's position."""
    vit = model.vit
    if vit.cls_token is not None and vit.pos_embed is not None and not vit.no_embed_class:
        prompts = prompts + vit.pos_embed[:, :1]
    start = vit.num_prefix_tokens
    return torch.cat([tokens[:, :start], vit.norm_pre(prompts), tokens[:, start:]], 1)


def run_blocks(
    model: Foundation, x: Tensor, start: int = 0, stop: int | None = None, prefixes: Mapping[int, Tensor] | None = None
) -> Tensor:
    """Tokens (B, N, width) after blocks ``start`` to ``stop - 1``, each with its prefix if it has one."""
    for index, block in enumerate(model.vit.blocks[start:stop], start):
        x = run_block(block, x, (prefixes or {}).get(index))
    return x


class PromptingModule(ClassificationModule):
    """Cross-entropy - lambda * mean over the batch of cos(query, key), summed over each image's prompts.

    The second term alone trains the keys; the first trains everything else.
    """

    def __init__(
        self, net: Net, lambda_pull: float, classes: Tensor | None = None, slot_of_class: Tensor | None = None,
        prefix_of: PrefixOf = "label", **optimisation: Any,
    ) -> None:  # fmt: skip
        """``slot_of_class`` (num_classes,) is the prompt that each class trains; if None, the net selects by keys.

        ``prefix_of`` other than 'label': the image's label chooses the key that is pulled, but not its prompt.
        """
        super().__init__(net, classes, **optimisation)
        self.lambda_pull, self.prefix_of = lambda_pull, prefix_of
        self.register_buffer("slot_of_class", slot_of_class, persistent=False)

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        slots: tuple[Tensor | None, ...] = ()
        if self.slot_of_class is not None:
            own = self.slot_of_class[batch.labels]
            slots = {"label": (own,), "nearest": (None, own), "another": (own.roll(1), own)}[self.prefix_of]
        output = self.net(batch.images, batch.prefix, *slots)
        return {
            "cross_entropy": cross_entropy(output.logits, batch.labels, self.classes),
            "pull": -self.lambda_pull * output.match.mean(),
        }


@dataclass(kw_only=True)
class PromptMethod(Method):
    """Options of all prompt methods."""

    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT."""
    lambda_pull: NonNegative = 0.1
    """Weight of the pull of keys towards queries."""
    max_norm: Positive = 1.0
    """Norm to which gradients are clipped."""
    batch_size: Count = 16
    """Images per step; the official rates are 0.03 * batch_size / 256, ours Adam's `lr`."""

    def prompting(self, client: Client, net: Net, **options: Any) -> PromptingModule:
        """The objective of a part of the client's net."""
        options |= {"lr": self.lr, "max_norm": self.max_norm}
        return PromptingModule(net, self.lambda_pull, client.classes, **options)


@dataclass(kw_only=True)
class FedL2P(PromptMethod):
    """L2P (Wang et al., CVPR 2022, arXiv 2112.08654) federated by averaging the pool of prompts, its keys and the head.

    Not "FedL2P: Federated Learning to Personalize" (NeurIPS 2023). Nothing aligns the prompts of different clients.
    Test images select their prompts one by one: the released vote over a test batch makes them depend on each other.
    """

    card: ClassVar = MethodCard(
        "CVPR 2022", "2112.08654", "pool of input prompts with keys, head; frozen ViT", "all that is trained"
    )
    pool: Count = 10
    """M: prompts in the pool."""
    length: Count = 5
    """L: tokens of a prompt."""
    top: Count = 5
    """N: prompts per image."""
    vote: bool = True
    """In training all images of a batch get the prompts that most of them chose; never at test time."""

    @override
    def build_net(self, client: int, stream: StreamShape) -> Net:
        pool = PromptPool(self.pool, self.length, foundation(self.foundation).width, self.top, self.vote)
        return PromptedViT(self.foundation, stream.num_classes, pool)

    @override
    def objective(self, client: Client) -> Learner:
        return self.prompting(client, client.net)


@dataclass(kw_only=True)
class FedDualP(PromptMethod):
    """DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799) federated by averaging prefixes, keys and the head.

    Slots are task indices: clients with different classes train the same slot, as in the paper's baseline.
    """

    card: ClassVar = MethodCard(
        "ECCV 2022", "2204.04799", "general and expert prefixes, keys, head; frozen ViT", "all that is trained"
    )
    general_blocks: Sequence[Whole] = (0, 1)
    """Blocks with the general prefix, counted from 0."""
    general_length: Count = 5
    """Keys, and values, that the general prefix adds to a block."""
    expert_blocks: Sequence[Whole] = (2, 3, 4)
    """Blocks with the expert prefix."""
    expert_length: Count = 5
    """Keys, and values, that an expert adds to a block; 20 officially for ImageNet-R."""
    copy_previous: bool = True
    """Initialise a task's expert with that of the task before; its key is not copied."""
    key_lr: Positive = 0.01
    """Learning rate of the keys (ours): at 1e-3 Adam turns one a radian in 600 steps, more than a task has."""
    lambda_pull: NonNegative = 1.0
    """Weight of the pull of the task's key towards queries."""

    @override
    def build_net(self, client: int, stream: StreamShape) -> Net:
        blocks, lengths = (self.general_blocks, self.expert_blocks), (self.general_length, self.expert_length)
        return PrefixedViT(self.foundation, stream.num_classes, *blocks, *lengths, stream.num_tasks)

    @torch.no_grad()
    def begin_task(self, client: Client) -> None:
        """Copy the last task's expert; all clients hold the same weights, and so make the same copy."""
        if client.task and self.copy_previous:
            experts = client.net.expert.prompts
            experts[:, :, client.task] = experts[:, :, client.task - 1]

    @override
    def objective(self, client: Client) -> Learner:
        slots = torch.full((len(client.net.head.weight),), client.task)
        return self.prompting(client, client.net, slot_of_class=slots, lr_of={"keys": self.key_lr})


class MultiGranularityViT(FrozenViTNet):
    """FedMGP's net: a shared coarse prompted ViT (P_g, its keys and h_g), and private fine prefixes, keys and heads.

    The fine pass keeps the coarse prompt at the input, without gradient. Keys are compared with the coarse features.
    """

    def __init__(
        self, coarse: PromptedViT, num_classes: int, blocks: Sequence[int], length: int, hidden: int, num_tasks: int
    ) -> None:
        """Fine prefixes of ``length`` tokens in ``blocks``, and a head with ``hidden`` units for each task."""
        super().__init__(coarse.foundation, coarse.entry)
        if not blocks:
            raise ValueError("fine_blocks must name at least one block, got none.")
        self.coarse = coarse
        width = self.foundation.width
        self.fine = Prefixes(self.foundation, blocks, num_classes, length)
        self.fine_keys = uniform(num_classes, width)
        self.fine_heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)) for _ in range(num_tasks)
        )
        self.register_buffer("task_of_class", torch.full((num_classes,), -1))

    @property
    def head(self) -> nn.Module:
        """h_g, the shared head."""
        return self.coarse.head

    def forward(
        self, images: Tensor, prefix: Tensor | None = None, slots: Tensor | None = None, keys: Tensor | None = None
    ) -> Prompted:
        """Classify stored images (B, 3, h, w) with the prefixes of classes ``slots`` (B,), or of the nearest keys.

        The nearest is among the classes of tasks so far, in training of the newest task. The logit of a class comes
        from the head of its task. ``match`` is of the keys ``keys`` (B,), or of ``slots``.
        """
        model, first = self.foundation, min(self.fine.blocks)
        with torch.no_grad():
            shared = run_blocks(model, self.coarse.embed_with_prompts(images, prefix)[0], stop=first)
            query = self.coarse.prompt_features(run_blocks(model, shared, first))
        similarity = cosine(query, self.fine_keys)
        if slots is None:
            first_task = self.task_of_class.max() if self.training else 0
            slots = similarity.masked_fill(self.task_of_class < first_task, -2).argmax(1)
        features = self.coarse.prompt_features(run_blocks(model, shared, first, prefixes=self.fine(slots)))
        by_task = torch.stack([head(features) for head in self.fine_heads], 1)  # (B, tasks, num_classes)
        tasks = self.task_of_class.clamp(min=0).expand(len(features), 1, -1)
        matched = (slots if keys is None else keys)[:, None]
        return Prompted(features, by_task.gather(1, tasks)[:, 0], similarity.gather(1, matched)[:, 0], slots[:, None])


class FusionModule(Learner):
    """Selective prompt fusion: ``sum_j ||F(x; P) - F(x; P_j)||^2`` over the clients j; trains the prompts P alone.

    F (B, N + prompts, width) are all tokens after the ViT's last norm. The mean is over images (ours: Adam ignores it).
    """

    def __init__(self, net: PromptedViT, clients: Sequence[PromptedViT], lr: float, max_norm: float | None) -> None:
        super().__init__(net.requires_grad_(False), lr, max_norm=max_norm)
        net.pool.prompts.requires_grad_(True)
        self.clients = Frozen(nn.ModuleList(clients))

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        tokens = self.net.tokens(batch.images, batch.prefix).float()
        with torch.no_grad():
            targets = [client.tokens(batch.images, batch.prefix).float() for client in self.clients.net]
        return {"fusion": torch.stack([(tokens - target).square().sum((1, 2)).mean() for target in targets]).sum()}


@dataclass(kw_only=True)
class FedMGP(PromptMethod):
    """FedMGP (Yu et al., KDD 2024, arXiv 2407.00113): a shared coarse prompt; private class-wise prefixes predict.

    Not "FedMGP: Multi-Group Text-Visual Prompts" (arXiv 2511.00480). Deviations (reasons in docs/methods/fedmgp.md):
    - ``fusion: distill`` begins at the clients' average and learns from all alike (release: at the first client, from
      the others), on held-out training images (release: test images). All clients get h_g (release: none does).
    - No weight decay: coupled with Adam it would erase the prompts of earlier tasks' classes.
    - ``prefix_of``: the paper's rule shows the label to the fine head; the released reshape mixes a batch's prefixes.
    - An image is matched on its own, and with keys of the client's classes so far (release: the batch, all keys).
    - Private modules are never exchanged (release: clients pass heads to each other).
    """

    averages: ClassVar = True
    card: ClassVar = MethodCard(
        "KDD 2024", "2407.00113", "coarse prompt, class-wise prefixes, heads; frozen ViT",
        "coarse prompt with its key and head",
    )  # fmt: skip
    pool: Count = 1
    """Coarse prompts."""
    length: Count = 15
    """Tokens of a coarse prompt."""
    top: Count = 1
    """Coarse prompts per image."""
    fine_blocks: Sequence[Whole] = (2, 3, 4)
    """Blocks with class-wise prefixes, counted from 0."""
    fine_length: Count = 15
    """Keys, and values, that a class's prefix adds to a block."""
    hidden: Count = 512
    """Units between features and logits, in the shared head and in each private one."""
    key_lr: Positive = 0.01
    """Learning rate of the classes' keys (ours): at 1e-3 Adam turns one a radian in 600 steps, more than a task has."""
    prefix_of: PrefixOf = "nearest"
    """Prefix of an image in fine training: of the nearest key (ours), of another image's class in the batch (in effect
    the released code's), or of its own class, which shows the label to the head (the paper's)."""
    fusion: Fusion = "average"
    """Averages of the coarse parts (ours), or 'distill', training on ``data.validation_per_class`` images of each
    class of the round (the paper's); in simulations only."""
    surrogate_per_class: Count = 20
    """Held-out images of each class that 'distill' trains on, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fused: Payload = {}

    @override
    def build_net(self, client: int, stream: StreamShape) -> Net:
        fine = self.fine_blocks, self.fine_length, self.hidden, stream.num_tasks
        return MultiGranularityViT(self._build_coarse(stream.num_classes), stream.num_classes, *fine)

    def _build_coarse(self, num_classes: int, weights: Payload | None = None) -> PromptedViT:
        pool = PromptPool(self.pool, self.length, foundation(self.foundation).width, self.top)
        net = PromptedViT(self.foundation, num_classes, pool, self.hidden)
        if weights is not None:
            net.load_state_dict(weights)
        return net

    @override
    def begin_task(self, client: Client) -> None:
        client.net.task_of_class[client.classes] = client.task

    def stages(self, client: Client) -> Iterator[Stage]:
        """Phase 1 trains the coarse part; phase 2 the fine one."""
        ids, epochs = client.train_ids, self.local_epochs
        yield Stage("coarse", self.prompting(client, client.net.coarse), client.loader(ids, self.batch_size), epochs)
        options = {"slot_of_class": torch.arange(len(client.net.head.weight)), "lr_of": {"fine_keys": self.key_lr}}
        fine = self.prompting(client, client.net, prefix_of=self.prefix_of, **options)
        yield Stage("fine", fine, client.loader(ids, self.batch_size), epochs)

    def upload(self, client: Client) -> Payload:
        """P_g, its keys and h_g; no private module."""
        return outgoing(client.net.coarse.state_dict())

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        return dict(net.coarse.state_dict())

    @property
    @override
    def needs_public_images(self) -> bool:
        return self.fusion == "distill"

    @override
    def use_public_images(self, images: PublicImages) -> None:
        self._public_images = images

    @override
    def server_stages(self, uploads: list[Upload], progress: Progress) -> Iterator[Stage]:
        if self.fusion == "average":
            return
        counts = torch.stack([upload.class_counts for upload in uploads]).sum(0)
        classes = counts.nonzero()[:, 0]
        batches = self._public_images(classes, self.surrogate_per_class, self.batch_size)
        net = self._build_coarse(len(counts), self.average(uploads))
        clients = [self._build_coarse(len(counts), upload.payload) for upload in uploads]
        yield Stage("fusion", FusionModule(net, clients, self.lr, self.max_norm), batches, self.local_epochs)
        net.requires_grad_(True).pool.requires_grad_(False)
        module = ClassificationModule(net, classes, lr=self.lr, max_norm=self.max_norm)
        yield Stage("head", module, batches, self.local_epochs)
        self._fused = outgoing(net.state_dict())

    @override
    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        fused, self._fused = self._fused or self.average(uploads), {}
        return [fused] * len(uploads)

    @override
    def download(self, client: Client, payload: Payload) -> None:
        client.net.coarse.load_state_dict(payload)
