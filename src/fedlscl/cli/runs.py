"""Run directories and the identity of a run."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fedlscl.data import ClientSplit
from fedlscl.federated.checkpoint import load_last_good, write_atomically
from fedlscl.federated.engine import chosen_precision
from fedlscl.federated.state import Callback, RunState

DECIDING = (
    "rounds_per_task",
    "server_every",
    "max_tasks",
    "participation",
    "failure_rate",
    "max_norm_ratio",
    "upload_gb",
)
"""Options of the trainer that decide the result."""


def identify(config: dict[str, Any], fingerprint: str, splits: list[ClientSplit]) -> str:
    """Fingerprint of a run: 'configuration-data-measurement', three hashes.

    Data count by pixels, labels, class names and split, weights files by content; paths, names and callbacks do not
    count. Evaluation compares the first two, so that a run may be tested in another precision, or on other images.

    Args:
        config: the resolved configuration.
        fingerprint: of the data set.
        splits: one per client.
    """
    trainer, configuration = config["trainer"], decisive_options(config)
    for name, default in (("augment", "none"), ("validation_per_class", 0)):
        if (value := config["data"].get(name, default)) != default:
            configuration[name] = value
    measured: Any = chosen_precision(trainer["precision"], trainer["accelerator"])
    if (images := config["data"].get("evaluate_on", "test")) != "test":
        measured = [measured, images]
    return f"{hash_of(configuration)}-{identify_data(fingerprint, splits)}-{hash_of(measured)}"


def decisive_options(config: dict[str, Any]) -> dict[str, Any]:
    """The options that decide a result on given data."""
    readouts = config["trainer"].get("readouts")
    return {
        "method": by_content(config["method"]),
        "seed": config["seed_everything"],
        **{name: config["trainer"][name] for name in DECIDING},
        **({"readouts": readouts} if readouts and readouts["heads"] else {}),
    }


def identify_data(fingerprint: str, splits: list[ClientSplit]) -> str:
    """Hash of a data set and of what each client gets of it."""
    return hash_of([fingerprint, [[split.classes, _hashes(split.train), _hashes(split.test)] for split in splits]])


def learned_part(identity: str) -> str:
    """The two hashes that evaluation compares."""
    return identity.rpartition("-")[0]


def by_content(value: Any, name: str = "") -> Any:
    """The same nested values with every file that is named as ``weights`` replaced by its hash."""
    if isinstance(value, dict):
        return {key: by_content(part, key) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [by_content(part, name) for part in value]
    if not name.endswith("weights") or not isinstance(value, str) or not Path(value).is_file():
        return value
    with Path(value).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(tasks: Iterable[np.ndarray]) -> list[str]:
    return [hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() for ids in tasks]


def hash_of(value: Any) -> str:
    """SHA-256 of plain values, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


CHECKPOINT, CONFIG, MANIFEST = "checkpoint.pt", "config.yaml", "manifest.json"


class RunDirectory(Callback):
    """Makes the run's directory after all checks; the first of the callbacks.

    Args:
        folder: where version_N is made.
        config: text of the resolved configuration.
        save_manifest: writes the split to a file.
        existing: directory of a run to be continued.
    """

    def __init__(
        self, folder: Path, config: str, save_manifest: Callable[[str], None], existing: Path | None = None
    ) -> None:
        self.folder, self.config, self.save_manifest, self.path = folder, config, save_manifest, existing
        self.is_new = existing is None
        self.handle: int | None = None

    def on_fit_start(self, run: RunState) -> None:
        """Make the directory with config.yaml and manifest.json, and lock it."""
        if self.path is None:
            self.path = new_version(self.folder)
            write_atomically(self.path / CONFIG, self.config.encode())
            self.save_manifest(str(self.path / MANIFEST))
        self.handle = lock(self.path)
        run.run_dir = self.path

    def discard(self) -> bool:
        """Remove a new directory that never got a checkpoint; returns whether there is one to continue from."""
        if self.path is None:
            return False
        if self.is_new and not (self.path / CHECKPOINT).exists():
            shutil.rmtree(self.path, ignore_errors=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
            return False
        return True

    def release(self) -> None:
        """Unlock the directory."""
        if self.handle is not None:
            os.close(self.handle)


def new_version(folder: Path) -> Path:
    """Make the next ``folder/version_N``; safe against other processes."""
    number = int(runs[-1].name[8:]) + 1 if (runs := versions(folder)) else 0
    while True:
        path = folder / f"version_{number}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def versions(folder: Path) -> list[Path]:
    """Directories of all runs in a folder, oldest first."""
    found = [path for path in folder.glob("version_*") if path.is_dir() and path.name[8:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[8:]))


def check_writable(folder: Path) -> None:
    """Check that a folder can be made and written, leaving nothing behind.

    Raises:
        ValueError: if it cannot.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"run directory {str(folder)!r} cannot be written ({error.strerror}): choose another "
            "--trainer.default_root_dir."
        ) from error


def lock(path: Path) -> int:
    """Lock a run directory until the process ends.

    Raises:
        ValueError: if another process holds it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"run directory {str(path)!r} is in use: wait for the process that trains in it.") from None
    return handle


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file itself, that of a run directory, or the newest below a folder.

    Raises:
        ValueError: if there is none.
    """
    if path.is_file():
        return path
    files = [path / CHECKPOINT] if (path / CHECKPOINT).is_file() else list(path.rglob(CHECKPOINT))
    if not files:
        missing = "has no checkpoint.pt" if path.is_dir() else "does not exist"
        raise ValueError(f"checkpoint {str(path)!r} {missing}: run fedlscl fit first, or name another run directory.")
    return max(files, key=lambda file: file.stat().st_mtime)


def last_checkpoint(folder: Path, identity: str) -> Path | None:
    """Checkpoint of the newest run in a folder that has one; None if there is nothing to continue.

    A newer run without a checkpoint was stopped before its first one: if the checkpoint found is of another
    configuration, it is that newer run that has to start again.
    """
    runs = versions(folder)
    for run in reversed(runs):
        file = run / CHECKPOINT
        if file.is_file():
            return file if run == runs[-1] or load_last_good(file)["identity"] == identity else None
    return None
