import numpy as np

from fedlscl.callbacks.progress import Workload


def turn(work, client, task, round_, *stages):
    work.begin_turn(client, task, round_)
    for batches in stages:
        work.add_stage(batches)
        for _ in range(batches):
            work.add_batch()
    work.end_turn()


def test_everything_is_known_when_stages_are_as_expected():
    work = Workload(np.array([[4.0, 2.0], [3.0, 5.0]]), rounds=2)
    assert work.remaining == 2 * (4 + 2 + 3 + 5 + 4)  # a turn counts as one more
    for task, lengths in enumerate([(4, 3), (2, 5)]):
        for round_ in range(2):
            for client, batches in enumerate(lengths):
                turn(work, client, task, round_, batches)
    assert (work.remaining, work.fraction, work.done) == (0, 1, 36)


def test_a_second_stage_is_expected_of_those_who_have_not_shown_theirs():
    work = Workload(np.array([[9.0, 9.0], [9.0, 9.0]]), rounds=1)
    turn(work, 0, 0, 0, 9, 10)  # 20 units where 10 were expected
    assert work.remaining == 3 * 20
    work.begin_turn(client=1, task=0, round_=0)
    work.add_stage(9)
    assert work.remaining == 3 * 20  # the known stage is part of the estimate
    work.add_stage(20)
    assert work.remaining == 30 + 2 * 20


def test_batches_count_down_and_shares_up():
    work = Workload(np.array([[3.0]]), rounds=2)
    work.begin_turn(client=0, task=0, round_=0)
    work.add_stage(3)
    before = work.remaining
    work.add_batch()
    assert work.remaining == before - 1
    assert work.fraction == 1 / 8


def test_a_resumed_run_has_its_earlier_turns_behind_it():
    work = Workload(np.ones((2, 4)), rounds=2, task=3, round_=1)
    assert work.fraction == 14 / 16
    assert work.remaining == 2 * 2


def test_a_complete_run_has_nothing_left():
    work = Workload(np.ones((2, 4)), rounds=2, task=4)
    assert (work.remaining, work.fraction) == (0, 1)
