"""Stage 1 steps of several clients one after the other, and batched: one pass of the frozen ViT over all their images.

Each client's CNN, generator, head and Adam are its own. The sum of the clients' losses has the gradients of each, so
that both ways give the same steps up to rounding.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fedlscl.functional.objectives import cross_entropy
from fedlscl.nets.collaborator import Collaborator, CollaboratorConfig
from fedlscl.nets.vit import FoundationConfig, split_lora

from .clock import side_by_side
from .machine import DTYPES, device, precisions

CLIENTS = 5
CASES = [("deit_tiny_patch16_224", 4), ("deit_tiny_patch16_224", 32), ("vit_base_patch16_224", 8)]
"""ViT and images per client and step; all blocks adapted, ResNet-18 at 64 px."""


def cases() -> dict[str, Callable[[], list[dict]]]:
    """By ViT and batch, a row for each precision."""
    return {f"{vit} batch {batch}": partial(compare, vit, batch) for vit, batch in CASES}


def compare(vit: str, batch: int, small_model: str = "resnet18", repetitions: int = 5) -> list[dict]:
    """Seconds of a step of all clients, both ways, and the largest relative difference of their gradients."""
    rows = []
    for precision in precisions():
        clients = Clients(vit, batch, small_model, DTYPES[precision])
        apart, together = clients.gradients(clients.apart), clients.gradients(clients.together)
        difference = max(
            ((a - b).norm() / a.norm().clamp(min=1e-12)).item() for a, b in zip(apart, together, strict=True)
        )
        timings = side_by_side(
            {"apart": partial(clients.step, clients.apart), "together": partial(clients.step, clients.together)},
            repetitions,
        )
        seconds = {name: timing.seconds for name, timing in timings.items()}
        rows.append(
            {
                "vit": vit, "clients": CLIENTS, "batch": batch, "precision": precision, "device": device().type,
                "apart_ms": 1e3 * seconds["apart"], "together_ms": 1e3 * seconds["together"],
                "ratio": seconds["apart"] / seconds["together"], "gradient_difference": difference,
                "others": max(timing.others for timing in timings.values()),
            }
        )  # fmt: skip
    return rows


class Clients:
    """Collaborators on one frozen ViT, and a batch for each, in device memory."""

    def __init__(self, vit: str, batch: int, small_model: str, dtype: torch.dtype) -> None:
        config = CollaboratorConfig(
            foundation=FoundationConfig(name=vit, weights="random"), small_model=small_model, small_image_size=64
        )
        torch.manual_seed(0)
        self.nets = [Collaborator(config, 10).to(device()).train() for _ in range(CLIENTS)]
        for net in self.nets:
            torch.nn.init.normal_(net.generator.bias, std=0.02)
        self.images = [torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, device=device()) for _ in self.nets]
        self.labels = [torch.randint(0, 10, (batch,), device=device()) for _ in self.nets]
        with torch.no_grad():
            self.prefixes = [net.frozen_prefix(images) for net, images in zip(self.nets, self.images, strict=True)]
        self.dtype = dtype
        self.optimizers = [torch.optim.Adam(net.parameters(), lr=0.0, fused=True) for net in self.nets]

    def apart(self) -> None:
        """Backpropagate each client's loss after its own pass."""
        for net, images, labels, prefix in zip(self.nets, self.images, self.labels, self.prefixes, strict=True):
            with torch.autocast(device().type, self.dtype, enabled=self.dtype != torch.float32):
                loss = cross_entropy(net(images, prefix).logits, labels)
            loss.backward()

    def together(self) -> None:
        """Backpropagate the sum of the losses after one pass of the ViT."""
        first = self.nets[0]
        with torch.autocast(device().type, self.dtype, enabled=self.dtype != torch.float32):
            lora = torch.cat([net.generate(images)[1] for net, images in zip(self.nets, self.images, strict=True)])
            scale = first.config.alpha / first.config.rank
            updates = dict(zip(first.adapted, split_lora(lora, first.shapes, scale), strict=True))
            tokens = first.foundation.features(torch.cat(self.prefixes), first.entry, updates)
            parts = tokens.split([len(labels) for labels in self.labels])
            losses = [
                cross_entropy(net.head(part), labels)
                for net, part, labels in zip(self.nets, parts, self.labels, strict=True)
            ]
        torch.stack(losses).sum().backward()

    def step(self, backward: Callable[[], None]) -> None:
        """One step of all clients."""
        backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def gradients(self, backward: Callable[[], None]) -> list[Tensor]:
        """Of all clients' generators and heads; batch statistics of the CNN's BatchNorm are the client's own."""
        backward()
        found = [
            p.grad.clone()
            for net in self.nets
            for part in (net.generator, net.head)
            for p in part.parameters()
            if p.grad is not None
        ]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return found
