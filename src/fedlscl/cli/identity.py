"""What makes two runs the same."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fedlscl.data import ClientSplit
from fedlscl.federated.device import chosen_precision

DECIDING = ("rounds_per_task", "server_every", "max_tasks", "participation", "failure_rate", "norm_factor", "upload_gb")
"""Options of the trainer that decide what is learned."""


def identify(config: dict[str, Any], fingerprint: str, splits: list[ClientSplit]) -> str:
    """Name what decides a result, as 'configuration-data-precision', three hashes.

    Data count by pixels, labels, class names and split, weights files by content; places, names and observers do not
    count. Evaluation compares the first two, so that a run may be tested in another precision.

    Args:
        config: the resolved configuration.
        fingerprint: of the data set.
        splits: one per client.
    """
    trainer = config["trainer"]
    configuration = {
        "method": by_content(config["method"]),
        "seed": config["seed_everything"],
        **{name: trainer[name] for name in DECIDING},
    }
    if config["data"].get("augment", "none") != "none":
        configuration["augment"] = config["data"]["augment"]
    precision = chosen_precision(trainer["precision"], trainer["accelerator"])
    return f"{_hash(configuration)}-{identify_data(fingerprint, splits)}-{_hash(precision)}"


def identify_data(fingerprint: str, splits: list[ClientSplit]) -> str:
    """Hash of a data set and of what each client gets of it."""
    return _hash([fingerprint, [[split.classes, _hashes(split.train), _hashes(split.test)] for split in splits]])


def learned_part(identity: str) -> str:
    """The two thirds that evaluation compares."""
    return identity.rpartition("-")[0]


def by_content(value: Any) -> Any:
    """The same nested values with every file that is named as ``weights`` replaced by its hash."""
    if isinstance(value, dict):
        return {name: _file_hash(part) if name == "weights" else by_content(part) for name, part in value.items()}
    return value


def _file_hash(weights: Any) -> Any:
    if not isinstance(weights, str) or not Path(weights).is_file():
        return weights
    with Path(weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(tasks: Iterable[np.ndarray]) -> list[str]:
    return [hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() for ids in tasks]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
