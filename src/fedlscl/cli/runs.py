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

CHECKPOINT, CONFIG, MANIFEST = "checkpoint.pt", "config.yaml", "manifest.json"
DECIDING = "rounds_per_task server_every max_tasks participation failure_rate max_norm_ratio upload_gb".split()
"""Options of the trainer that decide the result."""


def identify(config: dict[str, Any], fingerprint: str, splits: list[ClientSplit]) -> str:
    """Fingerprint of a run with a resolved configuration: 'configuration-data-measurement', three hashes.

    Data count by pixels, labels, class names and split, weights files by content; paths, names and callbacks do not
    count. Evaluation compares the first two, so that a run may be tested in another precision, or on other images.
    """
    data, trainer, configuration = config["data"], config["trainer"], decisive_options(config)
    defaults = {"augment": "none", "validation_per_class": 0}
    configuration |= {name: data[name] for name, default in defaults.items() if data[name] != default}
    precision, images = chosen_precision(trainer["precision"], trainer["accelerator"]), data["evaluate_on"]
    measured = precision if images == "test" else [precision, images]
    return f"{hash_of(configuration)}-{identify_data(fingerprint, splits)}-{hash_of(measured)}"


def decisive_options(config: dict[str, Any]) -> dict[str, Any]:
    """The options that decide a result on given data."""
    trainer, readouts = config["trainer"], config["trainer"]["readouts"]
    return {
        "method": by_content(config["method"]),
        "seed": config["seed_everything"],
        **{name: trainer[name] for name in DECIDING},
        **({"readouts": readouts} if readouts["heads"] else {}),
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


class RunDirectory(Callback):
    """A run's directory, made and locked after all checks: the first of the callbacks.

    As a context it is unlocked at the end, and removed if an error leaves a new one without a checkpoint.

    Args:
        folder: where version_N is made.
        config: text of the resolved configuration.
        save_manifest: writes the split to a file.
        existing: directory of a run to be continued.
    """

    def __init__(self, folder: Path, config: str, save_manifest: Callable[[str], None], existing: Path | None) -> None:
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

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        can_continue = self.path is not None and (not self.is_new or (self.path / CHECKPOINT).exists())
        if kind and self.path is not None and not can_continue:
            shutil.rmtree(self.path, ignore_errors=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        if self.handle is not None:
            os.close(self.handle)
        if kind and issubclass(kind, KeyboardInterrupt):
            hint = f"continue with --ckpt_path {self.path}" if can_continue else "before the first checkpoint"
            raise KeyboardInterrupt(hint) from None


def new_version(folder: Path) -> Path:
    """Make the next ``folder/version_N``; safe against other processes."""
    number = int(runs[-1].name[8:]) + 1 if (runs := versions(folder)) else 0
    while True:
        try:
            (path := folder / f"version_{number}").mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1


def versions(folder: Path) -> list[Path]:
    """Directories of all runs in a folder, oldest first."""
    found = [path for path in folder.glob("version_*") if path.is_dir() and path.name[8:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[8:]))


def check_writable(folder: Path) -> None:
    """Raise a ValueError if a folder cannot be made and written; leaves nothing behind."""
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
    """Lock a run directory until the process ends; a ValueError says that another process holds it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"run directory {str(path)!r} is in use: wait for the process that trains in it.") from None
    return handle


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file itself, that of a run directory, or the newest below a folder; a ValueError if none exists."""
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
    file = next((run / CHECKPOINT for run in reversed(runs) if (run / CHECKPOINT).is_file()), None)
    if file is None or file.parent == runs[-1] or load_last_good(file)["identity"] == identity:
        return file
    return None
