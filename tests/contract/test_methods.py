"""What every method promises, run for each public one on two tasks of fake data."""

import re
from dataclasses import replace

import pytest

import fedlscl.methods
from fedlscl import testing as contract
from fedlscl.callbacks.progress import forecast
from fedlscl.testing import Recorded, fake_data
from tiny_methods import METHODS, MOSTLY_SLOW


@pytest.mark.parametrize("name", fedlscl.methods.__all__)
def test_every_public_method_states_its_own_card(name):
    card = vars(getattr(fedlscl.methods, name))["card"]
    assert card.venue and card.trains and card.uploads
    assert re.fullmatch(r"(\d{4}\.\d{5})?", card.arxiv)
    assert bool(card.arxiv) == (card.venue not in ("baseline", "all data (centralised)"))


@pytest.fixture(scope="module")
def run(request):
    """A finished run."""
    return contract.learn(METHODS[request.param]())


all_methods = pytest.mark.parametrize("run", fedlscl.methods.__all__, indirect=True)
mostly_slow = pytest.mark.parametrize("run", MOSTLY_SLOW, indirect=True)
COSTLY = (contract.check_determinism, contract.check_offloading)
"""They train again. That runs resume is tested with killed processes, in tests/test_resume.py."""


@all_methods
@pytest.mark.parametrize("check", [check for check in contract.CHECKS if check not in (*COSTLY, contract.check_resume)])
def test_check(check, run):
    check(run, METHODS[type(run.method).__name__])


@mostly_slow
@pytest.mark.parametrize("check", COSTLY)
def test_costly_check(check, run):
    check(run, METHODS[type(run.method).__name__])


@all_methods
def test_messages_are_counted(run):
    assert len(run.uploads) == 2 * 2 * 2 and len(run.answers) == 2 * 2


DEPENDS_ON_OTHERS = ("FedBE", "FedWeIT")
"""What the server sends to one of their clients depends on how many there are."""


@mostly_slow
def test_bytes_are_foreseen(run):
    name = type(run.method).__name__
    if name in ("FedMGP", "GLFC", "FedDualP", "FedL2P", "MFCL"):
        pytest.skip("its rehearsal takes as long as its run")
    method, planned, data = METHODS[name](), Recorded(), fake_data()
    planned.setup(method, data, 42)
    expected = forecast(planned, method, data)
    tolerance = 0.5 if name in DEPENDS_ON_OTHERS else 0.1
    for way, foreseen in (("up", expected.up), ("down", expected.down)):
        assert foreseen == pytest.approx(int(run.run.traffic[way].sum()), rel=tolerance), way
    assert 0 < expected.seconds < 600


@all_methods
def test_it_learns(run):
    """Fake data are easy: after the last task, on that task's classes, better than a coin for the mean client."""
    assert run.matrix.of("task_il")[:, 1, 1].mean() > 0.5


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_batches_of_one_train(name):
    """Batches of two over three samples, and of one, with last feature maps of 1 x 1."""
    data = fake_data(private_classes=2, public_classes=0, train_per_class=3)
    for batch_size in (1, 2):
        method = METHODS[name]()
        if not hasattr(method, "batch_size"):
            pytest.skip("trains nothing")
        trained = Recorded(rounds_per_task=1, max_norm_ratio=1e9)
        trained.fit(replace(method, batch_size=batch_size), data)
        assert {len(client.train_ids) for client in trained.clients} == {3}
        contract.check_finite(trained, METHODS[name])


CONTINUAL = {f"FedLSCL-{option}": option for option in ("ewc", "lwf", "none")}


@pytest.mark.parametrize("case", [*MOSTLY_SLOW, *(pytest.param(case, marks=pytest.mark.slow) for case in CONTINUAL)])
def test_bf16_runs_on_a_cpu(case):
    def make():
        return replace(METHODS["FedLSCL"](), continual=CONTINUAL[case]) if case in CONTINUAL else METHODS[case]()

    trained = contract.learn(make(), precision="bf16-mixed")
    contract.check_finite(trained, make)
    contract.check_upload_spec(trained, make)
