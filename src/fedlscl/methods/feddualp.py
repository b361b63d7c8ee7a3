"""FedDualP: DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799), federated by averaging.

Prefixes are indexed block by block, so that keys, values and images keep apart (released code mixes them). Slots are
task indices: clients with different classes train the same slot, as in the paper's baseline.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Stage
from fedlscl.methods.pilora import require_modules
from fedlscl.modules.prompting import PromptingModule
from fedlscl.nets.net import Net
from fedlscl.nets.prefix import PrefixedViT
from fedlscl.nets.vit import FoundationConfig


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
    num_tasks: int = 5
    """Experts, one for each task of the stream (10 officially, for 10 tasks)."""
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

    def build_net(self, client: int, num_classes: int) -> Net:
        """A ViT with prefixes."""
        return PrefixedViT(
            self.foundation, num_classes, self.general_blocks, self.expert_blocks,
            self.general_length, self.expert_length, self.num_tasks,
        )  # fmt: skip

    def begin_task(self, client: Client) -> None:
        """Copy the last task's expert; every client holds the server's copy, so that all do the same."""
        require_modules(client, self.num_tasks)
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
