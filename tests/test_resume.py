import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FIT = ["fit", "--config", "config.yaml"]
CONFIG = """
trainer: {rounds_per_task: 2, accelerator: cpu}
method:
  class_path: FedLSCL
  init_args:
    collaborator:
      foundation: {name: test_vit, weights: random, image_size: 32}
      small_model: test_resnet
      small_image_size: 16
      feature_dim: 16
    local_epochs: 1
    batch_size: 8
    buffer_per_class: 3
data:
  dataset: fake
  fake_classes: 6
  num_clients: 2
  num_tasks: 2
  private_classes: 2
  public_classes: 2
  train_per_class: 8
  test_per_class: 4
  image_size: 16
"""
FILES = ("checkpoint.pt", "results.json", "matrix.csv", "rounds.csv", "config.yaml", "manifest.json")


@pytest.fixture(scope="module")
def start():
    """Runs a command line in a folder, in a fresh process, and returns its exit status."""
    program = Path(__file__).with_name("resume_zygote.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    zygote = subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def run(folder, *arguments, deadly=0):
        print(
            json.dumps({"arguments": arguments, "folder": str(folder), "deadly": deadly}), file=zygote.stdin, flush=True
        )
        return int(zygote.stdout.readline())

    yield run
    zygote.stdin.close()
    zygote.wait()


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    folder = new_folder(tmp_path_factory)
    assert start(folder, *FIT) == 0, (folder / "log.txt").read_text()
    return folder


def new_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def finished(folder):
    """The files of the only run with a checkpoint."""
    (checkpoint,) = folder.glob("runs/FedLSCL/version_*/checkpoint.pt")
    return {name: checkpoint.with_name(name).read_bytes() for name in FILES}


@pytest.mark.slow
def test_a_run_repeats_to_the_byte(start, uninterrupted, tmp_path_factory):
    folder = new_folder(tmp_path_factory)
    assert start(folder, *FIT) == 0
    assert finished(folder) == finished(uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_anywhere_a_run_resumes_to_the_byte(start, uninterrupted, tmp_path_factory):
    events = json.loads((uninterrupted / "events.json").read_text())
    numbers = {kind: [n for n, event in enumerate(events, start=1) if event == kind] for kind in dict.fromkeys(events)}
    picker = random.Random(42)
    # Ten points: one of every kind, the others anywhere.
    points = {picker.choice(choices) for choices in numbers.values()}
    points |= set(picker.sample([n for n in range(1, len(events) + 1) if n not in points], 10 - len(points)))
    for point in sorted(points):
        folder = new_folder(tmp_path_factory)
        assert start(folder, *FIT, deadly=point) == -signal.SIGKILL
        assert start(folder, *FIT, "--ckpt_path", "last") == 0, (folder / "log.txt").read_text()
        expected, found = finished(uninterrupted), finished(folder)
        assert [name for name in FILES if found[name] != expected[name]] == [], (point, events[point - 1])
