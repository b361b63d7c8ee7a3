"""FedMGP: multi-granularity prompts (Yu et al., KDD 2024, arXiv 2407.00113).

Not "FedMGP: Multi-Group Text-Visual Prompts" (arXiv 2511.00480). Deviations:
- The server averages P_g, its keys and h_g, as the release does for Office-Home. The fusion by distillation needs a
  labelled surrogate set and training on the server, which no other baseline has; it is not implemented.
- No weight decay (1e-3 officially): coupled with Adam it moves every prompt without a gradient by about the learning
  rate in each step, and the classes of earlier tasks would lose theirs.
- An image is matched on its own, and with keys of classes that the client has met (release: the batch, all keys).
- Each client has modules of its own (release: clients pass heads on to each other).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Stage
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.methods.pilora import require_modules
from fedlscl.modules.prompting import PromptingModule
from fedlscl.nets.granularity import MultiGranularityViT
from fedlscl.nets.net import Net
from fedlscl.nets.prompts import PromptedViT, PromptPool
from fedlscl.nets.vit import FoundationConfig, foundation


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
    num_tasks: int = 5
    """Private heads, one for each task of the stream."""
    key_lr: float = 0.01
    """Learning rate of the classes' keys (ours): at 1e-3 Adam turns one a radian in 600 steps, more than a task has."""
    lambda_pull: float = 0.1
    """Weight of the pull of keys towards queries, in both phases."""
    max_norm: float = 1.0
    """Norm to which gradients are clipped."""
    batch_size: int = 16
    """Images per step; its official rate is 0.03 * batch_size / 256, ours Adam's `lr`."""

    def build_net(self, client: int, num_classes: int) -> Net:
        """A coarse and a fine part over one ViT."""
        pool = PromptPool(self.pool, self.length, foundation(self.foundation).width, self.top)
        coarse = PromptedViT(self.foundation, num_classes, pool, self.hidden)
        return MultiGranularityViT(coarse, num_classes, self.fine_blocks, self.fine_length, self.hidden, self.num_tasks)

    def begin_task(self, client: Client) -> None:
        """Give the task's classes its head."""
        require_modules(client, self.num_tasks)
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

    def expects(self, upload: Upload, net: Net) -> Payload | None:
        """The coarse part."""
        return dict(net.coarse.state_dict())

    def download(self, client: Client, payload: Payload) -> None:
        """Take over P_g, its keys and h_g."""
        client.net.coarse.load_state_dict(payload)
