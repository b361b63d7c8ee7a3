"""Noise on what a client uploads: off unless asked for, clipped, counted, stated."""

import logging
from dataclasses import replace

import pytest
import torch

from fedlscl.functional.privacy import epsilon
from fedlscl.methods import FedLSCL
from fedlscl.testing import learn
from tiny_methods import COLLABORATOR, LOCAL


def make(**options):
    return FedLSCL(**({"collaborator": COLLABORATOR, "buffer_per_class": 3, "upload_rank": "exact"} | LOCAL | options))


def test_it_is_off_by_default(caplog):
    run = learn(make(), max_tasks=1)
    assert make().noise_multiplier == 0 and not make().secure_sum
    assert run.method.releases == 0 and not caplog.records
    assert not any(name.startswith("noise.") for client in run.clients for name in client.memory)


@pytest.mark.parametrize("secure_sum", [False, True])
def test_epsilon_is_stated_after_every_task(caplog, secure_sum):
    with caplog.at_level(logging.WARNING):
        run = learn(make(noise_multiplier=5.0, secure_sum=secure_sum))
    sent = (2, 6) if secure_sum else (4, 8)  # two tensors a round, and none in the exchange of keys
    values = [f"{epsilon(5.0, releases, 1e-5):.4g}" for releases in sent]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("epsilon ")[1].split()[0] for line in lines] == values
    assert all("protects no client" in line for line in lines)
    assert run.method.releases == run.method.state_dict()["releases"] == sent[1]
    assert all(v.isfinite().all() for client in run.clients for v in client.net.state_dict().values())


def test_noise_from_the_system_is_no_simulation(caplog):
    learn(make(noise_multiplier=5.0, secrets="system"), max_tasks=1)
    assert len(caplog.records) == 1 and "protects no client" not in caplog.text


def test_what_travels_is_clipped_and_noisy():
    """Hardly any noise shows the clipping; noise alone shows its size."""
    quiet = learn(make(noise_multiplier=1e-6, clip_norm=1e-3), max_tasks=1)
    for upload in quiet.uploads:
        start = quiet.clients[upload.client].memory["noise.start"]
        assert (upload.payload["generator"] - start).norm().item() == pytest.approx(1e-3, rel=0.01)
    loud = learn(make(noise_multiplier=2.0, clip_norm=0.5), max_tasks=1)
    for upload in loud.uploads:
        noise = upload.payload["generator"] - loud.clients[upload.client].memory["noise.start"]
        assert noise.std().item() == pytest.approx(1.0, rel=0.05)
    plain = learn(make(), max_tasks=1).uploads[0].payload
    assert torch.allclose(plain["moments"], quiet.uploads[0].payload["moments"], atol=1e-4)
    assert not torch.allclose(plain["moments"], loud.uploads[0].payload["moments"], atol=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"noise_multiplier": 1.0, "collaborator": replace(COLLABORATOR, unit_features=False)},
            "must be 0 with raw features.*set collaborator.unit_features to true",
        ),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be >= 0, got -1.0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be >= 0, got nan"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0, got 0.0"),
        ({"noise_delta": 1.0}, "noise_delta must be in \\(0, 1\\), got 1.0"),
    ],
)
def test_noise_that_cannot_be_counted_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
