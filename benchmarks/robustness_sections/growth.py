"""A long run: do memory and open files grow?"""

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np

from fedlscl.callbacks import Callback
from fedlscl.callbacks.results import Results
from fedlscl.callbacks.tensorboard import TensorBoard
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.testing import fake_data
from tiny_methods import METHODS


class Footprint(Callback):
    """Memory in use and open files after every round's checkpoint."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.files: list[int] = []

    def on_round_end(self, trainer: FederatedTrainer) -> None:
        """Measure."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        self.files.append(len(os.listdir("/proc/self/fd")))


def growth(work: Path, rounds: int = 200, warm_up: int = 50, method: str = "FedLSCL") -> dict[str, Any]:
    """Slopes over the rounds after the warm-up, with checkpoints, results and TensorBoard written as always."""
    watch = Footprint()
    trainer = FederatedTrainer(
        rounds_per_task=rounds // 2, accelerator="cpu", callbacks=[Results(), TensorBoard(), watch]
    )
    trainer.run_dir = work
    trainer.fit(METHODS[method](), fake_data())
    resident = np.array(watch.resident[warm_up:], dtype=float)
    slope = float(np.polyfit(np.arange(len(resident)), resident, 1)[0])
    third = len(resident) // 3
    return {
        "method": method,
        "rounds": len(watch.resident),
        "memory after warm-up [MB]": round(resident[0] / 1e6, 1),
        "memory at the end [MB]": round(resident[-1] / 1e6, 1),
        "memory slope [kB per round]": round(slope / 1e3, 2),
        "memory slope of the last third [kB per round]": round(
            float(np.polyfit(np.arange(third), resident[-third:], 1)[0]) / 1e3, 2
        ),
        "open files after warm-up": watch.files[warm_up],
        "open files at the end": watch.files[-1],
        "most open files": max(watch.files[warm_up:]),
        "resident [MB]": [round(value / 1e6, 2) for value in watch.resident],
        "open files": watch.files,
    }
