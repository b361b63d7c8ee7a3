"""All methods on a device without hardware: nothing meets a tensor of the host, and hot loops never wait.

The device is in pseudo.py, and what runs on it, in a separate process, in pseudo_run.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedlscl

utilities = pytest.importorskip("torch.utils.backend_registration")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(utilities, "_setup_privateuseone_for_python_backend"), reason="torch has no devices in Python"
    ),
]
SCRIPT = Path(__file__).with_name("pseudo_run.py")
NEVER_WAIT = ("FedLSCL", "FedAvg", "EWC", "LwF", "MFCL", "FedWeIT", "LoRM")


def on_device(*command):
    """What pseudo_run.py prints for a command."""
    path = os.pathsep.join([str(Path(fedlscl.__file__).parents[1]), str(SCRIPT.parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    words = [sys.executable, str(SCRIPT), *command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def faults(found):
    return {name: fault for name, fault in found.items() if fault}


def test_the_device_notices_faults_and_waits():
    mixed, waits = ["sum", "product", "cat", "index"], ["item", "if", "mask", "nonzero"]
    copies = ["to the host", "to the device", "new tensor"]
    assert on_device("canary") == [*mixed, *waits, *copies, "float64"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_every_method_runs_in_half_precision(precision):
    found = on_device("fit", precision)
    assert len(found) >= 20 and not faults(found)


def test_every_method_runs_in_float32_without_float64():
    found = on_device("float64")
    assert len(found) >= 20 and not faults(found)


def test_options_of_fedlscl_and_readouts_run():
    found = on_device("options", "bf16-mixed")
    assert len(found) >= 10 and not faults(found)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_run_has_the_same_bits(precision):
    found = on_device("resume", precision)
    assert len(found) >= 4 and not faults(found)


def test_the_command_line_trains_tests_and_predicts():
    assert on_device("predict") == {"fit": 0, "test": 0, "predict": 0}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_steps_do_not_wait_for_the_device(precision):
    """With a warm cache, in the stages of most methods and of Fed-LSCL above all."""
    found = on_device("steps", precision)
    assert {"FedLSCL client collaborative", "FedLSCL client continual"} <= found.keys()
    assert not {stage: waits for stage, waits in found.items() if stage.startswith(NEVER_WAIT) and waits}
    assert found["TARGET server synthesis"] == {} and found["GLFC client train"] != {}
