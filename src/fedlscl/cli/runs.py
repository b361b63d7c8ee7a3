"""Run directories: made once, never shared, and found again by --ckpt_path."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fedlscl.federated.callbacks import Callback
from fedlscl.federated.checkpoint import load_last_good, write_atomically

if TYPE_CHECKING:
    from fedlscl.federated.trainer import FederatedTrainer

CHECKPOINT, CONFIG, MANIFEST = "checkpoint.pt", "config.yaml", "manifest.json"


class RunDirectory(Callback):
    """Makes the run's directory when nothing can be refused any more; goes before all other observers.

    Args:
        folder: where version_N is made.
        config: text of the resolved configuration.
        existing: directory of a run to be continued.
    """

    def __init__(self, folder: Path, config: str, existing: Path | None = None) -> None:
        self.folder, self.config, self.path = folder, config, existing
        self.is_new = existing is None
        self.handle: int | None = None

    def on_fit_start(self, trainer: "FederatedTrainer") -> None:
        """Take the directory, and state in it what will run."""
        if self.path is None:
            self.path = new_version(self.folder)
            write_atomically(self.path / CONFIG, self.config.encode())
            trainer.datamodule.save_manifest(str(self.path / MANIFEST))
        self.handle = lock(self.path)
        trainer.run_dir = self.path

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
        """Let other processes continue the run."""
        if self.handle is not None:
            os.close(self.handle)


def new_version(folder: Path) -> Path:
    """Make the next ``folder/version_N``; another process that tries the same gets another number."""
    number = max(map(version_number, versions(folder)), default=-1) + 1
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
    return sorted(found, key=version_number)


def version_number(path: Path) -> int:
    """N of version_N."""
    return int(path.name.removeprefix("version_"))


def check_writable(folder: Path) -> None:
    """Refuse a folder that could not be made or written, and leave nothing behind.

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
    """Hold a run directory until the process ends, however it ends.

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
    """A checkpoint file by itself, by its run directory, or the newest somewhere below a folder.

    Raises:
        ValueError: if there is none.
    """
    if path.is_file():
        return path
    files = [path / CHECKPOINT] if (path / CHECKPOINT).is_file() else list(path.rglob(CHECKPOINT))
    if not files:
        missing = "holds no checkpoint.pt" if path.is_dir() else "does not exist"
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
