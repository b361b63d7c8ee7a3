"""Times of several computations side by side, on a machine that may not be ours alone."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

STAT = Path("/proc/stat")
DISTURBED = 0.05
"""Share of the machine's processors that other processes may take during a repetition; beyond it is done again."""
PATIENCE = 30.0
"""Seconds that may go to repeating disturbed repetitions."""


class Timing(NamedTuple):
    """Repetitions of one computation."""

    seconds: float
    """Median."""
    fastest: float
    slowest: float
    others: float
    """Largest share of the machine that other processes took during a repetition that counts."""


def side_by_side(calls: dict[str, Callable[[], object]], repetitions: int = 7, warm_up: int = 2) -> dict[str, Timing]:
    """Time each call, one repetition of all after the other, so that drifts of the machine meet all of them alike.

    A repetition that other processes disturbed is repeated; when they never rest, the least disturbed ones count.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            found[name].append(lap(call))
    deadline = time.perf_counter() + PATIENCE
    while time.perf_counter() < deadline:
        pending = [name for name, laps in found.items() if sum(o <= DISTURBED for o, _ in laps) < repetitions]
        if not pending:
            break
        for name in pending:
            found[name].append(lap(calls[name]))
    return {name: timing(sorted(laps)[:repetitions]) for name, laps in found.items()}


def timing(laps: list[tuple[float, float]]) -> Timing:
    """Summary of (others' share, seconds)."""
    seconds = [second for _, second in laps]
    return Timing(median(seconds), min(seconds), max(seconds), max(other for other, _ in laps))


def lap(call: Callable[[], object]) -> tuple[float, float]:
    """Others' share of the machine's processors during one call, and its seconds."""
    synchronize()
    busy, own, began = machine_seconds(), own_seconds(), time.perf_counter()
    call()
    synchronize()
    seconds = time.perf_counter() - began
    foreign = machine_seconds() - busy - (own_seconds() - own)
    # The kernel counts in hundredths of a second: below that a share means nothing.
    tick = 2 / os.sysconf("SC_CLK_TCK")
    return max(0.0, foreign - tick) / (seconds * (os.cpu_count() or 1)), seconds


def synchronize() -> None:
    """Wait for the GPU, where one is at work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def machine_seconds() -> float:
    """Processor seconds of all processes so far, stolen ones included; 0 where the system does not tell."""
    if not STAT.is_file():
        return 0.0
    user, nice, system, _, _, irq, soft, steal = map(int, STAT.read_text().split(None, 9)[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor seconds of this process and of its children so far."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
