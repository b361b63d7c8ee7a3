"""FedWeIT (Yoon et al., ICML 2021, arXiv 2003.03196): a shared sparse base, task weights, attention over clients'.

Deviations from the released code, with reasons in docs/methods/fedweit.md:
- a client's A_t is sent with the first upload after its task, so that attention has it from the second round on;
- a mask tells which channels are sent, not zeros, and their number is exactly the q-quantile's;
- BatchNorm belongs to the task; without task identity every task's model predicts and the largest softmax wins;
- fresh Adam in every round, no plateau rule.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from fedlscl.data.loader import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Progress, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.aggregation import masked_average
from fedlscl.functional.objectives import retention
from fedlscl.methods.fedavg import FedAvg
from fedlscl.modules import ClassificationModule, Learner
from fedlscl.nets.net import LinearHead, Net, Output, SmallModel
from fedlscl.options import Interval, NonNegative

UNKNOWN = -100.0
"""Log-probability of a class of no task so far."""
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


class DecomposedConv(nn.Module):
    """theta_t = B * sigmoid(m_t) + A_t + sum_j alpha_tj A'_j (Eq. 1), with one m_t for each output channel.

    ``conv.weight`` is the base B; ``knowledge`` (num_clients, ...) are the clients' A'_j; ``anchor`` is B at the start
    of the task. An earlier task's entry of ``adaptive`` holds the sum of its last two terms, see `fold`.
    """

    def __init__(self, conv: nn.Conv2d, num_tasks: int, num_clients: int, threshold: float) -> None:
        super().__init__()
        self.conv, self.threshold = conv, threshold
        self.task, self.is_current = 0, True
        weight, tasks = conv.weight.detach(), range(num_tasks)
        self.adaptive = nn.ParameterList(weight / 3 for _ in tasks)
        self.mask = nn.ParameterList(0.5 * torch.randn(len(weight)) for _ in tasks)
        self.attention = nn.ParameterList(0.5 * torch.randn(num_clients) for _ in tasks)
        self.bias = nn.ParameterList(conv.bias.detach().clone() for _ in tasks if conv.bias is not None)
        self.knowledge = nn.Buffer(torch.zeros(num_clients, *weight.shape))
        self.anchor = nn.Buffer(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with the weights of the selected task."""
        bias = {"bias": self.bias[self.task]} if len(self.bias) else {}
        return functional_call(self.conv, {"weight": self.weight(), **bias}, (x,))

    def weight(self) -> Tensor:
        """Theta of the selected task; outside training with the sparse A_t."""
        base = self.conv.weight * self.mask[self.task].sigmoid().view(-1, 1, 1, 1)
        if not self.is_current:
            return base + self.adaptive[self.task]
        return base + (self.adaptive[self.task] if self.training else self.sparse_adaptive()) + self.attended()

    def sparse_adaptive(self) -> Tensor:
        """A_t of the selected task without entries up to ``threshold`` in size, as it is sent."""
        values = self.adaptive[self.task]
        return torch.where(values.abs() > self.threshold, values, 0)

    def attended(self) -> Tensor:
        """The attention term of the selected task."""
        return torch.tensordot(self.attention[self.task], self.knowledge, 1)

    @torch.no_grad()
    def fold(self) -> None:
        """End the selected task: add the attention term to A_t, so that ``knowledge`` may be replaced."""
        self.adaptive[self.task].copy_(self.sparse_adaptive() + self.attended())


class TaskNorm(nn.Module):
    """A normalisation layer of each task, statistics included."""

    def __init__(self, norm: nn.Module, num_tasks: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(deepcopy(norm) for _ in range(num_tasks))
        self.task, self.is_current = 0, True

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the layer of the selected task."""
        return self.norms[self.task](x)


class DecomposedClassifier(Net):
    """A CNN of timm with decomposed convolutions, norms of each task, and a head whose rows belong to tasks.

    In training mode it is the model of the current task. In evaluation mode every task's model predicts its classes'
    log-probabilities, so that over several tasks' classes the largest softmax wins (ours).
    """

    def __init__(
        self, name: str, num_classes: int, image_size: int, pretrained: bool = False, *,
        num_tasks: int, num_clients: int, threshold: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.small = SmallModel(name, image_size, pretrained)
        _decompose(self.small.cnn, num_tasks, num_clients, threshold)
        self.head = LinearHead(self.small.width, num_classes)
        self.task_of = nn.Buffer(torch.full((num_classes,), -1))
        self.last_task = -1
        self.register_load_state_dict_post_hook(DecomposedClassifier._update_last_task)
        self.set_trainable()

    @property
    def task(self) -> int:
        """The current task."""
        return max(self.last_task, 0)

    @property
    def convolutions(self) -> dict[str, DecomposedConv]:
        """The decomposed layers by name."""
        return {name: part for name, part in self.named_modules() if isinstance(part, DecomposedConv)}

    def begin_task(self, classes: Tensor, task: int) -> None:
        """Fold the previous task and begin one with these classes; its norms start as copies of the last (ours)."""
        self._select(self.task)
        for part in self.modules():
            if isinstance(part, TaskNorm) and task:
                part.norms[task].load_state_dict(part.norms[task - 1].state_dict())
            elif isinstance(part, DecomposedConv):
                if task:
                    part.fold()
                part.anchor.copy_(part.conv.weight.detach())
        self.task_of[classes] = task
        self._update_last_task()
        self.set_trainable()

    def set_trainable(self) -> None:
        """Enable gradients for the base, the current task's parts and the head only."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        for part in self.modules():
            if isinstance(part, TaskNorm):
                part.norms[self.task].requires_grad_(True)
            elif isinstance(part, DecomposedConv):
                part.conv.weight.requires_grad_(True)
                for values in (part.adaptive, part.mask, part.attention, part.bias):
                    if len(values):
                        values[self.task].requires_grad_(True)

    @override
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Output:
        self._select(self.task)
        features = self.small(images)
        logits = self.head(features)
        if self.training or self.last_task < 0:
            return Output(features, logits)
        log_probabilities = torch.full_like(logits, UNKNOWN, dtype=torch.float32)
        for task in range(self.task, -1, -1):
            if task < self.task:
                self._select(task)
                logits = self.head(self.small(images))
            classes = (self.task_of == task).nonzero().flatten()
            log_probabilities[:, classes] = logits[:, classes].float().log_softmax(1)
        self._select(self.task)
        return Output(features, log_probabilities)

    def _update_last_task(self, incompatible: object = None) -> None:
        self.last_task = int(self.task_of.max())  # known to the host, so that no step waits for a device

    def _select(self, task: int) -> None:
        for part in self.modules():
            if isinstance(part, DecomposedConv | TaskNorm):
                part.task, part.is_current = task, task == self.task


def _decompose(module: nn.Module, num_tasks: int, num_clients: int, threshold: float, path: str = "") -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, DecomposedConv(child, num_tasks, num_clients, threshold))
        elif isinstance(child, NORMS):
            setattr(module, name, TaskNorm(child, num_tasks))
        elif next(child.parameters(recurse=False), None) is not None:
            raise ValueError(
                "small_model must consist of convolutions and normalisations, such as resnet18, "
                f"got {path}{name}, a {type(child).__name__}."
            )
        else:
            _decompose(child, num_tasks, num_clients, threshold, f"{path}{name}.")


class DecompositionModule(ClassificationModule):
    """Cross-entropy, weight decay, sparse task weights, and a base that stays where earlier tasks need it (Eq. 2)."""

    net: DecomposedClassifier

    def __init__(self, net: DecomposedClassifier, classes: Tensor, options: "FedWeIT") -> None:
        super().__init__(net, classes, lr=options.lr)
        self.options = options

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        options, layers, task = self.options, self.net.convolutions.values(), self.net.task
        adaptive, masks = [layer.adaptive[task] for layer in layers], [layer.mask[task] for layer in layers]
        decayed = adaptive + masks + ([layer.conv.weight for layer in layers] if task == 0 else [])
        terms = {
            **super().loss(batch),
            "decay": options.weight_decay / 2 * _total(value.square() for value in decayed),
            "sparsity": options.lambda_sparse * _total(value.abs() for value in adaptive)
            + options.lambda_mask * _total(value.abs() for value in masks),
        }
        if task:
            gates = [torch.stack([mask.sigmoid() for mask in layer.mask[:task]]) for layer in layers]
            drift = [retention(layer.conv.weight, layer.anchor, g) for layer, g in zip(layers, gates, strict=True)]
            terms["retention"] = options.lambda_retain * _total(drift)
        return terms


def _total(values: Iterable[Tensor]) -> Tensor:
    return torch.stack([value.sum() for value in values]).sum()


def largest(values: Tensor, sparsity: float) -> Tensor:
    """Mask (n,) of the values (n,) of largest size; the fraction ``sparsity`` of them, rounded down, is left out.

    Example:
        >>> largest(torch.tensor([1.0, -3.0, 2.0]), 0.4)
        tensor([False,  True,  True])
    """
    kept = values.abs().argsort(descending=True, stable=True)[: len(values) - int(sparsity * len(values))]
    return torch.zeros(len(values), dtype=torch.bool, device=values.device).index_fill_(0, kept, True)


def pack_sparse(values: Tensor) -> tuple[Tensor, Tensor]:
    """The non-zero values, and a bit for each value, eight to a byte.

    Example:
        >>> pack_sparse(torch.tensor([[0.0, 5.0], [0.0, 7.0]]))
        (tensor([5., 7.]), tensor([80], dtype=torch.uint8))
    """
    values = values.detach().cpu()
    return values[values != 0], torch.from_numpy(np.packbits((values != 0).numpy()))


def unpack_sparse(values: Tensor, bits: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of ``pack_sparse`` for a tensor of this shape."""
    mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).astype(bool))
    return torch.zeros(shape.numel(), dtype=values.dtype).masked_scatter_(mask, values).view(shape)


BASE, SENT, VALUES, BITS = "base.", "sent.", "values.", "bits."
"""Prefixes in payloads: rows of the base and their mask; a packed A_t. A layer's name follows."""


@dataclass(kw_only=True)
class FedWeIT(FedAvg):
    """Only the base is averaged; clients use each other's task weights through attention."""

    supports_foundation: ClassVar = False
    card: ClassVar = MethodCard(
        "ICML 2021", "2003.03196", "small CNN: shared base, masks, weights of the task, attention; head",
        "70 % of the base's channels; once per task its sparse weights",
    )  # fmt: skip
    lambda_sparse: NonNegative = 1e-3
    """lambda_1 of ||A_t||_1, and the size up to which entries of A_t are set to 0 when it is sent and evaluated."""
    lambda_retain: NonNegative = 100.0
    """lambda_2 of the base's drift under earlier tasks' masks."""
    lambda_mask: NonNegative = 0.0
    """Weight of ||m_t||_1."""
    weight_decay: NonNegative = 1e-4
    """Weight of ||A_t||^2 / 2, ||m_t||^2 / 2 and, in the first task, ||B||^2 / 2."""
    sparsity: Annotated[float, Interval("[0, 1)")] = 0.3
    """q: the fraction of a layer's channels, those of the smallest |m_t|, that are not sent."""

    @override
    def build_net(self, client: int, stream: StreamShape) -> DecomposedClassifier:
        cnn = self.small_model, stream.num_classes, self.small_image_size, self.pretrained
        shape = {"num_tasks": stream.num_tasks, "num_clients": stream.num_clients, "threshold": self.lambda_sparse}
        return DecomposedClassifier(*cnn, **shape)

    @override
    def begin_task(self, client: Client) -> None:
        client.net.begin_task(client.classes, client.task)

    @override
    def objective(self, client: Client) -> Learner:
        client.net.set_trainable()
        return DecompositionModule(client.net, client.classes, self)

    def upload(self, client: Client) -> Payload:
        """The base's channels with the largest masks; in the first upload after a task also its sparse A_t."""
        payload = dict(client.memory)
        for name, layer in client.net.convolutions.items():
            sent = largest(layer.mask[client.task].detach(), self.sparsity)
            payload |= {SENT + name: sent, BASE + name: layer.conv.weight[sent]}
        return outgoing(payload)

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        expected: Payload = {}
        for name, layer in net.convolutions.items():
            channels, *shape = layer.conv.weight.shape
            num_sent = channels - int(self.sparsity * channels)
            if upload.payload[SENT + name].sum() != num_sent:
                raise ValueError(f"{SENT + name} must mark {num_sent} channels")
            expected[SENT + name] = torch.empty(channels, dtype=torch.bool, device="meta")
            expected[BASE + name] = torch.empty(num_sent, *shape, device="meta")
            if BITS + name in upload.payload:
                size, bits = layer.anchor.numel(), upload.payload[BITS + name]
                num_values = int(np.unpackbits(bits.numpy(), count=size).sum())
                expected[BITS + name] = torch.empty(-(-size // 8), dtype=torch.uint8, device="meta")
                expected[VALUES + name] = torch.empty(num_values, device="meta")
        return expected

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Every channel's mean over the clients that sent it, and all clients' A_t."""
        payloads = [upload.payload for upload in uploads]
        merged: Payload = {}
        for name in (key.removeprefix(BASE) for key in payloads[0] if key.startswith(BASE)):
            merged[BASE + name], merged[SENT + name] = masked_average(
                [p[BASE + name] for p in payloads], [p[SENT + name] for p in payloads]
            )
        for upload in uploads:
            merged |= {f"{upload.client}.{n}": v for n, v in upload.payload.items() if n.startswith((VALUES, BITS))}
        return [merged] * len(uploads)

    @torch.no_grad()
    def download(self, client: Client, payload: Payload) -> None:
        """Load the channels that at least one client sent, and the A_t in the payload."""
        for name, layer in client.net.convolutions.items():
            layer.conv.weight[payload[SENT + name]] = payload[BASE + name].to(layer.conv.weight)
            for j in range(len(layer.knowledge)):
                if f"{j}.{VALUES}{name}" in payload:
                    values, bits = (payload[f"{j}.{part}{name}"] for part in (VALUES, BITS))
                    layer.knowledge[j] = unpack_sparse(values, bits, layer.anchor.shape).to(layer.knowledge)
        client.memory = {}

    def end_task(self, client: Client) -> None:
        """Keep the sparse A_t for the next upload."""
        for name, layer in client.net.convolutions.items():
            client.memory[VALUES + name], client.memory[BITS + name] = pack_sparse(layer.sparse_adaptive())
