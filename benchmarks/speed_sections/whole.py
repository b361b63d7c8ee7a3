"""A whole run of Fed-LSCL: two clients, two tasks, two rounds, both stages, server and evaluation."""

import time
from collections.abc import Callable
from functools import partial

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.methods import FedLSCL
from fedlscl.nets.collaborator import CollaboratorConfig
from fedlscl.nets.vit import FoundationConfig

from .clock import machine_seconds, own_seconds
from .literal import literal_path
from .machine import device, precisions
from .step import PRECISIONS


def cases() -> dict[str, Callable[[], list[dict]]]:
    """By adapted block, a row for each precision."""
    return {f"block {block}": partial(compare, block) for block in (3, 9)}


def compare(block: int) -> list[dict]:
    """Seconds of the literal path and of ours, a cold cache included; one run each."""
    run(False, precisions()[0], train_per_class=8)  # imports, first kernels, memory
    runs = {(path, p): run(path == "literal", p, block) for p in precisions() for path in ("literal", "ours")}
    seconds = {key: value for key, (value, _) in runs.items()}
    return [
        {
            "vit": "deit_tiny_patch16_224", "block": block, "small_model": "resnet18", "small_size": 64,
            "precision": precision, "device": device().type,
            "literal_seconds": seconds["literal", precision], "seconds": seconds["ours", precision],
            "ratio": seconds["literal", precision] / seconds["ours", precision],
            "ratio_to_literal_fp32": seconds["literal", "fp32"] / seconds["ours", precision],
            "others": max(others for _, others in runs.values()),
        }
        for precision in precisions()
    ]  # fmt: skip


def run(is_literal: bool, precision: str, block: int = 3, train_per_class: int = 16) -> tuple[float, float]:
    """Seconds of a run, and the share of the machine that others took."""
    data = SpatialTemporalDataModule(
        dataset="fake", fake_classes=8, num_clients=2, num_tasks=2, private_classes=4, public_classes=0,
        train_per_class=train_per_class, test_per_class=8, image_size=32,
    )  # fmt: skip
    shape = CollaboratorConfig(
        foundation=FoundationConfig(name="deit_tiny_patch16_224", weights="random"),
        small_image_size=64,
        blocks=(block,),
    )
    method = FedLSCL(collaborator=shape, local_epochs=2)
    trainer = FederatedTrainer(
        rounds_per_task=2, precision=PRECISIONS[precision], cache_gb=0 if is_literal else 4, accelerator=device().type
    )
    busy, own, began = machine_seconds(), own_seconds(), time.perf_counter()
    if is_literal:
        with literal_path():
            trainer.fit(method, data)
    else:
        trainer.fit(method, data)
    seconds = time.perf_counter() - began
    foreign = machine_seconds() - busy - (own_seconds() - own)
    return seconds, max(0.0, foreign) / seconds / 2
