"""A frozen ViT with one trainable LoRA module per task and layer (Hu et al., ICLR 2022, arXiv 2106.09685)."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.nets.net import Classification
from fedlscl.nets.vit import Foundation, FoundationConfig, FrozenViTNet, foundation, run_block

QKV = "attn.qkv"
QKV_PARTS = {"attn.q": 0, "attn.k": 1, "attn.v": 2}
"""Targets that are one third of the outputs of attn.qkv, by its index."""


class LoraViT(FrozenViTNet):
    """A frozen ViT, LoRA modules on linear layers of some blocks, and a trainable head.

    It predicts with the sum of all tasks' modules, each with its inputs scaled by ``LoraLayer.share``; a module that
    was not trained adds nothing.

    Args:
        config: the frozen ViT.
        head: features (B, width) to logits; has ``weight`` with one row per class.
        rank: of every module.
        blocks: adapted blocks, counted from 0; all if None.
        targets: linear layers of a block, such as attn.qkv or mlp.fc1; attn.q, attn.k, attn.v are parts of attn.qkv.
        num_tasks: modules per layer.
    """

    def __init__(
        self, config: FoundationConfig, head: nn.Module, *, rank: int,
        blocks: Sequence[int] | None = None, targets: Sequence[str] = (QKV,), num_tasks: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(foundation(config))
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}.")
        blocks = range(self.foundation.depth) if blocks is None else sorted(blocks)
        self.lora: Any = nn.ModuleList(
            LoraLayer(self.foundation, block, target, rank, num_tasks) for block in blocks for target in targets
        )
        self.entry = blocks[0]
        self.head = head

    def forward(self, images: Tensor, prefix: Tensor | None = None, task: int | None = None) -> Classification:
        """Classify stored images (B, 3, h, w) with all tasks' modules, or with that of ``task`` alone."""
        model = self.foundation.to(images.device)
        tokens = self.frozen_prefix(images) if prefix is None else prefix.float()
        with self._adapted(task):
            if all(layer.block < model.depth - 1 for layer in self.lora):
                features = model.features(tokens, self.entry)
            else:  # Foundation.features computes the last block's attn.qkv without calling its hooks
                for block in model.vit.blocks[self.entry :]:
                    tokens = run_block(block, tokens)
                features = model.vit.forward_head(model.vit.norm(tokens))
        return Classification(features, self.head(features))

    def set_trainable(self, task: int, factors: Collection[str] = ("down", "up")) -> None:
        """Enable gradients for these factors of one task's modules only."""
        for layer in self.lora:
            for kind in ("down", "up"):
                for number, factor in enumerate(getattr(layer, kind)):
                    factor.requires_grad_(number == task and kind in factors)

    @contextmanager
    def _adapted(self, task: int | None) -> Iterator[None]:
        with ExitStack() as hooks:
            for layer in self.lora:
                linear = self.foundation.linear(layer.block, layer.target)
                hooks.enter_context(linear.register_forward_hook(_add_low_rank(*layer.factors(task))))
            yield


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

    def factors(self, task: int | None = None) -> tuple[Tensor, Tensor]:
        """A (R, in_features) and B (out_features, R) of a task, or of all tasks together, scaled by their shares."""
        if task is None:
            down = torch.cat([factor * share for factor, share in zip(self.down, self.share, strict=True)])
            up = torch.cat(list(self.up), 1)
        else:
            down, up = self.down[task], self.up[task]
        return down, F.pad(up, (0, 0, *self.padding))


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
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Classification:
        return self.net(images, prefix, self.task)


def _add_low_rank(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(inputs[0], down), up)

    return hook
