"""The whole federation in one file: tensors and numbers only, replaced in one step, refused when damaged."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

VERSION = 1
MAGIC = b"fedlscl\n"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside the target, flush to disk, then rename: a crash or a full disk leaves the last good one."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    body = buffer.getbuffer()
    digest = hashlib.sha256(body).digest()
    write_atomically(path, MAGIC, digest, body)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is ever unpickled beyond tensors and plain values.

    Raises:
        ValueError: if the file is damaged, no checkpoint of ours, or of a newer version.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist: give --ckpt_path last or the path of one.")
    data = path.read_bytes()
    head = len(MAGIC) + hashlib.sha256().digest_size
    if not data.startswith(MAGIC) or len(data) <= head:
        raise ValueError(f"checkpoint {str(path)!r} is not one of fedlscl, or cut short: choose another file.")
    body = memoryview(data)[head:]
    if hashlib.sha256(body).digest() != data[len(MAGIC) : head]:
        raise ValueError(f"checkpoint {str(path)!r} is damaged (its checksum differs): choose an earlier one.")
    state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    if state["version"] > VERSION:
        raise ValueError(
            f"checkpoint {str(path)!r} has version {state['version']}, this program reads up to {VERSION}: upgrade it."
        )
    return state


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that readers see the old one or the whole new one, also after a loss of power."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write {path} ({error.strerror}); what stood there is intact") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
