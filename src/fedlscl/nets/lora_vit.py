"""A frozen ViT with one trainable LoRA module per task and layer (Hu et al., ICLR 2022, arXiv 2106.09685)."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.nets.net import Output
from fedlscl.nets.vit import QKV, Foundation, FoundationConfig, FrozenViTNet, LowRank, adapted, foundation

QKV_PARTS = {"attn.q": 0, "attn.k": 1, "attn.v": 2}
"""Targets that are one third of the outputs of attn.qkv, by its index."""


class LoraViT(FrozenViTNet):
    """A frozen ViT, LoRA modules on linear layers of some blocks, and a trainable head.

    It predicts with the sum of all tasks' modules, each with its inputs scaled by ``LoraLayer.share``; a module that
    was not trained adds nothing. ``blocks`` are counted from 0, all if None. ``targets`` are linear layers of a block,
    such as attn.qkv or mlp.fc1, or parts of attn.qkv: attn.q, attn.k, attn.v.
    """

    def __init__(
        self, config: FoundationConfig, head: nn.Module, *, rank: int,
        blocks: Sequence[int] | None = None, targets: Sequence[str] = (QKV,), num_tasks: int = 1,
    ) -> None:  # fmt: skip
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}.")
        model = foundation(config)
        blocks = range(model.depth) if blocks is None else sorted(blocks)
        super().__init__(model, blocks[0])
        self.lora: Any = nn.ModuleList(
            LoraLayer(model, block, target, rank, num_tasks) for block in blocks for target in targets
        )
        self.head = head

    def forward(self, images: Tensor, prefix: Tensor | None = None, task: int | None = None) -> Output:
        """Classify stored images (B, 3, h, w) with all tasks' modules, or with that of ``task`` alone."""
        model = self.foundation.to(images.device)
        tokens = self.frozen_prefix(images) if prefix is None else prefix.float()
        with adapted((model.linear(layer.block, layer.target), layer.factors(task)) for layer in self.lora):
            whole = any(layer.block == model.depth - 1 for layer in self.lora)
            features = model.features(tokens, self.entry, whole=whole)
        return Output(features, self.head(features))

    def set_trainable(self, task: int, factors: Collection[str] = ("down", "up")) -> None:
        """Enable gradients for these factors of one task's modules only."""
        for layer in self.lora:
            for kind in ("down", "up"):
                for number, factor in enumerate(getattr(layer, kind)):
                    factor.requires_grad_(number == task and kind in factors)


class LoraLayer(nn.Module):
    """All tasks' modules for one linear layer of one block; that of task t adds ``up[t] @ down[t]`` to the weight.

    A (``down``, down-projection) is initialised Kaiming-uniform (a = sqrt 5), B (``up``, up-projection) with zeros.
    ``share`` (num_tasks, in_features) scales the inputs of each task's module, initially by 1.
    """

    share: Tensor

    def __init__(self, model: Foundation, block: int, target: str, rank: int, num_tasks: int) -> None:
        super().__init__()
        self.block, self.target = block, QKV if target in QKV_PARTS else target
        layer = model.linear(block, self.target)
        out = layer.out_features // 3 if target in QKV_PARTS else layer.out_features
        start = QKV_PARTS.get(target, 0) * out
        self.padding = start, layer.out_features - start - out
        self.down = nn.ParameterList([torch.empty(rank, layer.in_features) for _ in range(num_tasks)])
        self.up = nn.ParameterList([torch.zeros(out, rank) for _ in range(num_tasks)])
        for factor in self.down:
            nn.init.kaiming_uniform_(factor, a=5**0.5)
        self.register_buffer("share", torch.ones(num_tasks, layer.in_features))

    def factors(self, task: int | None = None) -> LowRank:
        """The update of a task, or of all tasks together, scaled by their shares."""
        if task is None:
            down = torch.cat([factor * share for factor, share in zip(self.down, self.share, strict=True)])
            up = torch.cat(list(self.up), 1)
        else:
            down, up = self.down[task], self.up[task]
        return LowRank(down, F.pad(up, (0, 0, *self.padding)))


class OneTask(FrozenViTNet):
    """A view of a LoraViT that computes with one task's module alone; all weights are shared."""

    def __init__(self, net: LoraViT, task: int) -> None:
        super().__init__(net.foundation, net.entry)
        self.net, self.task = net, task

    @property
    def head(self) -> nn.Module:
        """The head of the whole net."""
        return self.net.head

    @override
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Output:
        return self.net(images, prefix, self.task)
