"""What server and nodes have in common: the configuration that ``fedlscl fit`` reads too."""

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedlscl.cli.app import build
from fedlscl.cli.runs import DECIDING, by_content
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.cache import PrefixCache
from fedlscl.federated.engine import Engine, connect
from fedlscl.federated.method import Method
from fedlscl.federated.pool import ClientRunner
from fedlscl.federated.trainer import FederatedTrainer

OF_A_PLACE = ("root", "manifest", "cache_dir", "num_workers", "download")
"""Options of the data that each node chooses for itself."""


@dataclass(frozen=True)
class Federation:
    """A configuration, read; no data is loaded and no net built yet."""

    method: Method
    datamodule: SpatialTemporalDataModule
    """On a node its own data; the server asks for numbers of clients and tasks alone."""
    trainer: FederatedTrainer
    """For its options; it is never run."""
    seed: int
    identity: str
    """Hash of what decides the result; data do not count, since the server has none."""
    text: str = ""
    """The configuration in full."""

    def __post_init__(self) -> None:
        """Refuse what works in a simulation alone."""
        if self.method.simulation_only:
            raise ValueError(
                f"method {type(self.method).__name__} pools the data of all clients, which only a simulation can: "
                "use fedlscl fit."
            )
        self.datamodule.run_seed = self.seed

    @property
    def num_clients(self) -> int:
        """Clients K."""
        return self.datamodule.num_clients

    @property
    def num_tasks(self) -> int:
        """Tasks of the run."""
        return min(self.datamodule.num_tasks, self.trainer.max_tasks or self.datamodule.num_tasks)

    def client_runner(self, folder: Path | None = None) -> ClientRunner:
        """Runs a client of the node on its data; frozen ViT tokens are kept in ``folder`` for the next process."""
        trainer = self.trainer
        dtype = torch.float32 if trainer.precision == "32-true" else torch.bfloat16
        cache = PrefixCache(self.datamodule, trainer.cache_gb * 2**30, dtype, folder)
        fabric = connect(trainer.accelerator, trainer.devices, trainer.precision)
        return ClientRunner(deepcopy(self.method), Engine(fabric, cache), self.seed)


def read_federation(config: Path, root: str | None = None, manifest: str | None = None) -> Federation:
    """Read a configuration.

    Args:
        config: YAML file.
        root: folder of the data in place of the file's.
        manifest: split in place of the file's: that of a node which has its own samples only.
    """
    arguments = ["--config", str(config)]
    arguments += [] if root is None else ["--data.root", root]
    arguments += [] if manifest is None else ["--data.manifest", manifest]
    trainer, method, datamodule, resolved, text = build(arguments)
    return Federation(method, datamodule, trainer, resolved["seed_everything"], identify(resolved), text)


def identify(config: dict[str, Any]) -> str:
    """Name what decides a result and is the same on all machines."""
    dataset = config["data"]["dataset"]
    decides = {
        "method": by_content(config["method"]),
        "seed": config["seed_everything"],
        "data": {name: value for name, value in config["data"].items() if name not in OF_A_PLACE}
        | {"dataset": Path(dataset).name if isinstance(dataset, str) else dataset},
        **{name: config["trainer"][name] for name in DECIDING},
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:32]
