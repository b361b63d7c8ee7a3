"""Federation: the configuration that the server and all nodes share, read from the same file as ``fedlscl fit``."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlscl.cli.app import build
from fedlscl.cli.runs import decisive_options, hash_of
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.method import Method
from fedlscl.federated.pool import ClientRunner
from fedlscl.federated.trainer import FederatedTrainer

NODE_OPTIONS = ("root", "manifest", "cache_dir", "num_workers", "download")
"""Data options that may differ between nodes."""


@dataclass(frozen=True)
class Federation:
    """A configuration; no data is loaded and no net built yet."""

    method: Method
    datamodule: SpatialTemporalDataModule
    """On a node its own data; the server uses only the numbers of clients and tasks."""
    trainer: FederatedTrainer
    seed: int
    identity: str
    """Fingerprint of the configuration, without data."""
    text: str = ""
    """The resolved configuration as YAML."""

    def __post_init__(self) -> None:
        name = type(self.method).__name__
        if self.method.simulation_only:
            raise ValueError(f"method must not pool the data of all clients, got {name}: use fedlscl fit.")
        if self.method.needs_public_images:
            raise ValueError(
                f"{name} with these options must run in a simulation: its server trains on labelled images."
            )
        self.datamodule.run_seed = self.seed

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self.datamodule.num_clients

    @property
    def num_tasks(self) -> int:
        """Number of tasks of the run."""
        return self.trainer.count_tasks(self.datamodule)

    def client_runner(self, folder: Path | None = None) -> ClientRunner:
        """The runner of a node's client; frozen ViT tokens are cached in ``folder`` for later processes."""
        engine = self.trainer.launch(self.datamodule, folder)
        return ClientRunner(deepcopy(self.method), engine, self.seed, self.trainer.readouts)


def read_federation(config: Path, **own: str) -> Federation:
    """Read a YAML file; ``own`` replaces ``data.root`` and ``data.manifest``, the split of a node's own samples."""
    options = [part for name, value in own.items() for part in (f"--data.{name}", value)]
    trainer, method, datamodule, resolved, text = build(["--config", str(config), *options])
    return Federation(method, datamodule, trainer, resolved["seed_everything"], identify(resolved), text)


def identify(config: dict[str, Any]) -> str:
    """Fingerprint of the options that decide a result and are equal on all machines."""
    data = {name: value for name, value in config["data"].items() if name not in NODE_OPTIONS}
    if isinstance(dataset := data["dataset"], str):
        data["dataset"] = Path(dataset).name
    return hash_of({**decisive_options(config), "data": data})
