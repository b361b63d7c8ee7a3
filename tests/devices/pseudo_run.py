"""Runs on the device without hardware, in a separate process; prints one JSON object.

``pseudo_run.py fit PRECISION``, ``float64``, ``options PRECISION``, ``resume PRECISION``, ``predict``,
``steps PRECISION`` or ``canary``.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pseudo
import torch

import tiny
import tiny_methods
from fedlscl.__main__ import main
from fedlscl.federated.method import Method
from fedlscl.federated.readout import ReadoutConfig
from fedlscl.federated.state import Callback
from fedlscl.methods import FedLSCL
from fedlscl.testing import Recorded, Stop, Stopped, fake_data, learn, same, tensors

COLLABORATOR = tiny_methods.COLLABORATOR
OPTIONS = {
    "ewc": {"continual": "ewc"},
    "lwf": {"continual": "lwf"},
    "no stage 2": {"continual": "none"},
    "buffer alone": {"replay_current": False, "freeze_norm": False},
    "no distillation": {"distill": False},
    "no imprinting": {"imprint": False, "balance": False},
    "secure sum": {"secure_sum": True},
    "noise": {"noise_multiplier": 1.0},
    "two small models": {"small_models": ("test_resnet", "test_resnet")},
    "linear head": {"collaborator": replace(COLLABORATOR, head="linear"), "imprint": False},
    "last block": {"collaborator": replace(COLLABORATOR, blocks=(1,))},
    "no small model": {"collaborator": replace(COLLABORATOR, small_model="none")},
    "frozen small model": {"collaborator": replace(COLLABORATOR, freeze_small=True), "calibrate_norm": True},
    "without collaboration": {"collaborator": replace(COLLABORATOR, collaboration=False)},
}
READOUTS = {"heads": ["lda", "ridge", "ncm"], "features": ["adapted", "frozen", "small"], "random_features": 32}
RUN = {"rounds_per_task": 1}


def fedlscl(**options):
    return FedLSCL(**{"collaborator": COLLABORATOR, "buffer_per_class": 3, **tiny_methods.LOCAL} | options)


def outcome(method: Method, **options):
    """'' if a run ends with all of its state on the host and no upload rejected, otherwise why not."""
    try:
        run = learn(method, **{**RUN, **options})
    except (RuntimeError, TypeError, ValueError) as error:
        place = error.__traceback__
        while place.tb_next is not None and "fedlscl" in place.tb_next.tb_frame.f_code.co_filename:
            place = place.tb_next
        file = Path(place.tb_frame.f_code.co_filename).name
        return f"{file}:{place.tb_lineno}: {type(error).__name__}: {str(error)[:200]}"
    left = [path for path, value in tensors(run.states) if value.device.type != "cpu"]
    return f"left on the device: {left[:3]}" * bool(left) or f"rejected: {run.run.rejected[:1]}" * bool(
        run.run.rejected
    )


def fit(precision):
    return {name: outcome(make(), precision=precision) for name, make in tiny_methods.METHODS.items()}


def float64():
    """Every method in float32 on a device without float64, such as Apple's."""
    pseudo.HAS_FLOAT64[0] = False
    return fit("32-true") | {"readouts": outcome(fedlscl(), readouts=ReadoutConfig(**READOUTS))}


def options(precision):
    found = {
        name: outcome(fedlscl(**values), precision=precision, rounds_per_task=2) for name, values in OPTIONS.items()
    }
    return found | {"readouts": outcome(fedlscl(), precision=precision, readouts=ReadoutConfig(**READOUTS))}


def resume(precision):
    """Whether a run that stops in its second task and resumes has the bits of one that does not stop."""
    found = {}
    for name in tiny_methods.QUICK:
        make = tiny_methods.METHODS[name]
        with tempfile.TemporaryDirectory() as folder:
            whole = learn(make(), precision=precision)
            stopped = Recorded(callbacks=[Stop(after=3)], precision=precision)
            stopped.run_dir = Path(folder)
            with contextlib.suppress(Stopped):
                stopped.fit(make(), fake_data())
            resumed = Recorded(precision=precision)
            resumed.fit(make(), fake_data(), checkpoint=Path(folder, "checkpoint.pt"))
        try:
            same(resumed, whole, "a resumed run")
            found[name] = ""
        except AssertionError as error:
            found[name] = str(error)
    return found


def predict():
    """Exit statuses of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        from PIL import Image

        Image.new("RGB", (16, 16), (200, 30, 30)).save("red.png")
        statuses = {"fit": main(["fit", *tiny.FEDLSCL])}
        (run,) = Path(folder).glob("runs/*/version_*")
        statuses["test"] = main(["test", "--ckpt_path", str(run)])
        statuses["predict"] = main(["predict", "--ckpt_path", str(run), "--images", "red.png", "--client", "0"])
    return statuses


class Steps(Callback):
    """By stage, the waits of each step, after the first epoch, which fills the cache, or after the first step."""

    def __init__(self):
        self.found, self.before = {}, Counter()

    def on_stage_start(self, run, client, stage):
        self.stage, self.seen = stage, 0
        self.name = f"{'server' if client is None else 'client'} {stage.name}"
        self.before = Counter(pseudo.WAITS)

    def on_batch_end(self, run, client, num_images):
        self.seen += 1
        if self.seen > (len(self.stage.batches) if self.stage.epochs > 1 else 1):
            steps = self.found.setdefault(self.name, [])
            steps.append(dict(pseudo.WAITS - self.before))
        self.before = Counter(pseudo.WAITS)


def steps(precision):
    """Mean waits per step, by method and stage."""
    found = {}
    for name in ("FedLSCL", "FedAvg", "EWC", "LwF", "TARGET", "MFCL", "FedWeIT", "GLFC", "LoRM"):
        method, counter = tiny_methods.METHODS[name](), Steps()
        method.local_epochs = 2
        learn(method, precision=precision, callbacks=[counter], **RUN)
        for stage, waits in counter.found.items():
            total = sum((Counter(step) for step in waits), Counter())
            found[f"{name} {stage}"] = {what: n / len(waits) for what, n in total.items()}
    return found


def canary():
    """Names of the faults that the device notices, among some that are made on purpose."""
    noticed = []

    def fault(name, error, call):
        with contextlib.suppress(error):
            call()
            return
        noticed.append(name)

    there, here = torch.ones(2, 2, device=pseudo.NAME), torch.eye(2)
    fault("sum", RuntimeError, lambda: there + here)
    fault("product", RuntimeError, lambda: there @ here)
    fault("cat", RuntimeError, lambda: torch.cat([there, here]))
    fault("index", RuntimeError, lambda: here[there[0].long()])
    assert (there + torch.tensor(1.0)).cpu().sum() == 8  # CUDA takes a scalar of the host
    for name, call in {
        "item": lambda: there.sum().item(),
        "if": lambda: bool((there > 0).any()),
        "mask": lambda: there[there > 0],
        "nonzero": lambda: there.nonzero(),
        "to the host": lambda: there.cpu(),
        "to the device": lambda: here.to(pseudo.NAME),
        "new tensor": lambda: there.new_tensor([1.0]),
    }.items():
        pseudo.WAITS.clear()
        call()
        noticed += [name] * (sum(pseudo.WAITS.values()) == 1)
    pseudo.WAITS.clear()
    here.to(pseudo.NAME, non_blocking=True)
    torch.isin(there, there)
    assert not pseudo.WAITS
    pseudo.HAS_FLOAT64[0] = False
    fault("float64", TypeError, there.double)
    return noticed


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:]
    with (
        patch("fedlscl.federated.trainer.connect", pseudo.connect),
        patch("fedlscl.cli.commands.connect", pseudo.connect),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        result = globals()[command](*arguments)
    print(json.dumps(result))
