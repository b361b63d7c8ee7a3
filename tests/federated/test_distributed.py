"""Several processes: real ones, on gloo, with files that equal those of one process to the byte."""

import os
import subprocess
import sys

import pytest
import torch
import yaml

import tiny_methods
from fedlscl.__main__ import main
from fedlscl.federated.engine import Ranks
from fedlscl.federated.method import Progress
from fedlscl.federated.trainer import FederatedTrainer

FILES = ("checkpoint.pt", "results.json", "matrix.csv", "rounds.csv", "manifest.json")
DATA = {
    "dataset": "fake", "fake_classes": 9, "num_clients": 3, "num_tasks": 2, "private_classes": 2, "public_classes": 2,
    "train_per_class": 6, "test_per_class": 3, "image_size": 16,
}  # fmt: skip


def configured(folder, method, devices):
    """A working directory with a configuration."""
    folder.mkdir()
    trainer = {"rounds_per_task": 2, "accelerator": "cpu", "devices": devices, "participation": 0.7}
    config = {"trainer": trainer, "method": tiny_methods.configuration(method), "data": DATA}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_of(folder):
    (run,) = folder.glob("runs/*/version_*")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["FedLSCL", "GLFC"])
def test_two_processes_write_the_same_bytes_as_one(tmp_path, monkeypatch, method):
    """The one is this process."""
    one, two = (configured(tmp_path / str(devices), method, devices) for devices in (1, 2))
    fit = ["fit", "--config", "config.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedlscl", *fit]
    done = subprocess.run(command, cwd=two, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.chdir(one)
    assert main(fit) == 0
    for name in FILES:
        assert (run_of(one) / name).read_bytes() == (run_of(two) / name).read_bytes(), name


def test_the_first_process_alone_computes_the_servers_part(make_data, monkeypatch):
    """The others get its responses, its method's state and its losses."""
    trainer = FederatedTrainer(accelerator="cpu", rounds_per_task=1)
    trainer.setup(tiny_methods.METHODS["FedBE"](), make_data(), 42)
    state, entry = {"importance": {0: torch.ones(2, 3)}}, {"client": -1}
    found = ({0: {"w": torch.ones(1)}}, {**trainer.method.state_dict(), **state}, [entry])
    monkeypatch.setattr(trainer.ranks, "size", 2)
    monkeypatch.setattr(trainer.ranks, "is_first", False)
    monkeypatch.setattr(trainer.ranks, "from_first", lambda own: found)
    monkeypatch.setattr(type(trainer.method), "aggregate", lambda *_: pytest.fail("the second process aggregated"))
    trainer.run.progress = Progress(0, 0, True, False)
    assert trainer._aggregate([]) is found[0]
    assert trainer.run.history == [entry] and trainer.method.importance[0].equal(torch.ones(2, 3))


def test_a_method_that_looks_into_its_clients_stays_in_one_process(make_data, monkeypatch):
    monkeypatch.setattr(
        Ranks, "__init__", lambda self, fabric: self.__dict__.update(size=2, rank=0, is_first=True, fabric=fabric)
    )
    with pytest.raises(ValueError, match="devices must be 1 for Joint"):
        FederatedTrainer(accelerator="cpu").fit(tiny_methods.METHODS["Joint"](), make_data())
