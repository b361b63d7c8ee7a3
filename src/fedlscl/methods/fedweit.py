"""FedWeIT (Yoon et al., ICML 2021, arXiv 2003.03196): a shared sparse base, weights of tasks, attention over clients'.

Deviations from the released code, with reasons in docs/methods/fedweit.md:
- a client's A_t travels with the first exchange after its task, so that attention has it from the second round on;
- which channels are sent is said by a mask, not by zeros, and they are the q-quantile's exact number;
- BatchNorm belongs to the task; without task identity every task's model answers and the largest softmax wins;
- fresh Adam in every round, no plateau rule.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlscl.aggregation import masked_average
from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Progress, Stage
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.methods.fedavg import FedAvg
from fedlscl.methods.pilora import require_modules
from fedlscl.modules.decomposition import DecompositionModule
from fedlscl.nets.decomposed import DecomposedClassifier
from fedlscl.nets.net import Net
from fedlscl.nets.sparsity import largest, num_ones, pack, unpack

BASE, SENT, VALUES, BITS = "base.", "sent.", "values.", "bits."
"""Prefixes: rows of the base and which they are; a packed A_t. A layer's name follows."""


@dataclass(kw_only=True)
class FedWeIT(FedAvg):
    """Only the base is averaged; clients use each other's weights of tasks through attention."""

    card: ClassVar = MethodCard(
        "ICML 2021",
        "2003.03196",
        trains="small CNN: shared base, masks, weights of the task, attention; head",
        uploads="70 % of the base's channels; once per task its sparse weights",
    )

    num_tasks: int = 5
    """Sets of weights, one for each task of the stream."""
    num_clients: int = 5
    """Whose weights attention covers."""
    lambda_sparse: float = 1e-3
    """lambda_1 of ||A_t||_1, and the size below which an entry of A_t is 0 where it is sent and evaluated."""
    lambda_retain: float = 100.0
    """lambda_2 of the base's drift under earlier tasks' masks."""
    lambda_mask: float = 0.0
    """Weight of ||m_t||_1."""
    weight_decay: float = 1e-4
    """Weight of ||A_t||^2 / 2, ||m_t||^2 / 2 and, in the first task, ||B||^2 / 2."""
    sparsity: float = 0.3
    """q: the fraction of a layer's channels, those of the smallest |m_t|, that are not sent."""

    def __post_init__(self) -> None:
        """Refuse a frozen ViT, and to send nothing."""
        super().__post_init__()
        if self.foundation is not None:
            raise ValueError("foundation is set, but FedWeIT trains a CNN: leave it out and choose a small_model.")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity} is no fraction of channels to keep back: choose 0 to below 1.")

    def build_net(self, client: int, num_classes: int) -> DecomposedClassifier:
        """A decomposed CNN with parts for all tasks."""
        shape = {"num_tasks": self.num_tasks, "num_clients": self.num_clients, "threshold": self.lambda_sparse}
        return DecomposedClassifier(self.small_model, num_classes, self.small_image_size, self.pretrained, **shape)

    def begin_task(self, client: Client) -> None:
        """Put the last task's weights away and remember the base as it is."""
        require_modules(client, self.num_tasks)
        if client.id >= self.num_clients:
            raise ValueError(f"num_clients {self.num_clients} leaves out client {client.id}: raise method.num_clients.")
        client.net.begin(client.classes, client.task)

    def stages(self, client: Client) -> Iterator[Stage]:
        """Train the base and the task's own parts."""
        client.net.learn()
        weights = self.lambda_sparse, self.lambda_mask, self.lambda_retain, self.weight_decay
        module = DecompositionModule(client.net, *weights, client.classes, lr=self.lr)
        yield Stage("train", module, client.loader(client.train_ids, self.batch_size), self.local_epochs)

    def upload(self, client: Client) -> Payload:
        """The base's channels with the largest masks; in the first message after a task also its sparse A_t."""
        payload = dict(client.memory)
        for name, layer in client.net.convolutions.items():
            sent = largest(layer.mask[client.task].detach(), self.sparsity)
            payload |= {SENT + name: sent, BASE + name: layer.conv.weight[sent]}
        return outgoing(payload)

    def expects(self, upload: Upload, net: Net) -> Payload | None:
        """Of every layer as many channels as are sent, and with A_t as many values as there are bits."""
        expected: Payload = {}
        for name, layer in net.convolutions.items():
            channels, *shape = layer.conv.weight.shape
            num_sent = channels - int(self.sparsity * channels)
            if upload.payload[SENT + name].sum() != num_sent:
                raise ValueError(f"channels sent of {name} are not {num_sent}")
            expected[SENT + name] = torch.empty(channels, dtype=torch.bool, device="meta")
            expected[BASE + name] = torch.empty(num_sent, *shape, device="meta")
            if BITS + name in upload.payload:
                size, bits = layer.anchor.numel(), upload.payload[BITS + name]
                expected[BITS + name] = torch.empty(-(-size // 8), dtype=torch.uint8, device="meta")
                expected[VALUES + name] = torch.empty(num_ones(bits, size), device="meta")
        return expected

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Every channel's mean over who sent it, and everybody's A_t to everybody."""
        payloads = [upload.payload for upload in uploads]
        answer: Payload = {}
        for name in (key.removeprefix(BASE) for key in payloads[0] if key.startswith(BASE)):
            merged = masked_average([p[BASE + name] for p in payloads], [p[SENT + name] for p in payloads])
            answer[BASE + name], answer[SENT + name] = merged
        for upload in uploads:
            packed = {key: value for key, value in upload.payload.items() if key.startswith((VALUES, BITS))}
            answer |= {f"{upload.client}.{key}": value for key, value in packed.items()}
        return [answer] * len(uploads)

    @torch.no_grad()
    def download(self, client: Client, payload: Payload) -> None:
        """Take over the channels that somebody sent, and the A_t that came with them."""
        for name, layer in client.net.convolutions.items():
            layer.conv.weight[payload[SENT + name]] = payload[BASE + name].to(layer.conv.weight)
            for j in range(self.num_clients):
                if f"{j}.{VALUES}{name}" in payload:
                    values, bits = (payload[f"{j}.{part}{name}"] for part in (VALUES, BITS))
                    layer.knowledge[j] = unpack(values, bits, layer.anchor.shape).to(layer.knowledge)
        client.memory = {}

    def end_task(self, client: Client) -> None:
        """Keep the sparse A_t for the next message."""
        for name, layer in client.net.convolutions.items():
            client.memory[VALUES + name], client.memory[BITS + name] = pack(layer.sent())
