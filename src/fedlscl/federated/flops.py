"""Floating-point operations of matrix products and convolutions, counted after every task: what trains may change."""

from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedlscl.nets.net import Net

if TYPE_CHECKING:
    from fedlscl.federated.engine import Engine
    from fedlscl.federated.trainer import FederatedTrainer

SIDE = 32
"""Pixels of the stored image that is counted with; every net resizes for itself."""


class Flops(NamedTuple):
    """Per image; two for each multiplication with addition, pointwise work not counted."""

    frozen: int
    """The frozen part, whose output is cached."""
    inference: int
    """The rest of a forward pass."""
    training: int
    """The rest of a forward pass and its gradient; what an objective adds (teachers, penalties) is not counted."""


COUNTED: "WeakKeyDictionary[Engine, dict[tuple[str, int, int], Flops]]" = WeakKeyDictionary()
"""What was counted in a run, whose engine lives as long: results are written more often than nets change."""


def flops_by_client(trainer: "FederatedTrainer") -> dict[str, list[int]]:
    """`Flops` of every client by name, counted once a task.

    Nets with equally many parameters of one type count as one architecture.
    """
    found = COUNTED.setdefault(trainer.engine, {})
    rows = []
    for client in trainer.clients:
        key = type(client.net).__name__, sum(p.numel() for p in client.net.parameters()), client.task
        if key not in found:
            with trainer.engine.on_device(client):
                found[key] = flops_per_image(client.net)
        rows.append(found[key])
    return {name: list(values) for name, values in zip(Flops._fields, zip(*rows, strict=True), strict=True)}


def flops_per_image(net: Net) -> Flops:
    """Count one image's passes in evaluation mode; net, gradients and random numbers stay as they are."""
    mode = net.training
    with torch.random.fork_rng():
        counted = _count(net.eval())
    net.train(mode)
    return counted


def _count(net: Net) -> Flops:
    parameters = [p for p in net.parameters() if p.requires_grad]
    device = next(iter(net.state_dict().values())).device
    images = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    prefix, counts = None, [0]
    with torch.no_grad():
        if net.prefix_key is not None:
            with FlopCounterMode(display=False) as counter:
                prefix = net.frozen_prefix(images)
            counts = [counter.get_total_flops()]
        with FlopCounterMode(display=False) as counter:
            net(images, prefix)
        counts.append(counter.get_total_flops())
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        logits = net(images, prefix).trained
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    return Flops(*counts, counter.get_total_flops())
