import functools
import json
import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import malformed
from absences import leave_out
from fedlscl import methods
from fedlscl.callbacks.results import Results
from fedlscl.callbacks.tensorboard import TensorBoard
from fedlscl.federated import validation
from fedlscl.federated.method import Progress, StreamShape
from fedlscl.federated.payload import Upload
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.federated.validation import RejectedUpload, UploadValidator
from fedlscl.testing import Recorded, Stop, Stopped, fake_data, learn, same_tensors
from tiny_methods import METHODS, SMALL, VIT

ORACLES = {"Joint", "JointLSCL"}
FAST = {
    "FedAvg": lambda: methods.FedAvg(foundation=VIT, local_epochs=1, batch_size=8),
    "FedLSCL": METHODS["FedLSCL"],
    "FedRidge": METHODS["FedRidge"],
    "LoRM": METHODS["LoRM"],
    "PILoRA": METHODS["PILoRA"],
}
FIRST = Progress(0, 0)


@pytest.fixture(scope="module")
def four(make_data):
    """Four clients."""
    return make_data(num_clients=4, fake_classes=16)


@pytest.fixture(scope="module", params=FAST)
def run(request, four):
    """A finished run of four clients, with all messages."""
    trainer = Recorded()
    trainer.fit(FAST[request.param](), deepcopy(four))
    assert trainer.run.validator.rejected == []
    return trainer


@pytest.mark.parametrize("kind", malformed.KINDS)
def test_malformed_uploads_are_refused_and_the_others_pass(kind, run):
    """Of any round, from any client, at any place."""
    picker = random.Random(kind)
    for _ in range(3):
        progress = Progress(picker.randrange(2), picker.randrange(2))
        uploads = [upload for upload in run.uploads if (upload.task, upload.round) == progress.position]
        place = picker.choice([n for n, upload in enumerate(uploads) if upload.payload] or [None])
        if place is None:
            continue
        bad = uploads[place]
        validator = UploadValidator(run.method, StreamShape(16, 4, 2))
        arrived = malformed.deliver(validator, bad, malformed.KINDS[kind](bad, picker), progress)
        admitted = validator.filter([*uploads[:place], *arrived, *uploads[place + 1 :]], progress)
        assert admitted == [*uploads[:place], *uploads[place + 1 :]]
        (refusal,) = validator.rejected
        assert (refusal.task, refusal.round) == progress.position and "cannot be checked" not in refusal.reason
        assert kind == "unknown_sender" or refusal.client == bad.client
        assert refusal.reason.isprintable() and len(refusal.reason) < 300


@pytest.fixture(scope="module")
def without_one(four):
    """A run that one client misses in the last round, without that client."""
    trainer = Recorded()
    leave_out(trainer, frozenset({(2, 1, 1)}))
    trainer.fit(FAST["FedAvg"](), deepcopy(four))
    trainer.clients.pop(2)
    assert trainer.run.validator.rejected == []
    return trainer


@pytest.mark.parametrize("kind", malformed.KINDS)
def test_a_round_ends_as_if_the_bad_client_had_failed(kind, four, without_one):
    """To the bit: answers, server, all other clients, and everything that is learned from there."""
    picker = random.Random(kind)
    tampered = Recorded(callbacks=[malformed.Tamper(2, 1, 1, lambda upload: malformed.KINDS[kind](upload, picker))])
    tampered.fit(FAST["FedAvg"](), deepcopy(four))
    assert len(tampered.run.validator.rejected) == 1
    tampered.clients.pop(2)
    same_tensors(tampered.states, without_one.states, "a run with a refused upload")
    assert [len(answers) for answers in tampered.answers] == [4, 4, 4, 3]
    norms = [trainer.run.validator.norms for trainer in (tampered, without_one)]
    assert norms[0] == norms[1]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - ORACLES))
def test_who_misses_a_whole_task_comes_back(name, federate):
    """No honest upload is refused, whoever was there when."""
    trainer = Recorded(rounds_per_task=1)
    leave_out(trainer, frozenset({(1, 0, 0)}))
    trainer.fit(METHODS[name](), fake_data())
    assert trainer.run.validator.rejected == []
    assert [len(answers) for answers in trainer.answers] == [1, 2]
    assert not trainer.matrix.of("class_il")[:, -1].isnan().any()


def test_heterogeneous_small_models_pass():
    options = {"small_models": ("test_resnet", "test_byobnet"), "shared_initialisation": False}
    run = learn(replace(METHODS["FedLSCL"](), **options))
    assert len({len(client.net.state_dict()) for client in run.clients}) == 2
    assert run.run.validator.rejected == []


def test_secure_sums_and_noise_pass():
    for options in ({"secure_sum": True}, {"secure_sum": True, "noise_multiplier": 1.0}):
        run = learn(replace(METHODS["FedLSCL"](), **options))
        assert run.run.validator.rejected == []


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [("FedAvg", "median"), ("FedBE", "trimmed_mean"), ("GLFC", "norm_clipped_mean"), ("MFCL", "median")],
)
def test_who_averages_may_do_so_robustly(name, aggregation):
    """What each rule does with what is sent is tested in tests/test_aggregation.py."""
    run = learn(replace(METHODS[name](), aggregation=aggregation), rounds_per_task=1)
    assert run.method.aggregation == aggregation and run.run.validator.rejected == []


@pytest.mark.parametrize("name", ["FedLSCL", "FedRidge", "FedWeIT", "Local", "LoRM", "PILoRA"])
def test_who_does_not_average_refuses_another_average(name):
    with pytest.raises(ValueError, match=f"aggregation must be mean for {name}"):
        replace(METHODS[name](), aggregation="median")


def test_a_method_that_says_nothing_of_its_upload_has_its_values_checked_alone():
    class Own(methods.FedAvg):
        def upload(self, client):
            return {**super().upload(client), "mine": torch.ones(client.id + 1)}

        def aggregate(self, uploads, progress):
            return [{n: v for n, v in upload.payload.items() if n != "mine"} for upload in uploads]

    run = learn(Own(**SMALL))
    assert run.run.validator.rejected == []
    bad = replace(run.uploads[0], payload={"mine": torch.tensor([float("nan")])})
    assert run.run.validator.filter([bad], FIRST) == []
    assert run.run.validator.rejected == [RejectedUpload(0, 0, 0, "'mine' is not finite")]


@pytest.fixture
def fedavg():
    return UploadValidator(FAST["FedAvg"](), StreamShape(6, 3))


@functools.cache
def built():
    torch.manual_seed(0)
    return FAST["FedAvg"]().build_net(0, StreamShape(6)).state_dict()


def honest(validator, client, scale=1.0):
    payload = {name: scale * value for name, value in built().items()}
    return Upload(client=client, task=0, round=0, payload=payload, class_counts=torch.full((6,), 3))


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_norm_out_of_all_proportion_is_refused_however_few_there_are(fedavg, others):
    """Between two clients, and for one alone, the net at its start decides."""
    uploads = [honest(fedavg, client) for client in range(others)] + [honest(fedavg, others, 1e6)]
    admitted = fedavg.filter(uploads, FIRST)
    assert [upload.client for upload in admitted] == list(range(others)) or others == 0
    if others:
        (refusal,) = fedavg.rejected
        assert "beyond" in refusal.reason and "raise trainer.max_norm_ratio" in refusal.reason


@given(st.lists(st.floats(1.0, 999.0), min_size=1, max_size=3), st.floats(0, 1e-6))
def test_no_honest_client_is_refused_because_of_another(scales, tiny):
    """Norms differ by less than the factor, and one client of four sends next to nothing."""
    validator = UploadValidator(FAST["FedAvg"](), StreamShape(6, 4))
    uploads = [honest(validator, client, scale) for client, scale in enumerate(scales)]
    admitted = validator.filter([*uploads, honest(validator, 3, tiny)], FIRST)
    assert {upload.client for upload in admitted} >= set(range(len(scales)))


def test_what_is_remembered_makes_later_rounds_stricter_and_survives_a_restart(fedavg):
    for _ in range(5):
        assert len(fedavg.filter([honest(fedavg, client) for client in range(3)], FIRST)) == 3
    other = UploadValidator(FAST["FedAvg"](), StreamShape(6, 3))
    other.load_state_dict(fedavg.state_dict())
    for validator in (fedavg, other):
        # Two of three collude; the rounds before are more than they are.
        found = validator.filter([honest(validator, 0, 1e6), honest(validator, 1), honest(validator, 2, 1e6)], FIRST)
        assert [upload.client for upload in found] == [1]
    assert fedavg.state_dict() == other.state_dict()
    assert max(map(len, fedavg.norms.values())) <= validation.NUM_NORMS


def test_norms_may_be_left_alone():
    validator = UploadValidator(FAST["FedAvg"](), StreamShape(6, 3), max_norm_ratio=0)
    assert len(validator.filter([honest(validator, 0), honest(validator, 1), honest(validator, 2, 1e30)], FIRST)) == 3


@pytest.mark.parametrize("options", [{"max_norm_ratio": 0.5}, {"max_norm_ratio": -1}, {"upload_gb": 0}])
def test_limits_that_refuse_everybody_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        FederatedTrainer(**options)


def test_a_quorum_counts_who_was_let_in(four):
    poison = malformed.Tamper(0, 0, 1, lambda upload: [replace(upload, task=5)])
    trainer = Recorded(callbacks=[poison], quorum=4)
    with pytest.raises(ValueError, match="quorum 4 is not met: 3 of 4 clients answered in task 1, round 2"):
        trainer.fit(FAST["FedAvg"](), deepcopy(four))


def test_whatever_a_check_raises_the_round_goes_on(fedavg, monkeypatch):
    def broken(upload, net):
        raise RuntimeError("two\nlines") if upload.client == 1 else ValueError("mind\x1b")

    uploads = [honest(fedavg, client) for client in range(2)]
    monkeypatch.setattr(fedavg.method, "upload_spec", broken)
    assert fedavg.filter(uploads, FIRST) == []
    assert [refusal.reason for refusal in fedavg.rejected] == [
        "cannot be checked (ValueError: mind?)",
        "cannot be checked (RuntimeError: two lines)",
    ]


def test_who_was_left_out_is_said_everywhere_and_survives_a_restart(tmp_path):
    """In results.json and TensorBoard, in a run that goes on from a checkpoint as in one that does not."""

    def begun(folder, *callbacks):
        folder.mkdir()
        trainer = Recorded(callbacks=[Results(), TensorBoard(), *callbacks])
        trainer.run_dir = folder
        return trainer

    method, poison = METHODS["FedRidge"], malformed.Tamper(1, 0, 1, lambda upload: [replace(upload, payload={"w": 1})])
    whole = begun(tmp_path / "whole", poison)
    whole.fit(method(), fake_data())
    stopped = begun(tmp_path / "stopped", poison, Stop(after=2))
    with pytest.raises(Stopped):
        stopped.fit(method(), fake_data())
    resumed = Recorded(callbacks=[Results(), TensorBoard()])
    resumed.run_dir = stopped.run_dir
    resumed.fit(method(), fake_data(), checkpoint=stopped.run_dir / "checkpoint.pt")
    texts = [(folder / "results.json").read_bytes() for folder in (whole.run_dir, stopped.run_dir)]
    assert texts[0] == texts[1]
    expected = {"client": 1, "task": 0, "round": 1, "reason": "'w' must be a plain tensor on the CPU"}
    assert json.loads(texts[0])["quarantined"] == [expected]
    for folder in (whole.run_dir, stopped.run_dir):
        events = EventAccumulator(str(folder / "tensorboard"), {"tensors": 0})
        events.Reload()
        assert [(point.step, point.value) for point in events.Scalars("uploads/rejected")] == [
            (0, 0),
            (1, 1),
            (2, 0),
            (3, 0),
        ]
        (text,) = events.Tensors("uploads/rejected/text_summary")
        assert (
            text.step == 1
            and text.tensor_proto.string_val[0].decode() == "- client 1: 'w' must be a plain tensor on the CPU"
        )
