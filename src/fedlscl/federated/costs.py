"""What a run costs: seconds, images, memory. Never the same twice, so kept apart from the results."""

import json
import platform
import resource
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fedlscl.federated.callbacks import Callback
from fedlscl.federated.checkpoint import write_atomically
from fedlscl.federated.commit import package_commit

if TYPE_CHECKING:
    from fedlscl.federated.client import Client
    from fedlscl.federated.method import Stage
    from fedlscl.federated.trainer import FederatedTrainer

SCHEMA = 1


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

    def on_batch_end(self, trainer: "FederatedTrainer", client: "Client | None", num_images: int) -> None:
        """Count images."""
        self._images += num_images

    def on_stage_end(
        self,
        trainer: "FederatedTrainer",
        client: "Client | None",
        stage: "Stage",
        terms: dict[str, float],
        seconds: float,
    ) -> None:
        """Add a stage's seconds."""
        self._seconds[stage.name] += seconds
        self._training_seconds += seconds

    def on_server_end(self, trainer: "FederatedTrainer", seconds: float) -> None:
        """Add the server's seconds."""
        self._seconds["server"] += seconds

    def on_evaluation_end(self, trainer: "FederatedTrainer", client: "Client", phase: str, seconds: float) -> None:
        """Add an evaluation's seconds."""
        self._seconds["evaluation"] += seconds


class CostLog:
    """costs.json: one entry for each process that worked on the run, and their sums."""

    def __init__(self, path: Path, trainer: "FederatedTrainer") -> None:
        self.path, self.began = path, time.perf_counter()
        is_resumed = trainer.step > 0 and path.is_file()
        self.earlier: list[dict[str, Any]] = json.loads(path.read_bytes())["sessions"] if is_resumed else []
        self.session: dict[str, Any] = {
            "started": _now(),
            "first_step": trainer.step,
            "commit": package_commit(),
            "device": device_name(trainer.fabric.device),
            "precision": trainer.precision,
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
            "schema": SCHEMA,
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
