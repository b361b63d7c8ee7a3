"""FedWeIT's net: convolutions that are a shared base under a mask plus weights of a task (arXiv 2003.03196, Eq. 1)."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlscl.nets.classifier import LinearHead
from fedlscl.nets.net import Classification, Net
from fedlscl.nets.small import SmallModel
from fedlscl.nets.sparsity import hard_threshold

UNKNOWN = -100.0
"""Log-probability of a class that no task had."""
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


class DecomposedConv(nn.Module):
    """theta_t = B * sigmoid(m_t) + A_t + sum_j alpha_tj A'_j, with one m_t for each output channel.

    ``conv.weight`` is the base B; ``knowledge`` (num_clients, ...) are the clients' A'_j; ``anchor`` is B as the task
    found it. An earlier task's slot of ``adaptive`` holds both of its last terms, see `fold`.
    """

    knowledge: Tensor
    anchor: Tensor

    def __init__(self, conv: nn.Conv2d, num_tasks: int, num_clients: int, threshold: float) -> None:
        super().__init__()
        self.conv, self.threshold = conv, threshold
        self.task, self.is_current = 0, True
        weight = conv.weight.detach()
        tasks = range(num_tasks)
        self.adaptive = nn.ParameterList(weight / 3 for _ in tasks)
        self.mask = nn.ParameterList(0.5 * torch.randn(len(weight)) for _ in tasks)
        self.attention = nn.ParameterList(0.5 * torch.randn(num_clients) for _ in tasks)
        self.bias = nn.ParameterList(conv.bias.detach().clone() for _ in tasks if conv.bias is not None)
        self.register_buffer("knowledge", torch.zeros(num_clients, *weight.shape))
        self.register_buffer("anchor", weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with the weights of the selected task."""
        parts = {"weight": self.weight()}
        if len(self.bias):
            parts["bias"] = self.bias[self.task]
        return functional_call(self.conv, parts, (x,))

    def weight(self) -> Tensor:
        """Theta of the selected task; outside training with the A_t that would be sent."""
        base = self.conv.weight * self.mask[self.task].sigmoid().view(-1, 1, 1, 1)
        if not self.is_current:
            return base + self.adaptive[self.task]
        return base + (self.adaptive[self.task] if self.training else self.sent()) + self.attended()

    def sent(self) -> Tensor:
        """A_t of the selected task without what is small."""
        return hard_threshold(self.adaptive[self.task], self.threshold)

    def attended(self) -> Tensor:
        """What the selected task takes from all clients."""
        return torch.tensordot(self.attention[self.task], self.knowledge, 1)

    @torch.no_grad()
    def fold(self) -> None:
        """End the selected task: A_t becomes all that it adds to the base, and others' weights may be replaced."""
        self.adaptive[self.task].copy_(self.sent() + self.attended())


class TaskNorm(nn.Module):
    """A normalisation layer of each task, statistics included."""

    def __init__(self, norm: nn.Module, num_tasks: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(deepcopy(norm) for _ in range(num_tasks))
        self.task, self.is_current = 0, True

    def forward(self, x: Tensor) -> Tensor:
        """Normalise as the selected task does."""
        return self.norms[self.task](x)


class DecomposedClassifier(Net):
    """A CNN of timm with decomposed convolutions, norms of each task, and a head whose rows belong to tasks.

    In training it is the model of the newest task. Otherwise every task's model answers for its own classes with
    log-probabilities, so that over several tasks' classes the largest softmax wins (ours).
    """

    task_of: Tensor

    def __init__(
        self,
        name: str,
        num_classes: int,
        image_size: int,
        pretrained: bool = False,
        *,
        num_tasks: int,
        num_clients: int,
        threshold: float,
    ) -> None:
        super().__init__()
        self.small = SmallModel(name, image_size, pretrained)
        _decompose(self.small.cnn, {"num_tasks": num_tasks, "num_clients": num_clients, "threshold": threshold})
        self.head = LinearHead(self.small.width, num_classes)
        self.register_buffer("task_of", torch.full((num_classes,), -1))
        self.learn()

    @property
    def task(self) -> int:
        """The newest task."""
        return max(int(self.task_of.max()), 0)

    @property
    def convolutions(self) -> dict[str, DecomposedConv]:
        """The decomposed layers by name."""
        return {name: part for name, part in self.named_modules() if isinstance(part, DecomposedConv)}

    def begin(self, classes: Tensor, task: int) -> None:
        """Put the newest task away and begin one with these classes; its norms start as the last task's are (ours)."""
        self._select(self.task)
        for part in self.modules():
            if isinstance(part, TaskNorm) and task:
                part.norms[task].load_state_dict(part.norms[task - 1].state_dict())
            elif isinstance(part, DecomposedConv):
                if task:
                    part.fold()
                part.anchor.copy_(part.conv.weight.detach())
        self.task_of[classes] = task
        self.learn()

    def learn(self) -> None:
        """Let the base, the newest task's parts and the head be trained, and nothing else."""
        self._select(self.task)
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        for part in self.modules():
            if isinstance(part, TaskNorm):
                part.norms[part.task].requires_grad_(True)
            elif isinstance(part, DecomposedConv):
                part.conv.weight.requires_grad_(True)
                for values in (part.adaptive, part.mask, part.attention, part.bias):
                    if len(values):
                        values[part.task].requires_grad_(True)

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Classification:
        """Classify stored images (B, 3, h, w)."""
        newest = self.task
        self._select(newest)
        features = self.small(images)
        logits = self.head(features)
        tasks = self.task_of.unique().tolist()
        if self.training or tasks == [-1]:
            return Classification(features, logits)
        answers = torch.full_like(logits, UNKNOWN, dtype=torch.float32)
        for task in tasks:
            classes = (self.task_of == task).nonzero().flatten()
            if task == newest:
                answers[:, classes] = logits[:, classes].float().log_softmax(1)
            elif task >= 0:
                self._select(task)
                answers[:, classes] = self.head(self.small(images))[:, classes].float().log_softmax(1)
        self._select(newest)
        return Classification(features, answers)

    def _select(self, task: int) -> None:
        newest = self.task
        for part in self.modules():
            if isinstance(part, DecomposedConv | TaskNorm):
                part.task, part.is_current = task, task == newest


def _decompose(module: nn.Module, shape: dict[str, Any], where: str = "") -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, DecomposedConv(child, **shape))
        elif isinstance(child, NORMS):
            setattr(module, name, TaskNorm(child, shape["num_tasks"]))
        elif next(child.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"{where}{name} of the small model is a {type(child).__name__}, which FedWeIT cannot decompose: choose "
                "a small_model of convolutions and normalisations, such as resnet18."
            )
        else:
            _decompose(child, shape, f"{where}{name}.")
