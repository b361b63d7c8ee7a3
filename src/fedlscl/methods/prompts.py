"""FedL2P, FedDualP and FedMGP: prompts for a frozen ViT."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedlscl.data.images import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.objectives import cross_entropy
from fedlscl.modules.learner import ClassificationModule
from fedlscl.nets.net import Net
from fedlscl.nets.prompts import PrefixedViT, Prefixes, Prompted, PromptedViT, PromptPool, cosine, run_blocks, uniform
from fedlscl.nets.vit import FoundationConfig, FrozenViTNet, foundation

# Prompts of two granularities: a shared input prompt and private class-wise prefixes (FedMGP, arXiv 2407.00113).


class MultiGranularityViT(FrozenViTNet):
    """A coarse prompted ViT (P_g, its keys and h_g) that is shared, and fine prefixes, keys and heads that are not.

    The fine pass keeps the coarse prompt at the input, without gradient. Its own prefix is that of the image's class:
    known in training, else the nearest key to what the coarse pass sees, among the classes met so far.
    """

    def __init__(
        self, coarse: PromptedViT, num_classes: int, blocks: Sequence[int], length: int, hidden: int, num_tasks: int
    ) -> None:
        """Fine prefixes of ``length`` tokens stand in ``blocks``; each task has a head with ``hidden`` units."""
        super().__init__(coarse.foundation, coarse.entry)
        if not blocks:
            raise ValueError("fine_blocks is empty: name one block or more.")
        self.coarse = coarse
        self.fine = Prefixes(self.foundation, blocks, num_classes, length)
        self.fine_keys = uniform(num_classes, self.foundation.width)
        self.fine_heads = nn.ModuleList(_mlp(self.foundation.width, hidden, num_classes) for _ in range(num_tasks))
        self.register_buffer("task_of_class", torch.full((num_classes,), -1))

    @property
    def head(self) -> nn.Module:
        """h_g, the head that is shared."""
        return self.coarse.head

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


# Objective of prompt methods: classify, and pull the keys of the prompts in use towards the images that use them.


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


# FedL2P: Learning to Prompt (Wang et al., CVPR 2022, arXiv 2112.08654), federated by averaging.
#
# Not "FedL2P: Federated Learning to Personalize" (NeurIPS 2023). Pool, keys and head are averaged; nothing aligns the
# prompts of different clients. Test images choose their prompts one by one: the released vote over a test batch would
# let them see each other.


@dataclass(kw_only=True)
class FedL2P(Method):
    """FedAvg over a pool of input prompts, their keys and the head of a frozen ViT."""

    card: ClassVar = MethodCard(
        "CVPR 2022",
        "2112.08654",
        trains="pool of input prompts with keys, head; frozen ViT",
        uploads="all that is trained",
    )

    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT."""
    pool: int = 10
    """M: prompts in the pool."""
    length: int = 5
    """L: tokens of a prompt."""
    top: int = 5
    """N: prompts that an image gets."""
    vote: bool = True
    """In training all images of a batch get the prompts that most of them chose; never at test time."""
    lambda_pull: float = 0.1
    """Weight of the pull of keys towards queries."""
    max_norm: float = 1.0
    """Norm to which gradients are clipped."""
    batch_size: int = 16
    """Images per step; its official rate is 0.03 * batch_size / 256, ours Adam's `lr`."""

    def build_net(self, client: int, stream: StreamShape) -> Net:
        """A prompted ViT."""
        pool = PromptPool(self.pool, self.length, foundation(self.foundation).width, self.top, self.vote)
        return PromptedViT(self.foundation, stream.num_classes, pool)

    def stages(self, client: Client) -> Iterator[Stage]:
        """Cross-entropy over the task's classes and the pull."""
        module = PromptingModule(client.net, self.lambda_pull, client.classes, lr=self.lr, max_norm=self.max_norm)
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)


# FedDualP: DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799), federated by averaging.
#
# Prefixes are indexed block by block, so that keys, values and images keep apart (released code mixes them). Slots are
# task indices: clients with different classes train the same slot, as in the paper's baseline.


@dataclass(kw_only=True)
class FedDualP(Method):
    """FedAvg over general and expert prefixes, the experts' keys and the head of a frozen ViT."""

    card: ClassVar = MethodCard(
        "ECCV 2022",
        "2204.04799",
        trains="general and expert prefixes, keys, head; frozen ViT",
        uploads="all that is trained",
    )

    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT."""
    general_blocks: Sequence[int] = (0, 1)
    """Blocks with the general prefix, counted from 0."""
    general_length: int = 5
    """Keys, and values, that the general prefix adds to a block."""
    expert_blocks: Sequence[int] = (2, 3, 4)
    """Blocks with the expert prefix."""
    expert_length: int = 5
    """Keys, and values, that an expert adds to a block; 20 officially for ImageNet-R."""
    copy_previous: bool = True
    """A task's expert starts as that of the task before; its key does not."""
    key_lr: float = 0.01
    """Learning rate of the keys (ours): at 1e-3 Adam turns one a radian in 600 steps, more than a task has."""
    lambda_pull: float = 1.0
    """Weight of the pull of the task's key towards queries."""
    max_norm: float = 1.0
    """Norm to which gradients are clipped."""
    batch_size: int = 16
    """Images per step (24 officially); its official rate is 0.03 * batch_size / 256, ours Adam's `lr`."""

    def build_net(self, client: int, stream: StreamShape) -> Net:
        """A ViT with prefixes."""
        return PrefixedViT(
            self.foundation, stream.num_classes, self.general_blocks, self.expert_blocks,
            self.general_length, self.expert_length, stream.num_tasks,
        )  # fmt: skip

    def begin_task(self, client: Client) -> None:
        """Copy the last task's expert; every client holds the server's copy, so that all do the same."""
        if client.task and self.copy_previous:
            with torch.no_grad():
                experts = client.net.expert.prompts
                experts[:, :, client.task] = experts[:, :, client.task - 1]

    def stages(self, client: Client) -> Iterator[Stage]:
        """Cross-entropy through the task's expert, and the pull of its key."""
        slots = torch.full((len(client.net.head.weight),), client.task)
        module = PromptingModule(
            client.net, self.lambda_pull, client.classes, slots,
            lr=self.lr, lr_of={"keys": self.key_lr}, max_norm=self.max_norm,
        )  # fmt: skip
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)


# FedMGP: multi-granularity prompts (Yu et al., KDD 2024, arXiv 2407.00113).
#
# Not "FedMGP: Multi-Group Text-Visual Prompts" (arXiv 2511.00480). Deviations:
# - The server averages P_g, its keys and h_g, as the release does for Office-Home. The fusion by distillation needs a
#   labelled surrogate set and training on the server, which no other baseline has; it is not implemented.
# - No weight decay (1e-3 officially): coupled with Adam it moves every prompt without a gradient by about the learning
#   rate in each step, and the classes of earlier tasks would lose theirs.
# - An image is matched on its own, and with keys of classes that the client has met (release: the batch, all keys).
# - Each client has modules of its own (release: clients pass heads on to each other).


@dataclass(kw_only=True)
class FedMGP(Method):
    """FedAvg over a coarse prompt and its head; class-wise prefixes and heads stay with the client and predict."""

    card: ClassVar = MethodCard(
        "KDD 2024",
        "2407.00113",
        trains="coarse prompt, class-wise prefixes, heads; frozen ViT",
        uploads="coarse prompt with its key and head",
    )

    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT."""
    pool: int = 1
    """Coarse prompts."""
    length: int = 15
    """Tokens of a coarse prompt."""
    top: int = 1
    """Coarse prompts that an image gets."""
    fine_blocks: Sequence[int] = (2, 3, 4)
    """Blocks with class-wise prefixes, counted from 0."""
    fine_length: int = 15
    """Keys, and values, that a class's prefix adds to a block."""
    hidden: int = 512
    """Units between features and logits, in the shared head and in each private one."""
    key_lr: float = 0.01
    """Learning rate of the classes' keys (ours): at 1e-3 Adam turns one a radian in 600 steps, more than a task has."""
    lambda_pull: float = 0.1
    """Weight of the pull of keys towards queries, in both phases."""
    max_norm: float = 1.0
    """Norm to which gradients are clipped."""
    batch_size: int = 16
    """Images per step; its official rate is 0.03 * batch_size / 256, ours Adam's `lr`."""

    def build_net(self, client: int, stream: StreamShape) -> Net:
        """A coarse and a fine part over one ViT."""
        pool = PromptPool(self.pool, self.length, foundation(self.foundation).width, self.top)
        coarse = PromptedViT(self.foundation, stream.num_classes, pool, self.hidden)
        fine = self.fine_blocks, self.fine_length, self.hidden, stream.num_tasks
        return MultiGranularityViT(coarse, stream.num_classes, *fine)

    def begin_task(self, client: Client) -> None:
        """Give the task's classes its head."""
        client.net.meet(client.classes, client.task)

    def stages(self, client: Client) -> Iterator[Stage]:
        """Phase 1 trains the coarse part; phase 2 the fine one, each image with the prefix of its class."""
        net = client.net
        options: dict[str, Any] = {"lr": self.lr, "max_norm": self.max_norm}
        coarse = PromptingModule(net.coarse, self.lambda_pull, client.classes, **options)
        yield Stage("coarse", coarse, client.loader(client.train_ids, self.batch_size), self.local_epochs)
        classes = torch.arange(len(net.head.weight))
        rates = {"fine_keys": self.key_lr}
        fine = PromptingModule(net, self.lambda_pull, client.classes, classes, lr_of=rates, **options)
        yield Stage("fine", fine, client.loader(client.train_ids, self.batch_size), self.local_epochs)

    def upload(self, client: Client) -> Payload:
        """P_g, its keys and h_g; nothing fine."""
        return outgoing(client.net.coarse.state_dict())

    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        """The coarse part."""
        return dict(net.coarse.state_dict())

    def download(self, client: Client, payload: Payload) -> None:
        """Take over P_g, its keys and h_g."""
        client.net.coarse.load_state_dict(payload)
