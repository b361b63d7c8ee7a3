import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fedlscl.methods
import tiny_methods
from fedlscl.federated.method import Method

FIT = ["fit", "--config", "config.yaml"]
DATA = {
    "dataset": "fake",
    "fake_classes": 6,
    "num_clients": 2,
    "num_tasks": 2,
    "private_classes": 2,
    "public_classes": 2,
    "train_per_class": 8,
    "test_per_class": 4,
    "image_size": 16,
}
FILES = ("checkpoint.pt", "results.json", "matrix.csv", "rounds.csv", "config.yaml", "manifest.json")


@pytest.fixture(scope="module")
def start():
    """Runs a command line in a folder, in a fresh process, and returns its exit status."""
    program = Path(__file__).with_name("resume_zygote.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    zygote = subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def run(folder, *arguments, deadly=None, method="FedLSCL", watched=True):
        message = {"folder": str(folder), "method": method, "deadly": deadly, "watched": watched}
        print(json.dumps({"arguments": arguments, **message}), file=zygote.stdin, flush=True)
        return int(zygote.stdout.readline())

    yield run
    zygote.stdin.close()
    zygote.wait()


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    folder = new_folder(tmp_path_factory)
    assert start(folder, *FIT) == 0, (folder / "log.txt").read_text()
    return folder


def new_folder(tmp_path_factory, method="FedLSCL"):
    folder = tmp_path_factory.mktemp("run")
    trainer = {"rounds_per_task": 2, "accelerator": "cpu"}
    config = {"trainer": trainer, "method": tiny_methods.configuration(method), "data": DATA}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def finished(folder):
    """The files of the only run with a checkpoint."""
    (checkpoint,) = folder.glob("runs/*/version_*/checkpoint.pt")
    return {name: checkpoint.with_name(name).read_bytes() for name in FILES}


def differing(folder, other):
    found, expected = finished(folder), finished(other)
    return [name for name in FILES if found[name] != expected[name]]


@pytest.mark.slow
def test_a_run_repeats_to_the_byte(start, uninterrupted, tmp_path_factory):
    folder = new_folder(tmp_path_factory)
    assert start(folder, *FIT) == 0
    assert differing(folder, uninterrupted) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_anywhere_a_run_resumes_to_the_byte(start, uninterrupted, tmp_path_factory):
    """At one point of each kind, drawn with a fixed seed; benchmarks/robustness.py has a campaign of many more."""
    events = json.loads((uninterrupted / "events.json").read_text())
    picker = random.Random(42)
    for kind in dict.fromkeys(events):
        folder, number = new_folder(tmp_path_factory), picker.randint(1, events.count(kind))
        assert start(folder, *FIT, deadly=(kind, number)) == -signal.SIGKILL
        assert start(folder, *FIT, "--ckpt_path", "last") == 0, (folder / "log.txt").read_text()
        assert differing(folder, uninterrupted) == [], (kind, number)


@pytest.mark.parametrize("method", tiny_methods.MOSTLY_SLOW)
def test_every_method_killed_in_its_second_task_resumes_to_the_byte(method, start, tmp_path_factory):
    """Killed half way through the task's training (or in its last server step).

    Before that in the task's first server step, too, where the server keeps a state from round to round.
    """
    whole, folder = (new_folder(tmp_path_factory, method) for _ in range(2))
    last, tiny_run = ("--ckpt_path", "last"), {"method": method, "watched": False}
    assert start(whole, *FIT, **tiny_run) == 0, (whole / "log.txt").read_text()
    events = json.loads((whole / "events.json").read_text())
    assert events.count("server") == 4 and events.count("end of task") == 4
    begin = [number for number, event in enumerate(events) if event == "end of task"][1]
    before, second_task, resume = events[:begin], events[begin:], ()
    if getattr(fedlscl.methods, method).state_dict is not Method.state_dict:
        assert start(folder, *FIT, deadly=("server", 3), **tiny_run) == -signal.SIGKILL
        before, resume = [], last
    steps = second_task.count("step")
    half_way = ("step", before.count("step") + steps // 2 + 1) if steps else ("server", before.count("server") + 2)
    assert start(folder, *FIT, *resume, deadly=half_way, **tiny_run) == -signal.SIGKILL
    assert start(folder, *FIT, *last, **tiny_run) == 0, (folder / "log.txt").read_text()
    assert differing(folder, whole) == []
