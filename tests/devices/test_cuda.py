"""What needs a CUDA device: methods end with their state on the host, agree with the CPU, and resume to the bit."""

import contextlib

import pytest
import torch

import tiny_methods
from fedlscl.federated.engine import has_bf16
from fedlscl.testing import Recorded, Stop, Stopped, fake_data, learn, same, tensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = {"accelerator": "cuda", "deterministic": True}
TOLERANCE = 1e-3
"""Of state after two tasks in float32, relative to its largest entry: sums in another order, through Adam."""


@pytest.fixture(autouse=True)
def cleanup():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", tiny_methods.METHODS)
def test_every_method_leaves_its_state_on_the_host(name, precision):
    if precision == "bf16-mixed" and not has_bf16():
        pytest.skip("this GPU has no bfloat16")
    run = learn(tiny_methods.METHODS[name](), rounds_per_task=1, precision=precision, **CUDA)
    assert not run.run.rejected
    for path, value in tensors(run.states):
        assert value.device.type == "cpu", path
        assert not value.is_floating_point() or value.isfinite().all(), path


@pytest.mark.parametrize("name", ["FedNCM", "FedRidge", "FrozenLDA", "AFCL", "STSA"])
def test_closed_forms_agree_with_the_cpu(name):
    runs = [learn(tiny_methods.METHODS[name](), accelerator=accelerator) for accelerator in ("cpu", "cuda")]
    expected, found = (dict(tensors(run.states)) for run in runs)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if value.is_floating_point() and value.numel():
            difference = (found[path].double() - value.double()).abs().max()
            assert difference <= TOLERANCE * value.double().abs().max().clamp(min=1), path


@pytest.mark.parametrize("name", tiny_methods.QUICK)
def test_a_resumed_run_has_the_same_bits(name, tmp_path):
    whole = learn(tiny_methods.METHODS[name](), **CUDA)
    stopped = Recorded(callbacks=[Stop(after=3)], **CUDA)
    stopped.run_dir = tmp_path
    with contextlib.suppress(Stopped):
        stopped.fit(tiny_methods.METHODS[name](), fake_data())
    resumed = Recorded(**CUDA)
    resumed.fit(tiny_methods.METHODS[name](), fake_data(), checkpoint=tmp_path / "checkpoint.pt")
    same(resumed, whole, "a resumed run")


def test_a_warm_cache_and_pinned_batches_give_the_same_bits():
    make = tiny_methods.METHODS["FedLSCL"]
    same(learn(make(), **CUDA), learn(make(), **CUDA), "a second run")
