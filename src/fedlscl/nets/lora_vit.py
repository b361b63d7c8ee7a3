"""A frozen ViT with trainable LoRA modules (Hu et al., ICLR 2022, arXiv 2106.09685), one for each task."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl.nets.net import Classification
from fedlscl.nets.vit import Foundation, FoundationConfig, FrozenViTNet, foundation, run_block

QKV = "attn.qkv"
THIRDS = {"attn.q": 0, "attn.k": 1, "attn.v": 2}
"""Targets that are a part of attn.qkv, by their place in it."""


class LoraLayer(nn.Module):
    """The modules of all tasks for one linear layer of one block: what task t adds is ``up[t] @ down[t]``.

    Reading factors start Kaiming-uniform (a = sqrt 5), writing ones as zeros, so that nothing is added at the start.
    """

    share: Tensor

    def __init__(self, model: Foundation, block: int, target: str, rank: int, num_tasks: int) -> None:
        super().__init__()
        self.block, self.target = block, QKV if target in THIRDS else target
        layer = model.linear(block, self.target)
        out = layer.out_features // 3 if target in THIRDS else layer.out_features
        start = THIRDS.get(target, 0) * out
        self.padding = start, layer.out_features - start - out
        self.down = nn.ParameterList([torch.empty(rank, layer.in_features) for _ in range(num_tasks)])
        self.up = nn.ParameterList([torch.zeros(out, rank) for _ in range(num_tasks)])
        for factor in self.down:
            nn.init.kaiming_uniform_(factor, a=5**0.5)
        self.register_buffer("share", torch.ones(num_tasks, layer.in_features))

    def factors(self, task: int | None = None) -> tuple[Tensor, Tensor]:
        """Reading (R, in_features) and writing factor (out_features, R) of a task, or of all tasks by their shares."""
        if task is None:
            down = torch.cat([factor * share for factor, share in zip(self.down, self.share, strict=True)])
            up = torch.cat(list(self.up), 1)
        else:
            down, up = self.down[task], self.up[task]
        return down, F.pad(up, (0, 0, *self.padding))


class LoraViT(FrozenViTNet):
    """A frozen ViT, LoRA modules on linear layers of some blocks, and a trainable head.

    It predicts with the sum of all tasks' modules, each input feature of each weighted by ``LoraLayer.share`` (one at
    the start); a module that was never trained adds nothing. ``only`` gives one task's module alone.

    Args:
        config: the frozen ViT.
        head: features (B, width) to logits; has ``weight`` with one row per class.
        rank: of every module.
        blocks: counted from 0; all where not given.
        targets: linear layers of a block, such as attn.qkv or mlp.fc1; attn.q, attn.k, attn.v are parts of attn.qkv.
        num_tasks: modules per layer.
    """

    def __init__(
        self,
        config: FoundationConfig,
        head: nn.Module,
        *,
        rank: int,
        blocks: Sequence[int] | None = None,
        targets: Sequence[str] = (QKV,),
        num_tasks: int = 1,
    ) -> None:
        super().__init__(foundation(config))
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}.")
        places = range(self.foundation.depth) if blocks is None else sorted(blocks)
        self.lora: Any = nn.ModuleList(
            [LoraLayer(self.foundation, block, target, rank, num_tasks) for block in places for target in targets]
        )
        self.entry = places[0]
        self.head = head

    def forward(self, images: Tensor, prefix: Tensor | None = None, task: int | None = None) -> Classification:
        """Classify stored images (B, 3, h, w) with all tasks' modules, or with that of ``task`` alone."""
        self.foundation.to(images.device)
        tokens = self.frozen_prefix(images) if prefix is None else prefix.float()
        with self._adapted(task):
            features = self._features(tokens)
        return Classification(features, self.head(features))

    def only(self, task: int) -> "OneTask":
        """A view of this net with the module of ``task`` alone."""
        return OneTask(self, task)

    def set_trainable(self, task: int, factors: Collection[str] = ("down", "up")) -> None:
        """Train these factors of one task's modules, and no others."""
        for layer in self.lora:
            for kind in ("down", "up"):
                for number, factor in enumerate(getattr(layer, kind)):
                    factor.requires_grad_(number == task and kind in factors)

    def _features(self, tokens: Tensor) -> Tensor:
        vit, last = self.foundation.vit, self.foundation.depth - 1
        if all(layer.block < last for layer in self.lora):
            return self.foundation.features(tokens, self.entry)
        # The short cut of Foundation.features would pass by a hook on the last block's attn.qkv.
        for block in vit.blocks[self.entry :]:
            tokens = run_block(block, tokens)
        return vit.forward_head(vit.norm(tokens))

    @contextmanager
    def _adapted(self, task: int | None) -> Iterator[None]:
        hooks = [
            self.foundation.linear(layer.block, layer.target).register_forward_hook(_adding(*layer.factors(task)))
            for layer in self.lora
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class OneTask(FrozenViTNet):
    """A LoraViT that computes with one task's module alone; it shares all weights with it."""

    def __init__(self, net: LoraViT, task: int) -> None:
        super().__init__(net.foundation, net.entry)
        self.net, self.task = net, task

    @property
    def head(self) -> nn.Module:
        """The head of the whole net."""
        return self.net.head

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Classification:
        """Classify stored images (B, 3, h, w)."""
        return self.net(images, prefix, self.task)


def _adding(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(inputs[0], down), up)

    return hook
