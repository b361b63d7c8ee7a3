"""One seed for every turn of the federation, so that no state of a random generator ever has to be saved."""

import random
from enum import IntEnum

import numpy as np
import torch


class Turn(IntEnum):
    """Kinds of turn, part of every seed."""

    BUILD = 0
    BEGIN = 1
    TRAIN = 2
    UPLOAD = 3
    SERVER = 4
    DOWNLOAD = 5
    END = 6
    SERVER_TRAIN = 7
    ATTENDANCE = 8


def seed_turn(seed: int, *place: int) -> None:
    """Seed Python, NumPy and torch for one place (task, round, client, ...) of the run.

    Whatever happened elsewhere changes nothing here: a resumed run, another order of clients and a networked run draw
    the same numbers.
    """
    state = np.random.SeedSequence([seed, *place]).generate_state(4, np.uint32)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))


def turn_generator() -> torch.Generator:
    """A generator of its own for a data loader, drawn from the turn's seed."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
