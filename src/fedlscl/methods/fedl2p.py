"""FedL2P: Learning to Prompt (Wang et al., CVPR 2022, arXiv 2112.08654), federated by averaging.

Not "FedL2P: Federated Learning to Personalize" (NeurIPS 2023). Pool, keys and head are averaged; nothing aligns the
prompts of different clients. Test images choose their prompts one by one: the released vote over a test batch would
let them see each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Stage
from fedlscl.modules.prompting import PromptingModule
from fedlscl.nets.net import Net
from fedlscl.nets.prompts import PromptedViT, PromptPool
from fedlscl.nets.vit import FoundationConfig, foundation


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

    def build_net(self, client: int, num_classes: int) -> Net:
        """A prompted ViT."""
        pool = PromptPool(self.pool, self.length, foundation(self.foundation).width, self.top, self.vote)
        return PromptedViT(self.foundation, num_classes, pool)

    def stages(self, client: Client) -> Iterator[Stage]:
        """Cross-entropy over the task's classes and the pull."""
        module = PromptingModule(client.net, self.lambda_pull, client.classes, lr=self.lr, max_norm=self.max_norm)
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)
