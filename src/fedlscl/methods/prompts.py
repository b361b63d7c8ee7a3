"""FedL2P, FedDualP and FedMGP: prompts for a frozen ViT, averaged as in FedAvg."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.data.images import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Progress, PublicImages, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.objectives import cross_entropy
from fedlscl.modules.learner import ClassificationModule, Learner
from fedlscl.nets.net import Frozen, Net
from fedlscl.nets.prompts import PrefixedViT, Prefixes, Prompted, PromptedViT, PromptPool, cosine, run_blocks, uniform
from fedlscl.nets.vit import FoundationConfig, FrozenViTNet, foundation

PrefixOf = Literal["nearest", "another", "label"]
"""Whose prefix an image gets in FedMGP's fine training."""
Fusion = Literal["average", "distill"]
"""How FedMGP's server fuses the coarse parts."""


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
            prefixes = {"label": (own,), "nearest": (None, own), "another": (own.roll(1), own)}
            slots = prefixes[self.prefix_of]
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
    lambda_pull: float = 0.1
    """Weight of the pull of keys towards queries."""
    max_norm: float = 1.0
    """Norm to which gradients are clipped."""
    batch_size: int = 16
    """Images per step; the official rates are 0.03 * batch_size / 256, ours Adam's `lr`."""

    def _stage(
        self, name: str, client: Client, net: Net, slots: Tensor | None = None, lr_of: dict[str, float] | None = None,
        prefix_of: PrefixOf = "label",
    ) -> Stage:  # fmt: skip
        options: dict[str, Any] = {"lr": self.lr, "lr_of": lr_of, "max_norm": self.max_norm}
        module = PromptingModule(net, self.lambda_pull, client.classes, slots, prefix_of, **options)
        return Stage(name, module, client.loader(client.train_ids, self.batch_size), self.local_epochs)


@dataclass(kw_only=True)
class FedL2P(PromptMethod):
    """L2P (Wang et al., CVPR 2022, arXiv 2112.08654) federated by averaging the pool of prompts, its keys and the head.

    Not "FedL2P: Federated Learning to Personalize" (NeurIPS 2023). Nothing aligns the prompts of different clients.
    Test images select their prompts one by one: the released vote over a test batch makes them depend on each other.
    """

    card: ClassVar = MethodCard(
        "CVPR 2022", "2112.08654", "pool of input prompts with keys, head; frozen ViT", "all that is trained"
    )

    pool: int = 10
    """M: prompts in the pool."""
    length: int = 5
    """L: tokens of a prompt."""
    top: int = 5
    """N: prompts per image."""
    vote: bool = True
    """In training all images of a batch get the prompts that most of them chose; never at test time."""

    def build_net(self, client: int, stream: StreamShape) -> Net:
        """A prompted ViT."""
        pool = PromptPool(self.pool, self.length, foundation(self.foundation).width, self.top, self.vote)
        return PromptedViT(self.foundation, stream.num_classes, pool)

    @override
    def stages(self, client: Client) -> Iterator[Stage]:
        yield self._stage("train", client, client.net)


@dataclass(kw_only=True)
class FedDualP(PromptMethod):
    """DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799) federated by averaging prefixes, keys and the head.

    Prefixes are indexed block by block, so that keys, values and images stay apart (released code mixes them). Slots
    are task indices: clients with different classes train the same slot, as in the paper's baseline.
    """

    card: ClassVar = MethodCard(
        "ECCV 2022", "2204.04799", "general and expert prefixes, keys, head; frozen ViT", "all that is trained"
    )

    general_blocks: Sequence[int] = (0, 1)
    """Blocks with the general prefix, counted from 0."""
    general_length: int = 5
    """Keys, and values, that the general prefix adds to a block."""
    expert_blocks: Sequence[int] = (2, 3, 4)
    """Blocks with the expert prefix."""
    expert_length: int = 5
    """Keys, and values, that an expert adds to a block; 20 officially for ImageNet-R."""
    copy_previous: bool = True
    """Initialise a task's expert with that of the task before; its key is not copied."""
    key_lr: float = 0.01
    """Learning rate of the keys (ours): at 1e-3 Adam turns one a radian in 600 steps, more than a task has."""
    lambda_pull: float = 1.0
    """Weight of the pull of the task's key towards queries."""

    def build_net(self, client: int, stream: StreamShape) -> Net:
        """A ViT with prefixes."""
        return PrefixedViT(
            self.foundation, stream.num_classes, self.general_blocks, self.expert_blocks,
            self.general_length, self.expert_length, stream.num_tasks,
        )  # fmt: skip

    def begin_task(self, client: Client) -> None:
        """Copy the last task's expert; all clients hold the same weights, and so make the same copy."""
        if client.task and self.copy_previous:
            with torch.no_grad():
                experts = client.net.expert.prompts
                experts[:, :, client.task] = experts[:, :, client.task - 1]

    def stages(self, client: Client) -> Iterator[Stage]:
        """Train the general prefix, the task's expert and its key, and the head."""
        slots = torch.full((len(client.net.head.weight),), client.task)
        yield self._stage("train", client, client.net, slots, {"keys": self.key_lr})


class MultiGranularityViT(FrozenViTNet):
    """FedMGP's net: a shared coarse prompted ViT (P_g, its keys and h_g), and private fine prefixes, keys and heads.

    The fine pass keeps the coarse prompt at the input, without gradient. The prefix is that of the key nearest to the
    coarse features, among the classes of tasks so far (in training, of the newest task), unless it is given.
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

        The logit of a class comes from the head of its task. ``match`` is of the keys ``keys`` (B,), of the prefixes'
        classes if None.
        """
        model, first = self.foundation, min(self.fine.blocks)
        with torch.no_grad():
            shared = run_blocks(model, self.coarse.embed_with_prompts(images, prefix)[0], 0, first, {})
            query = self.coarse.prompt_features(run_blocks(model, shared, first, model.depth, {}))
        similarity = cosine(query, self.fine_keys)
        if slots is None:
            first_task = self.task_of_class.max() if self.training else 0
            slots = similarity.masked_fill(self.task_of_class < first_task, -2).argmax(1)
        features = self.coarse.prompt_features(run_blocks(model, shared, first, model.depth, self.fine(slots)))
        by_task = torch.stack([head(features) for head in self.fine_heads], 1)  # (B, tasks, num_classes)
        tasks = self.task_of_class.clamp(min=0).expand(len(features), 1, -1)
        matched = (slots if keys is None else keys)[:, None]
        return Prompted(features, by_task.gather(1, tasks)[:, 0], similarity.gather(1, matched)[:, 0], slots[:, None])


class FusionModule(Learner):
    """Selective prompt fusion: ``sum_j ||F(x; P) - F(x; P_j)||^2`` over the clients j; trains the prompts P alone.

    F (B, N + prompts, width) are all tokens after the ViT's last norm. The mean is over images; ours, since Adam does
    not see the difference to their sum.
    """

    def __init__(self, net: PromptedViT, clients: Sequence[PromptedViT], lr: float, max_norm: float | None) -> None:
        super().__init__(net.requires_grad_(False), lr, max_norm=max_norm)
        net.pool.prompts.requires_grad_(True)
        self.clients = nn.ModuleList(Frozen(client) for client in clients)

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        tokens = self.net.tokens(batch.images, batch.prefix)
        with torch.no_grad():
            targets = [cast(Frozen, client).net.tokens(batch.images, batch.prefix) for client in self.clients]
        distances = [(tokens.float() - target.float()).square().sum((1, 2)).mean() for target in targets]
        return {"fusion": torch.stack(distances).sum()}


@dataclass(kw_only=True)
class FedMGP(PromptMethod):
    """FedMGP (Yu et al., KDD 2024, arXiv 2407.00113): a shared coarse prompt; private class-wise prefixes predict.

    Not "FedMGP: Multi-Group Text-Visual Prompts" (arXiv 2511.00480). Deviations:
    - By default the server averages P_g, its keys and h_g, as the release does for Office-Home. ``fusion: distill``
      needs labelled images at the server, which no other baseline has; they are held out of the training images, where
      the release takes test images. It begins at the average, and learns from all clients alike (release: at the first
      client, from the others). All clients get h_g (release: none does).
    - No weight decay (1e-3 officially): coupled with Adam it moves every prompt without a gradient by about the
      learning rate in each step, and the prompts of earlier tasks' classes would be lost.
    - In fine training the prefix of an image is that of the nearest key, as at test time (``prefix_of``). In the paper
      it is that of the image's class: the fine head then reads the label off the prefix, and fails where the keys do.
      The released code mixes the prefixes of a batch by a wrong reshape, so that they do not show the label.
    - An image is matched on its own, and with keys of the client's classes so far (release: the batch, all keys).
    - Private modules are never exchanged (release: clients pass heads to each other).
    """

    averages: ClassVar = True
    card: ClassVar = MethodCard(
        "KDD 2024",
        "2407.00113",
        "coarse prompt, class-wise prefixes, heads; frozen ViT",
        "coarse prompt with its key and head",
    )

    pool: int = 1
    """Coarse prompts."""
    length: int = 15
    """Tokens of a coarse prompt."""
    top: int = 1
    """Coarse prompts per image."""
    fine_blocks: Sequence[int] = (2, 3, 4)
    """Blocks with class-wise prefixes, counted from 0."""
    fine_length: int = 15
    """Keys, and values, that a class's prefix adds to a block."""
    hidden: int = 512
    """Units between features and logits, in the shared head and in each private one."""
    key_lr: float = 0.01
    """Learning rate of the classes' keys (ours): at 1e-3 Adam turns one a radian in 600 steps, more than a task has."""
    prefix_of: PrefixOf = "nearest"
    """Prefix of an image in fine training: of the nearest key (ours), of another image's class in the batch (in effect
    the released code's), or of its own class, which shows the label to the head (the paper's)."""
    fusion: Fusion = "average"
    """Averages of the coarse parts (ours), or 'distill', training on ``data.validation_per_class`` images of each
    class of the round (the paper's); in simulations only."""
    surrogate_per_class: int = 20
    """Held-out images of each class that 'distill' trains on, at most."""

    def __post_init__(self) -> None:
        """Validate the options."""
        super().__post_init__()
        if self.fusion not in get_args(Fusion):
            raise ValueError(f"fusion must be one of {', '.join(get_args(Fusion))}, got {self.fusion!r}.")
        if self.surrogate_per_class < 1:
            raise ValueError(f"surrogate_per_class must be >= 1, got {self.surrogate_per_class}.")
        self._fused: Payload = {}
        if self.prefix_of not in get_args(PrefixOf):
            raise ValueError(f"prefix_of must be one of {', '.join(get_args(PrefixOf))}, got {self.prefix_of!r}.")

    def build_net(self, client: int, stream: StreamShape) -> Net:
        """A coarse and a fine part over one ViT."""
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
        yield self._stage("coarse", client, client.net.coarse)
        classes = torch.arange(len(client.net.head.weight))
        yield self._stage("fine", client, client.net, classes, {"fine_keys": self.key_lr}, self.prefix_of)

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
        for part in (net.hidden, net.head):
            part.requires_grad_(True)
        net.pool.requires_grad_(False)
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
