"""Several processes: real ones, on gloo, with files that equal those of one process to the byte."""

import os
import subprocess
import sys

import pytest
import yaml

import tiny_methods
from fedlscl.federated.ranks import Ranks
from fedlscl.federated.trainer import FederatedTrainer

FILES = ("checkpoint.pt", "results.json", "matrix.csv", "rounds.csv", "manifest.json")
DATA = {
    "dataset": "fake", "fake_classes": 9, "num_clients": 3, "num_tasks": 2, "private_classes": 2, "public_classes": 2,
    "train_per_class": 8, "test_per_class": 4, "image_size": 16,
}  # fmt: skip


def fit(folder, method, devices, *options):
    folder.mkdir()
    trainer = {"rounds_per_task": 2, "accelerator": "cpu", "devices": devices, "participation": 0.7}
    config = {"trainer": trainer, "method": tiny_methods.configuration(method), "data": DATA}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "fedlscl", "fit", "--config", "config.yaml", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = folder.glob("runs/*/version_*")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["FedLSCL", "GLFC"])
def test_two_processes_write_the_same_bytes_as_one(tmp_path, method):
    one, two = (fit(tmp_path / str(devices), method, devices) for devices in (1, 2))
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_method_that_looks_into_its_clients_stays_in_one_process(make_data, monkeypatch):
    monkeypatch.setattr(Ranks, "__init__", lambda self, fabric: self.__dict__.update(size=2, rank=0, fabric=fabric))
    with pytest.raises(ValueError, match="Joint pools all data in one process: choose devices 1"):
        FederatedTrainer(accelerator="cpu").fit(tiny_methods.METHODS["Joint"](), make_data())
