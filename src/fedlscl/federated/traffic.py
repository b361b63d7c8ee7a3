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


def extrapolated(traffic: Traffic, direction: str, rounds_done: int) -> float:
    """Bytes of a whole run whose first task has had so many rounds, the last of which stands for all after it.

    Example:
        >>> traffic = no_traffic(num_clients=1, num_tasks=2, rounds_per_task=3)
        >>> traffic["up"][0, 0] = torch.tensor([10, 4, 0])
        >>> extrapolated(traffic, "up", rounds_done=2)
        36.0
    """
    _, tasks, rounds = traffic[direction].shape
    by_round = traffic[direction][:, 0].sum(0)[:rounds_done].tolist()
    return float(tasks * (sum(by_round) + (rounds - rounds_done) * by_round[-1]))
