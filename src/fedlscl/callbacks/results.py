"""Result files: results.json, matrix.csv and rounds.csv are the same bytes in every repetition, costs.json never is."""

import json
import os
import platform
import subprocess
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

import fedlscl
from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.engine import Engine
from fedlscl.federated.loggers import Timed, peak_memory
from fedlscl.federated.metrics import MASKS, PHASES, SCHEMA, matrix_rows, plain, round_rows, summary, to_csv, to_json
from fedlscl.federated.state import RunState
from fedlscl.nets.net import Net, SmallModel


class Results(Timed):
    """Writes results.json, matrix.csv and rounds.csv after every task, and costs.json at every checkpoint.

    Clients, tasks and rounds are counted from 0 in all of them, accuracies are fractions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started = 0.0
        self.session: dict[str, Any] = {}
        self.earlier: list[dict[str, Any]] = []

    @override
    def on_fit_start(self, run: RunState) -> None:
        self.started = time.perf_counter()
        self.session = {"started": _now(), "first_step": run.step, "commit": package_commit()}
        self.session |= {"device": device_name(run.device), "precision": run.precision}
        self.session |= {"seconds": Counter(), "training_seconds": 0.0, "images": 0, "rounds": []}
        if run.run_dir is not None and run.step > 0 and (path := run.run_dir / "costs.json").is_file():
            self.earlier = json.loads(path.read_bytes())["sessions"]

    @override
    def on_round_end(self, run: RunState) -> None:
        task, round_ = run.progress.position
        self.session["rounds"].append({"task": task, "round": round_, "seconds": self.round_seconds})

    @override
    def on_task_end(self, run: RunState) -> None:
        if run.run_dir is not None:
            write_results(run)

    @override
    def on_checkpoint(self, run: RunState) -> None:
        if run.run_dir is None or not self.session:
            return
        lap, session = self.lap(), self.session
        session["seconds"].update(lap.seconds)
        session["training_seconds"] += lap.training_seconds
        session["images"] += lap.images
        session |= {"ended": _now(), "total_seconds": time.perf_counter() - self.started}
        session["peak_memory"] = peak_memory()
        costs = total_costs([*self.earlier, session])
        write_atomically(run.run_dir / "costs.json", json.dumps(costs, indent=1).encode())

    @override
    def on_fit_end(self, run: RunState) -> None:
        # Written again here because a run that was complete before this session reaches no end of a task.
        self.on_task_end(run)
        self.on_checkpoint(run)

    @override
    def on_exception(self, run: RunState) -> None:
        with suppress(OSError):
            self.on_checkpoint(run)


def write_results(run: RunState) -> None:
    """Write results.json, matrix.csv and rounds.csv."""
    assert run.run_dir is not None
    done = results(run)
    rounds = to_csv(round_rows(done["traffic"], run.history, done["tasks_done"]))
    write_atomically(run.run_dir / "results.json", to_json(done).encode())
    write_atomically(run.run_dir / "matrix.csv", to_csv(matrix_rows(done["accuracy"])).encode())
    write_atomically(run.run_dir / "rounds.csv", rounds.encode())


def results(run: RunState) -> dict[str, Any]:
    """Contents of results.json: description, accuracies and traffic of a run in plain values."""
    # Tasks after which every client was evaluated.
    done = int((~run.matrix.of("class_il")[:, :, 0].isnan()).all(0).sum())
    values, has_readouts = {name: amounts[:, :done] for name, amounts in run.traffic.items()}, bool(run.readouts.names)
    uploaded = [int(client.max()) if done else 0 for client in values["up_values"]]
    return {
        "schema": SCHEMA,
        "versions": {name: version(name) for name in ("fedlscl", "torch", "lightning", "timm")},
        "seed": run.seed,
        "method": {"name": type(run.method).__name__, "fields": plain(run.method)},
        "trainer": {name: getattr(run, name) for name in ("rounds_per_task", "server_every", "precision")},
        "data": run.data,
        "foundation": describe_foundation(run),
        "small_models": describe_small_models(run),
        "parameters": parameter_counts(run) | {"uploaded_per_round": uploaded},
        "flops_per_image": flops_by_client(run) if run.clients else None,
        "tasks_done": done,
        "accuracy": plain({phase: {mask: run.matrix.of(mask, phase).tolist() for mask in MASKS} for phase in PHASES}),
        "summary": [plain(summary(run.matrix, task)) for task in range(done)],
        "clients": {mask: _clients(run.matrix.of(mask), done) for mask in MASKS},
        **({"readouts": plain(readout_accuracies(run))} if has_readouts else {}),
        "quarantined": [rejected._asdict() for rejected in run.rejected],
        "traffic": {
            **{f"{way}_bytes": int(values[way].sum()) for way in ("up", "down")},
            **{f"readout_{way}_bytes": int(sent.sum()) for way, sent in run.readouts.traffic.items() if has_readouts},
            **{name: amounts.tolist() for name, amounts in values.items()},
        },
    }


def readout_accuracies(run: RunState) -> dict[str, dict[str, Any]]:
    """Accuracies (clients, after task, on task) of each readout by mask, NaN where not measured."""
    empty = run.matrix.values[0] * torch.nan
    found = {name: run.readouts.values.get(name, empty) for name in run.readouts.names}
    return {name: dict(zip(MASKS, values.tolist(), strict=True)) for name, values in found.items()}


def _clients(matrix: Tensor, done: int) -> dict[str, Any] | None:
    if not done:
        return None
    average = matrix[:, done - 1].nanmean(1)
    return {"average": average.tolist(), "worst": int(average.argmin()), "worst_average": float(average.min())}


def parameter_counts(run: RunState) -> dict[str, Any]:
    """Trainable and total parameters of each client's net; ``total`` includes the shared foundation."""
    nets, foundation = run.nets, run.nets[0].foundation
    shared = 0 if foundation is None else sum(p.numel() for p in foundation.vit.parameters())
    return {
        "foundation": shared,
        "trainable": [sum(p.numel() for p in net.parameters() if p.requires_grad) for net in nets],
        "total": [shared + sum(p.numel() for p in net.parameters()) for net in nets],
    }


def describe_foundation(run: RunState) -> dict[str, Any] | None:
    """Name of the frozen ViT, SHA-256 of its weights, mean and std of its input; None if the method has none."""
    foundation = run.nets[0].foundation
    if foundation is None:
        return None
    # Six decimals: without the rounding of float32.
    constants = {name: [round(x, 6) for x in getattr(foundation, name).tolist()] for name in ("mean", "std")}
    return {"name": foundation.config.name, "fingerprint": foundation.fingerprint} | constants


def describe_small_models(run: RunState) -> list[dict[str, Any]]:
    """Name, mean and std of every distinct small model."""
    models = [part for net in run.nets for part in net.modules() if isinstance(part, SmallModel)]
    found = [{"name": model.name, **model.normalisation} for model in models]
    return [model for i, model in enumerate(found) if model not in found[:i]]


class Flops(NamedTuple):
    """FLOPs of one image in matrix products and convolutions, two per multiply-add."""

    frozen: int
    """The frozen part, whose output is cached."""
    inference: int
    """The rest of a forward pass."""
    training: int
    """The rest of a forward pass and its gradient, without teachers and penalties of the objective."""


SIDE = 32
"""Pixels of the stored image for which FLOPs are counted; every net resizes for itself."""
_COUNTED: WeakKeyDictionary[Engine, dict[tuple[str, int, int], Flops]] = WeakKeyDictionary()
"""By the engine of a run: type of net, number of parameters and task, which may change what trains."""


def flops_by_client(run: RunState) -> dict[str, list[int]]:
    """`Flops` of every client by name; nets of one type with equally many parameters are counted once per task."""
    known, found = _COUNTED.setdefault(run.engine, {}), []
    for client in run.clients:
        kind = type(client.net).__name__, sum(p.numel() for p in client.net.parameters()), client.task
        if kind not in known:
            with run.engine.on_device(client):
                known[kind] = flops_per_image(client.net)
        found.append(known[kind])
    return {name: [getattr(flops, name) for flops in found] for name in Flops._fields}


def flops_per_image(net: Net) -> Flops:
    """Count one image in eval mode; mode, gradients and random numbers stay as they are."""
    mode, device = net.training, next(iter(net.state_dict().values())).device
    images = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    net.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            prefix = None if net.prefix_key is None else net.frozen_prefix(images)
            frozen = counter.get_total_flops()
            net(images, prefix)
            inference = counter.get_total_flops() - frozen
        with torch.enable_grad():
            logits = net(images, prefix).logits
            if logits.requires_grad:
                parameters = [p for p in net.parameters() if p.requires_grad]
                torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    net.train(mode)
    return Flops(frozen, inference, counter.get_total_flops() - frozen - inference)


def total_costs(sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """Contents of costs.json: one session per process that worked on the run, and their sums."""
    images, training = (sum(session[name] for session in sessions) for name in ("images", "training_seconds"))
    peaks = {name: max(session["peak_memory"][name] for session in sessions) for name in ("host", "device")}
    seconds: Any = Counter()
    for session in sessions:
        seconds.update(session["seconds"])
    return {
        "schema": 1,
        "total_seconds": sum(session["total_seconds"] for session in sessions),
        "seconds": seconds,
        "images": images,
        "images_per_second": images / training if training else None,
        "peak_memory_bytes": peaks,
        "sessions": sessions,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    """Model of the GPU, or architecture and threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


@cache
def package_commit() -> str | None:
    """The commit, with '-dirty' if tracked files were changed since; None without a checkout or without git."""
    # src/fedlscl/__init__.py: an installed package lies elsewhere, perhaps in another project's checkout.
    root = Path(fedlscl.__file__).parents[2]
    if not (root / ".git").exists() or not (root / "src" / "fedlscl").is_dir():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # Without the lock a run never disturbs a git command of the user.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, env=environment)
        return done.stdout.strip()
    return None
