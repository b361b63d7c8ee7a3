"""A small model's training step in torch's default memory format against channels_last."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fedlscl.nets.net import SmallModel

from .clock import side_by_side
from .literal import literal_path
from .machine import device, precisions

CASES = [("resnet18", 64, 32), ("resnet18", 224, 16), ("mobilenetv3_small_100", 64, 32)]
"""Name, side of the input in pixels, images per step."""


def cases() -> dict[str, Callable[[], list[dict]]]:
    """By small model and size, a row for each precision."""
    return {f"{name} {size}": partial(compare, name, size, batch) for name, size, batch in CASES}


def compare(name: str, size: int, batch: int) -> list[dict]:
    """Both formats in both precisions."""
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device())
    ours, default = (SmallModel(name, size).to(device()) for _ in range(2))
    calls = {("ours", precision): partial(train, ours, images, precision) for precision in precisions()}
    calls |= {("default", precision): partial(literally, default, images, precision) for precision in precisions()}
    timings = side_by_side(calls, 7)
    seconds = {key: timing.seconds for key, timing in timings.items()}
    return [
        {
            "small_model": name, "small_size": size, "precision": precision, "batch": batch,
            "default_images_per_second": batch / seconds["default", precision],
            "images_per_second": batch / seconds["ours", precision],
            "ratio": seconds["default", precision] / seconds["ours", precision],
            "others": max(timing.others for timing in timings.values()),
        }
        for precision in precisions()
    ]  # fmt: skip


def train(net: SmallModel, images: Tensor, precision: str) -> None:
    """Forward and backward."""
    with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
        loss = net(images).float().square().mean()
    loss.backward()
    net.zero_grad(set_to_none=True)


def literally(net: SmallModel, images: Tensor, precision: str) -> None:
    """The same in the default format."""
    with literal_path():
        train(net, images, precision)
