"""Options of a run in its forecast; that every method's bytes are foreseen is tested in tests/contract."""

import pytest

from fedlscl.callbacks.progress import forecast
from fedlscl.federated.trainer import FederatedTrainer


def trainer(rounds, **options):
    return FederatedTrainer(rounds_per_task=rounds, accelerator="cpu", **options)


@pytest.mark.parametrize("options", [{"server_every": "task"}, {"max_tasks": 1}, {"cache_gb": 0.0}])
def test_options_of_the_run_count(options, make_data, make_method):
    planned, data = trainer(4, **options), make_data()
    planned.setup(make_method(), data, 42)
    run = trainer(4, **options)
    run.fit(make_method(), make_data())
    assert forecast(planned, make_method(), data).up == pytest.approx(int(run.run.traffic["up"].sum()), rel=0.02)


def test_secure_sums_are_foreseen_though_their_first_message_is_small(make_data, make_method):
    method = make_method()
    method.secure_sum = True
    planned, data = trainer(4), make_data()
    planned.setup(method, data, 42)
    run = trainer(4)
    run.fit(method, make_data())
    assert forecast(planned, method, data).up == pytest.approx(int(run.run.traffic["up"].sum()), rel=0.1)


def test_the_run_itself_is_left_alone(make_data, make_method):
    """Its clients, its data and its method are after a forecast what they were before it."""
    method, data, untouched, disturbed = make_method(), make_data(), trainer(1), trainer(1)
    untouched.fit(make_method(), make_data())
    disturbed.setup(method, data, 42)
    splits = data.splits
    forecast(disturbed, method, data)
    assert data.splits is splits and len(disturbed.clients) == data.num_clients == 2
    assert not disturbed.run.history and not disturbed.run.traffic["up"].any()
    disturbed.fit(method, data)
    assert disturbed.matrix.values.nan_to_num().equal(untouched.matrix.values.nan_to_num())


def test_more_rounds_take_longer(make_data, make_method):
    seconds = []
    for rounds in (3, 60):
        planned, data = trainer(rounds), make_data()
        planned.setup(make_method(), data, 42)
        seconds.append(forecast(planned, make_method(), data).seconds)
    assert seconds[1] > 4 * seconds[0]
