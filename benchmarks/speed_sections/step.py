"""Whole Stage 1 steps of Fed-LSCL: CNN, generator, ViT, head, Adam; and the loop around them."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from lightning.fabric import Fabric
from torch.utils.flop_counter import FlopCounterMode

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.engine import Engine, PrefixCache
from fedlscl.federated.method import Stage
from fedlscl.modules import CollaborativeModule
from fedlscl.nets.collaborator import Collaborator, CollaboratorConfig
from fedlscl.nets.vit import FoundationConfig

from .clock import side_by_side
from .literal import literal_path
from .machine import SIZES, device, precisions, product

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
CASES = [
    ("deit_tiny_patch16_224", 3, 224, 32),
    ("deit_tiny_patch16_224", 3, 64, 32),
    ("deit_tiny_patch16_224", 9, 64, 32),
    ("vit_base_patch16_224", 3, 224, 8),
]
"""ViT, adapted block, side of the CNN's input in pixels, images per step."""
STEPS = 2


def cases() -> dict[str, Callable[[], list[dict]]]:
    """By ViT, block and size of the CNN's input, a row for each precision."""
    return {
        f"{vit} block {block} CNN {side}": partial(compare, vit, block, side, batch)
        for vit, block, side, batch in CASES
    }


def compare(vit: str, block: int, small_size: int, batch: int) -> list[dict]:
    """ResNet-18 beside the ViT, two steps through the engine, tokens in the cache.

    Beside it a plain loop over the same net, and the floor: counted operations at the rate of a square product.
    """
    paths = {
        (path, precision): Case(vit, block, small_size, batch, precision, path == "literal")
        for precision in precisions()
        for path in ("ours", "literal")
    }
    calls = {key: case.by_engine for key, case in paths.items()}
    calls |= {("plain", precision): paths["ours", precision].by_hand for precision in precisions()}
    side = SIZES[device().type]
    calls |= {("product", precision): product(precision, side) for precision in precisions()}
    timings = side_by_side(calls, 5, 1)
    seconds = {key: timing.seconds / STEPS for key, timing in timings.items()}
    rates = {precision: 2 * side**3 / timings["product", precision].seconds for precision in precisions()}
    flops = {precision: paths["ours", precision].flops() / batch for precision in precisions()}
    return [
        {
            "vit": vit, "block": block, "small_model": "resnet18", "small_size": small_size, "batch": batch,
            "precision": precision, "device": device().type,
            "literal_images_per_second": batch / seconds["literal", precision],
            "images_per_second": batch / seconds["ours", precision],
            "ratio": seconds["literal", precision] / seconds["ours", precision],
            "ratio_to_literal_fp32": seconds["literal", "fp32"] / seconds["ours", precision],
            "plain_images_per_second": batch / seconds["plain", precision],
            "gflop_per_image": flops[precision] / 1e9,
            "floor_images_per_second": rates[precision] / flops[precision],
            "share_of_product_rate": flops[precision] * batch / seconds["ours", precision] / rates[precision],
            "others": max(timing.others for timing in timings.values()),
        }
        for precision in precisions()
    ]  # fmt: skip


def loop_cases() -> dict[str, Callable[[], list[dict]]]:
    """By ViT, block and precision."""
    places = (
        ("deit_tiny_patch16_224", 9, "bf16"),
        ("deit_tiny_patch16_224", 3, "fp32"),
        ("deit_tiny_patch16_224", 9, "fp32"),
    )
    return {
        f"{vit} block {block} {precision}": partial(overhead, vit, block, precision)
        for vit, block, precision in places
        if precision in precisions()
    }


def overhead(vit: str, block: int, precision: str) -> list[dict]:
    """The engine against a plain loop over the same steps: loader, cache, Fabric, sums of terms."""
    case = Case(vit, block, 64, 32, precision, False, steps=6)
    timings = side_by_side({"engine": case.by_engine, "plain": case.by_hand}, 9, 2)
    engine, plain = (timings[name].seconds / 6 for name in ("engine", "plain"))
    return [
        {
            "vit": vit, "block": block, "precision": precision, "batch": 32, "device": device().type,
            "engine_ms_per_step": 1e3 * engine, "plain_ms_per_step": 1e3 * plain,
            "overhead": engine / plain - 1, "others": max(timing.others for timing in timings.values()),
        }
    ]  # fmt: skip


class Case:
    """A collaborator and its batches; the ViT has random weights, its size is what counts."""

    def __init__(
        self, vit: str, block: int, small_size: int, batch: int, precision: str, is_literal: bool, steps: int = STEPS
    ) -> None:
        self.is_literal, self.batch, self.steps = is_literal, batch, steps
        self.data = SpatialTemporalDataModule(
            dataset="fake", fake_classes=2, num_clients=1, num_tasks=1, private_classes=2, public_classes=0,
            train_per_class=steps * batch // 2, test_per_class=1, image_size=small_size, batch_size=batch,
        )  # fmt: skip
        self.fabric = Fabric(accelerator=device().type, devices=1, precision=PRECISIONS[precision])
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.cache = PrefixCache(self.data, 0 if is_literal else 8 * 2**30, dtype)
        self.engine = Engine(self.fabric, self.cache)
        torch.manual_seed(0)
        config = CollaboratorConfig(
            foundation=FoundationConfig(name=vit, weights="random"), small_image_size=small_size,
            blocks=(block,),
        )  # fmt: skip
        self.net = Collaborator(config, 2)
        self.module = CollaborativeModule(self.net, freeze_norm=True)
        stream = self.data.stream(0)
        self.ids = stream.train_ids(0)
        self.loader = stream.loader(self.ids, batch, True, torch.Generator().manual_seed(0))

    def by_engine(self) -> None:
        """One epoch, as the trainer runs it."""
        with literal_path() if self.is_literal else nullcontext():
            self.engine.train(Stage("collaborative", self.module, self.loader, 1))

    def by_hand(self) -> None:
        """What one would write in a notebook with the same net: tensors, autocast, Adam."""
        net, module = self.net.to(device()), self.module
        optimizer = module.configure_optimizers()
        module.train()
        store = next(iter(self.cache.stores.values())).values
        data = self.data.data
        for ids in self.ids[torch.randperm(len(self.ids))].split(self.batch):
            images, labels = data.train_images[ids].to(device()), data.train_labels[ids].to(device())
            tokens = store[self.cache.row[ids].to(store.device)].to(device())
            with self.fabric.autocast():
                loss = torch.nn.functional.cross_entropy(net(images, tokens).logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def flops(self) -> float:
        """Of matrix products and convolutions in one step of the plain loop, forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self.by_hand()
        return counter.get_total_flops() / self.steps
