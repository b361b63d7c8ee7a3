"""Checkpoints that broke on the disk, and disks that are full."""

import hashlib
import io
import logging
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from fedlscl.federated.checkpoint import canonical, load_checkpoint, load_last_good, previous
from robustness_sections.processes import FIT, KILLED, RESUME, Zygote, checkpoint_in, differing, prepare


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())


def damage(work: Path, number: int = 300, runs: int = 6, seed: int = 42) -> dict[str, Any]:
    """Half truncated, half with a flipped bit: none may load, the one before has to be used and named.

    Of the whole program ``runs`` go on from a damaged checkpoint, and have to end as if it had been whole.
    """
    picker, found = random.Random(seed), {}
    logger, said = logging.getLogger("fedlscl.federated.checkpoint"), Said()
    logger.addHandler(said)
    logger.propagate = False
    with Zygote() as zygote:
        whole = prepare(work / "whole")
        assert zygote.run(whole, *FIT) == 0
        path = work / "damaged" / "checkpoint.pt"
        path.parent.mkdir()
        good, older = checkpoint_in(whole).read_bytes(), previous(checkpoint_in(whole)).read_bytes()
        wanted = content(load_checkpoint(previous(checkpoint_in(whole))))
        for kind in ("truncated", "bit flipped"):
            counts = {"damaged": 0, "loaded silently": 0, "previous used": 0, "previous named": 0}
            for _ in range(number // 2):
                # Files of their own: the last trial left two names of one.
                for name, data in ((path, broken(good, kind, picker)), (previous(path), older)):
                    name.unlink(missing_ok=True)
                    name.write_bytes(data)
                said.lines.clear()
                counts["damaged"] += 1
                counts["loaded silently"] += loads(path)
                counts["previous used"] += content(load_last_good(path)) == wanted
                counts["previous named"] += len(said.lines) == 1 and str(previous(path)) in said.lines[0]
            found[kind] = counts
        ends = 0
        for n in range(runs):
            folder = prepare(work / f"run-{n}")
            assert zygote.run(folder, *FIT, deadly=("server", 3 + n % 2)) == KILLED
            path = checkpoint_in(folder)
            path.write_bytes(broken(path.read_bytes(), ("truncated", "bit flipped")[n % 2], picker))
            assert zygote.run(folder, *FIT, *RESUME) == 0, (folder / "log.txt").read_text()
            is_named = str(previous(path.relative_to(folder))) in (folder / "log.txt").read_text()
            ends += is_named and differing(folder, whole) == []
    logger.removeHandler(said)
    return found | {"whole program": {"damaged": runs, "named the previous one and ended equal to the byte": ends}}


def content(state: dict[str, Any]) -> bytes:
    """Digest of all values of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(canonical(state), buffer)
    return hashlib.sha256(buffer.getbuffer()).digest()


def broken(data: bytes, kind: str, picker: random.Random) -> bytes:
    """Bytes cut short anywhere, or with one bit flipped anywhere."""
    if kind == "truncated":
        return data[: picker.randrange(len(data))]
    changed, place = bytearray(data), picker.randrange(len(data))
    changed[place] ^= 1 << picker.randrange(8)
    return bytes(changed)


def loads(path: Path) -> bool:
    """Whether a checkpoint is taken for a good one."""
    try:
        load_checkpoint(path)
    except ValueError as error:
        assert "\n" not in str(error)
        return False
    return True


def full_disk(work: Path, injected: int = 12, real: int = 8, seed: int = 42) -> dict[str, Any]:
    """A disk that fills up: the run ends with a line, the last good checkpoint loads, and with room it goes on.

    ``injected`` times the n-th call fails; ``real`` times it is a small tmpfs with so much room left, where one can be
    mounted.
    """
    picker, found = random.Random(seed), {}
    with Zygote() as zygote:
        whole = prepare(work / "whole")
        assert zygote.run(whole, *FIT) == 0
        size = checkpoint_in(whole).stat().st_size
        counts = dict.fromkeys(("failures", "said so", "last good intact", "resumed equal to the byte"), 0)
        while counts["failures"] < injected:
            folder = prepare(work / f"injected-{picker.random()}")
            status = zygote.run(folder, *FIT, full=picker.randint(8, 45))
            note(counts, zygote, folder, whole, status)
        found["injected"] = counts
        counts, disk = dict.fromkeys(counts, 0), work / "disk"
        while counts["failures"] < real:
            disk.mkdir()
            room = round(size * picker.uniform(0.8, 3.5))
            if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room + 60000}", "tmpfs", str(disk)]).returncode:
                disk.rmdir()
                found["small tmpfs"] = "none can be mounted here"
                return found
            try:
                folder = prepare(disk / "real")
                status = zygote.run(folder, *FIT)
                if status:
                    subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(disk)], check=True)
                    note(counts, zygote, folder, whole, status)
                shutil.rmtree(folder)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
                disk.rmdir()
        found["small tmpfs"] = counts
    return found


def note(counts: dict[str, int], zygote: Zygote, folder: Path, whole: Path, status: int) -> None:
    """Count what became of a run on a full disk; one that ended well met no failure."""
    log = (folder / "log.txt").read_text()
    if status == 0:
        return
    counts["failures"] += 1
    counts["said so"] += "No space left on device" in log and status == 2
    files = list(folder.glob("runs/*/version_*/checkpoint.pt"))
    counts["last good intact"] += all(map(loads, files))
    assert os.path.exists(folder / "config.yaml")
    assert zygote.run(folder, *FIT, *RESUME) == 0, (folder / "log.txt").read_text()
    newest = max(folder.glob("runs/*/version_*"), key=lambda path: path.stat().st_mtime)
    for run in folder.glob("runs/*/version_*"):
        if run != newest:
            shutil.rmtree(run)
    counts["resumed equal to the byte"] += differing(folder, whole) == []
