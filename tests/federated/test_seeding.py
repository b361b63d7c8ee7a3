import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.federated.client import Client
from fedlscl.federated.pool import Turn, seed_turn


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


@given(st.integers(0, 2**32), st.lists(st.integers(0, 1000), max_size=5), st.lists(st.integers(0, 9), max_size=5))
def test_a_turn_draws_the_same_numbers_whatever_happened_before(seed, place, elsewhere):
    seed_turn(seed, *place)
    expected = draws()
    seed_turn(seed + 1, *elsewhere)
    draws()
    seed_turn(seed, *place)
    assert draws() == expected


def test_no_two_turns_of_a_run_draw_the_same_numbers():
    places = [(Turn.BUILD,)]
    for task in range(3):
        for round_ in range(3):
            places.append((Turn.SERVER, task, round_))
            for client in range(3):
                for kind in (Turn.BEGIN, Turn.TRAIN, Turn.UPLOAD, Turn.DOWNLOAD, Turn.END):
                    places += [(kind, task, round_, client, number) for number in range(2 if kind == Turn.TRAIN else 1)]
    seen = set()
    for seed in (42, 1999, 2024):
        for place in places:
            seed_turn(seed, *place)
            seen.add(draws())
    assert len(seen) == 3 * len(places)
    assert all(len({numbers[kind] for numbers in seen}) == len(seen) for kind in (0, 1))


def test_a_loader_gets_a_generator_of_its_own():
    class Stream:
        def loader(self, *given, generator, **options):
            return generator

    def new_generator():
        return Client(id=0, net=None, data=Stream(), engine=None).loader([], 1)

    def orders(warm_up):
        seed_turn(42, 1)
        first, second = new_generator(), new_generator()
        for _ in range(warm_up):
            torch.rand(3)
        return [torch.randperm(20, generator=generator).tolist() for generator in (first, second)]

    assert orders(0) == orders(5)
    assert orders(0)[0] != orders(0)[1]
    seed_turn(42, 2)
    assert torch.randperm(20, generator=new_generator()).tolist() not in orders(0)
