"""The ViT's part of a Stage 1 step, forward and backward, at 224 px with a warm cache."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedlscl.nets.vit import Foundation, FoundationConfig, LowRankShape, foundation, split_lora

from .clock import side_by_side
from .literal import literal_path
from .machine import DTYPES, SIZES, device, precisions, product

MODELS = {"deit_tiny_patch16_224": (32, 9), "vit_base_patch16_224": (8, 5)}
"""Images per step and repetitions on a CPU; a GPU gets batches of 64."""
BLOCKS = (3, 9)
RANK = 4


def cases() -> dict[str, Callable[[], list[dict]]]:
    """By model and block, a row for each precision."""
    return {
        f"{name} block {block}": partial(compare, name, block, batch, repetitions)
        for name, (batch, repetitions) in MODELS.items()
        for block in BLOCKS
    }


def compare(name: str, block: int, batch: int, repetitions: int) -> list[dict]:
    """Both paths in both precisions, beside products of matrices in both."""
    batch = 64 if device().type == "cuda" else batch
    model = foundation(FoundationConfig(name=name, weights="random")).to(device())
    steps = {
        (path, precision): Step(model, block, batch, precision, path)
        for precision in precisions()
        for path in ("literal", "ours")
    }
    flops = {key: step.flops() for key, step in steps.items()}
    size = SIZES[device().type]
    products = {("product", precision): product(precision, size) for precision in precisions()}
    timings = side_by_side({**steps, **products}, repetitions)
    seconds = {key: timing.seconds for key, timing in timings.items()}
    return [
        {
            "model": model.config.name, "block": block, "precision": precision, "batch": batch,
            "device": device().type,
            "literal_images_per_second": batch / seconds["literal", precision],
            "images_per_second": batch / seconds["ours", precision],
            "ratio": seconds["literal", precision] / seconds["ours", precision],
            "ratio_to_literal_fp32": seconds["literal", "fp32"] / seconds["ours", precision],
            "gflop_per_image": flops["ours", precision] / batch / 1e9,
            "literal_gflop_per_image": flops["literal", precision] / batch / 1e9,
            "product_gflops": 2 * size**3 / seconds["product", precision] / 1e9,
            "share_of_product_rate": flops["ours", precision] / seconds["ours", precision]
            / (2 * size**3 / seconds["product", precision]),
            "literal_share": flops["literal", precision] / seconds["literal", precision]
            / (2 * size**3 / seconds["product", precision]),
            "others": max(timing.others for timing in timings.values()),
        }
        for precision in precisions()
    ]  # fmt: skip


class Step:
    """One forward and backward pass from images (literal) or cached tokens (ours) to the generated LoRA weights."""

    def __init__(self, model: Foundation, block: int, batch: int, precision: str, path: str) -> None:
        self.model, self.block, self.path, self.precision = model, block, path, precision
        layer = model.linear(block, "attn.qkv")
        self.shapes = [LowRankShape(layer.in_features, layer.out_features, RANK)]
        generator = torch.Generator().manual_seed(0)
        size = model.image_size
        self.images = torch.randn(batch, 3, size, size, generator=generator).to(device())
        self.lora = (0.1 * torch.randn(batch, self.shapes[0].size, generator=generator)).to(device()).requires_grad_()
        with self.autocast():
            self.tokens = model.tokens(self.images, block).to(DTYPES[precision])

    def autocast(self) -> torch.autocast:
        """As Fabric's bf16-mixed does it."""
        return torch.autocast(device().type, torch.bfloat16, enabled=self.precision == "bf16")

    def forward(self) -> Tensor:
        """Features (B, width)."""
        updates = {(self.block, "attn.qkv"): split_lora(self.lora, self.shapes, 1.0)[0]}
        if self.path == "ours":
            return self.model.features(self.tokens, self.block, updates)
        with literal_path():
            return self.model.features(self.model.tokens(self.images, self.block), self.block, updates)

    def __call__(self) -> None:
        """The timed work."""
        with self.autocast():
            loss = self.forward().float().square().sum()
        loss.backward()
        self.lora.grad = None

    def flops(self) -> int:
        """Of matrix products, forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()
