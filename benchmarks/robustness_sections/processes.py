"""Runs in processes of their own that can be killed, forked from one that has imported everything."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import yaml

import tiny_methods

TESTS = Path(__file__).parents[2] / "tests"
FIT, RESUME = ["fit", "--config", "config.yaml"], ["--ckpt_path", "last"]
KILLED = -signal.SIGKILL
FILES = ("checkpoint.pt", "results.json", "matrix.csv", "rounds.csv", "config.yaml", "manifest.json")
"""What a resumed run has to equal byte for byte."""
DATA = {"dataset": "fake", "fake_classes": 6, "num_clients": 2, "num_tasks": 2, "private_classes": 2,
        "public_classes": 2, "train_per_class": 8, "test_per_class": 4, "image_size": 16}  # fmt: skip


class Zygote:
    """Starts command lines, each in a fresh process."""

    def __enter__(self) -> "Zygote":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
        command = [sys.executable, str(TESTS / "resume_zygote.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, folder: Path, *arguments: str, method: str = "FedLSCL", **options: object) -> int:
        """Exit status of a run in a folder."""
        message = {"arguments": arguments, "folder": str(folder), "method": method, "deadly": None, "watched": False}
        print(json.dumps(message | options), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


def prepare(folder: Path, method: str = "FedLSCL") -> Path:
    """A folder with a configuration: two clients, two tasks of two rounds, tiny nets."""
    folder.mkdir(parents=True)
    trainer = {"rounds_per_task": 2, "accelerator": "cpu"}
    config = {"trainer": trainer, "method": tiny_methods.configuration(method), "data": DATA}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def checkpoint_in(folder: Path) -> Path:
    """The only run's checkpoint."""
    (path,) = folder.glob("runs/*/version_*/checkpoint.pt")
    return path


def differing(folder: Path, whole: Path) -> list[str]:
    """Files that are not the same in both runs."""
    found, wanted = checkpoint_in(folder), checkpoint_in(whole)
    return [name for name in FILES if found.with_name(name).read_bytes() != wanted.with_name(name).read_bytes()]
