"""results.json and CSV files of a run: accuracies, costs and description."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fedlscl
from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.metrics import (
    MASKS,
    average_accuracy,
    matrix_rows,
    round_rows,
    summary,
    to_csv,
    to_json,
    to_lists,
)
from fedlscl.federated.state import Callback
from fedlscl.nets.cnn import SmallModel
from fedlscl.nets.net import Net

if TYPE_CHECKING:
    from fedlscl.federated.client import Client
    from fedlscl.federated.engine import Engine
    from fedlscl.federated.method import Stage
    from fedlscl.federated.state import RunState


# Which commit of this package works: known where it runs from a checkout.


@cache
def package_commit() -> str | None:
    """The commit, with '-dirty' where tracked files were changed since; None without a checkout or without git."""
    # src/fedlscl/__init__.py: an installed package lies elsewhere, perhaps in another project's checkout.
    root = Path(fedlscl.__file__).parents[2]
    if not (root / ".git").exists() or not (root / "src" / "fedlscl").is_dir():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # Without the lock a run never disturbs a git command of the user.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# What a run is made of, in plain values: its method, its data, its nets.


def parameter_counts(run: "RunState") -> dict[str, Any]:
    """Parameters of each client's net, the shared foundation included in ``total``, by client."""
    nets = run.nets
    foundation = nets[0].foundation
    shared = 0 if foundation is None else sum(p.numel() for p in foundation.vit.parameters())
    return {
        "foundation": shared,
        "trainable": [sum(p.numel() for p in net.parameters() if p.requires_grad) for net in nets],
        "total": [shared + sum(p.numel() for p in net.parameters()) for net in nets],
    }


def describe_foundation(run: "RunState") -> dict[str, Any] | None:
    """The frozen ViT's name, SHA-256 of its weights, and mean and std of its input; None where the method has none."""
    foundation = run.nets[0].foundation
    if foundation is None:
        return None
    named = {"name": foundation.config.name, "fingerprint": foundation.fingerprint}
    return named | normalisation(foundation.mean, foundation.std)


def describe_small_models(run: "RunState") -> list[dict[str, Any]]:
    """Name, mean and std of every small model, without repetition."""
    models = [part for net in run.nets for part in net.modules() if isinstance(part, SmallModel)]
    found = [{"name": model.name, **model.normalisation} for model in models]
    return [model for place, model in enumerate(found) if model not in found[:place]]


def normalisation(mean: Tensor, std: Tensor) -> dict[str, list[float]]:
    """Mean and std (3,) of images in 0..1, to six decimals: without float32's rounding."""
    return {"mean": [round(x, 6) for x in mean.tolist()], "std": [round(x, 6) for x in std.tolist()]}


def plain(value: Any) -> Any:
    """Fields of dataclasses by name, and what JSON can say as it is; NaN becomes None.

    Example:
        >>> plain({"a": (1, float("nan"))})
        {'a': [1, None]}
    """
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if isinstance(value, int | str | None) else str(value)


# Floating-point operations of matrix products and convolutions, counted after every task: what trains may change.

SIDE = 32
"""Pixels of the stored image that is counted with; every net resizes for itself."""


class Flops(NamedTuple):
    """Per image; two for each multiplication with addition, pointwise work not counted."""

    frozen: int
    """The frozen part, whose output is cached."""
    inference: int
    """The rest of a forward pass."""
    training: int
    """The rest of a forward pass and its gradient; what an objective adds (teachers, penalties) is not counted."""


COUNTED: "WeakKeyDictionary[Engine, dict[tuple[str, int, int], Flops]]" = WeakKeyDictionary()
"""What was counted in a run, whose engine lives as long: results are written more often than nets change."""


def flops_by_client(run: "RunState") -> dict[str, list[int]]:
    """`Flops` of every client by name, counted once a task.

    Nets with equally many parameters of one type count as one architecture.
    """
    found = COUNTED.setdefault(run.engine, {})
    rows = []
    for client in run.clients:
        key = type(client.net).__name__, sum(p.numel() for p in client.net.parameters()), client.task
        if key not in found:
            with run.engine.on_device(client):
                found[key] = flops_per_image(client.net)
        rows.append(found[key])
    return {name: list(values) for name, values in zip(Flops._fields, zip(*rows, strict=True), strict=True)}


def flops_per_image(net: Net) -> Flops:
    """Count one image's passes in evaluation mode; net, gradients and random numbers stay as they are."""
    mode = net.training
    with torch.random.fork_rng():
        counted = _count(net.eval())
    net.train(mode)
    return counted


def _count(net: Net) -> Flops:
    parameters = [p for p in net.parameters() if p.requires_grad]
    device = next(iter(net.state_dict().values())).device
    images = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    prefix, counts = None, [0]
    with torch.no_grad():
        if net.prefix_key is not None:
            with FlopCounterMode(display=False) as counter:
                prefix = net.frozen_prefix(images)
            counts = [counter.get_total_flops()]
        with FlopCounterMode(display=False) as counter:
            net(images, prefix)
        counts.append(counter.get_total_flops())
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        logits = net(images, prefix).head_logits
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    return Flops(*counts, counter.get_total_flops())


# What a run costs: seconds, images, memory. Never the same twice, so kept apart from the results.

COSTS_SCHEMA = 1


class Lap(NamedTuple):
    """What went by since the last lap."""

    seconds: dict[str, float]
    """By name of the stage, and 'server' and 'evaluation'."""
    images: int
    """Seen in training, repetitions counted."""
    training_seconds: float
    """The stages' part of ``seconds``."""


class Timed(Callback):
    """An observer that times the parts of the run."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._images, self._training_seconds = 0, 0.0

    def lap(self) -> Lap:
        """The sums since the last call; counting starts anew."""
        lap = Lap(dict(self._seconds), self._images, self._training_seconds)
        self._seconds, self._images, self._training_seconds = defaultdict(float), 0, 0.0
        return lap

    def on_batch_end(self, run: "RunState", client: "Client | None", num_images: int) -> None:
        """Count images."""
        self._images += num_images

    def on_stage_end(
        self,
        run: "RunState",
        client: "Client | None",
        stage: "Stage",
        terms: dict[str, float],
        seconds: float,
    ) -> None:
        """Add a stage's seconds."""
        self._seconds[stage.name] += seconds
        self._training_seconds += seconds

    def on_server_end(self, run: "RunState", seconds: float) -> None:
        """Add the server's seconds."""
        self._seconds["server"] += seconds

    def on_evaluation_end(self, run: "RunState", client: "Client", phase: str, seconds: float) -> None:
        """Add an evaluation's seconds."""
        self._seconds["evaluation"] += seconds


class CostLog:
    """costs.json: one entry for each process that worked on the run, and their sums."""

    def __init__(self, path: Path, run: "RunState") -> None:
        self.path, self.began = path, time.perf_counter()
        is_resumed = run.step > 0 and path.is_file()
        self.earlier: list[dict[str, Any]] = json.loads(path.read_bytes())["sessions"] if is_resumed else []
        self.session: dict[str, Any] = {
            "started": _now(),
            "first_step": run.step,
            "commit": package_commit(),
            "device": device_name(run.device),
            "precision": run.precision,
            "seconds": {},
            "training_seconds": 0.0,
            "images": 0,
            "rounds": [],
        }

    def add(self, lap: Lap) -> None:
        """Take over a lap of this session."""
        self.session["seconds"] = _sum(self.session["seconds"], lap.seconds)
        self.session["training_seconds"] += lap.training_seconds
        self.session["images"] += lap.images

    def add_round(self, task: int, round_: int, seconds: float) -> None:
        """Note how long a whole round took."""
        self.session["rounds"].append({"task": task, "round": round_, "seconds": seconds})

    def write(self) -> None:
        """Bring the file up to date."""
        self.session |= {"ended": _now(), "total_seconds": time.perf_counter() - self.began}
        self.session["peak_memory"] = peak_memory()
        sessions = [*self.earlier, self.session]
        images, training = (sum(session[name] for session in sessions) for name in ("images", "training_seconds"))
        costs = {
            "schema": COSTS_SCHEMA,
            "total_seconds": sum(session["total_seconds"] for session in sessions),
            "seconds": _sum(*(session["seconds"] for session in sessions)),
            "images": images,
            "images_per_second": images / training if training else None,
            "peak_memory_bytes": {
                place: max(session["peak_memory"][place] for session in sessions) for place in ("host", "device")
            },
            "sessions": sessions,
        }
        write_atomically(self.path, json.dumps(costs, indent=1).encode())


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory() -> dict[str, int]:
    """Most bytes that this process held so far, on the host and on CUDA devices."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "device": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sum(*parts: dict[str, float]) -> dict[str, float]:
    return {name: sum(part.get(name, 0.0) for part in parts) for name in {n: None for part in parts for n in part}}


# Result files of a run: what it is and what came out, equal to the byte however often it was interrupted.

SCHEMA = 1
"""Of results.json; raised when a name in it changes its meaning."""


class Results(Timed):
    """Writes results.json, matrix.csv and rounds.csv after every task, and costs.json after every round.

    Clients, tasks and rounds are counted from 0 in all of them, accuracies are fractions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs: CostLog | None = None

    def on_fit_start(self, run: "RunState") -> None:
        """Take up the costs of the sessions before this one."""
        if run.run_dir is not None:
            self.costs = CostLog(run.run_dir / "costs.json", run)

    def on_round_start(self, run: "RunState") -> None:
        """Start the round's clock."""
        self.round_began = time.perf_counter()

    def on_round_end(self, run: "RunState") -> None:
        """Stop it."""
        if self.costs is not None:
            self.costs.add_round(run.progress.task, run.progress.round, time.perf_counter() - self.round_began)

    def on_checkpoint(self, run: "RunState") -> None:
        """Write the costs."""
        if self.costs is not None:
            self.costs.add(self.lap())
            self.costs.write()

    def on_task_end(self, run: "RunState") -> None:
        """Write the results so far."""
        if run.run_dir is not None:
            write_results(run)

    def on_fit_end(self, run: "RunState") -> None:
        """Write everything once more: a run that was complete already did not come past a task's end."""
        self.on_task_end(run)
        self.on_checkpoint(run)

    def on_exception(self, run: "RunState") -> None:
        """Interrupted work has its costs, too; the results stand as of the last task."""
        with suppress(OSError):
            self.on_checkpoint(run)


def write_results(run: "RunState") -> None:
    """Write results.json, matrix.csv and rounds.csv."""
    assert run.run_dir is not None
    done = results(run)
    files = {
        "results.json": to_json(done),
        "matrix.csv": to_csv(matrix_rows(done["accuracy"])),
        "rounds.csv": to_csv(round_rows(done["traffic"], run.history, done["tasks_done"])),
    }
    for name, text in files.items():
        write_atomically(run.run_dir / name, text.encode())


def results(run: "RunState") -> dict[str, Any]:
    """Everything about a run that is the same whenever it is repeated, in plain values.

    ``data`` is what ``describe_data`` would say, where the run has none to look into.
    """
    done = tasks_done(run)
    values = {name: amounts[:, :done] for name, amounts in run.traffic.items()}
    return {
        "schema": SCHEMA,
        "versions": {name: version(name) for name in ("fedlscl", "torch", "lightning", "timm")},
        "seed": run.seed,
        "method": {"name": type(run.method).__name__, "fields": plain(run.method)},
        "trainer": {name: getattr(run, name) for name in ("rounds_per_task", "server_every", "precision")},
        "data": run.data,
        "foundation": describe_foundation(run),
        "small_models": describe_small_models(run),
        "parameters": {
            **parameter_counts(run),
            "uploaded_per_round": [int(client.max()) if done else 0 for client in values["up_values"]],
        },
        "flops_per_image": flops_by_client(run) if run.clients else None,
        "tasks_done": done,
        "accuracy": to_lists(run.matrix),
        "summary": [plain(summary(run.matrix, task)) for task in range(done)],
        "clients": {mask: _clients(run.matrix.of(mask), done) for mask in MASKS},
        "quarantined": [refusal._asdict() for refusal in run.rejected],
        "traffic": {
            "up_bytes": int(values["up"].sum()),
            "down_bytes": int(values["down"].sum()),
            **{name: amounts.tolist() for name, amounts in values.items()},
        },
    }


def tasks_done(run: "RunState") -> int:
    """Tasks that every client has learned and was tested on."""
    return int((~run.matrix.of("seen")[:, :, 0].isnan()).all(0).sum())


def _clients(matrix: Tensor, done: int) -> dict[str, Any] | None:
    if not done:
        return None
    average = average_accuracy(matrix)[:, done - 1]
    worst = int(average.argmin())
    return {"average": average.tolist(), "worst": worst, "worst_average": float(average[worst])}
