"""Bytes and numbers sent, by client, task and round."""

import torch
from torch import Tensor

from fedlscl.federated.method import Progress
from fedlscl.federated.payload import Payload, num_bytes

Traffic = dict[str, Tensor]
"""``up`` and ``down`` in bytes, ``up_values`` and ``down_values`` in numbers, (clients, tasks, rounds) each."""


def no_traffic(num_clients: int, num_tasks: int, rounds_per_task: int) -> Traffic:
    """Of a run that has not begun."""
    shape = (num_clients, num_tasks, rounds_per_task)
    return {name: torch.zeros(shape, dtype=torch.int64) for name in ("up", "down", "up_values", "down_values")}


def count(traffic: Traffic, direction: str, client: int, progress: Progress, payload: Payload) -> None:
    """Enter one message, 'up' or 'down'."""
    place = client, *progress
    traffic[direction][place] = num_bytes(payload)
    traffic[f"{direction}_values"][place] = sum(value.numel() for value in payload.values())
