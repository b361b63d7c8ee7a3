"""The whole federation in one file: tensors and numbers only, replaced in one step, refused when damaged."""

import hashlib
import io
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

VERSION = 2
"""Since 2 the identity covers all pixels and the class names."""
PARTS = {
    "configuration": "use the config.yaml beside it and the same weights files",
    "data set or split": "use the images, labels and class names of that run, and the config.yaml beside it",
    "precision": "use the trainer.precision and the device that it was trained with",
}
"""Of an identity, separated by hyphens, with the remedy where they differ."""
MAGIC = b"fedlscl\n"
logger = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A checkpoint is not what was once written."""


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at ``path`` is kept.

    Example:
        >>> previous(Path("checkpoint.pt")).name
        'checkpoint.previous.pt'
    """
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside the target, flush to disk, then rename: a crash or a full disk leaves the last good one.

    The one that is replaced stays as ``previous(path)``; that costs a link.
    """
    buffer = io.BytesIO()
    torch.save(canonical({"version": VERSION, **state}), buffer)
    body = buffer.getbuffer()
    digest = hashlib.sha256(body).digest()
    write_atomically(path, MAGIC, digest, body, kept=previous(path))


def load_last_good(path: Path, identity: str = "") -> dict[str, Any]:
    """Read a checkpoint, or the one before it where it is damaged; which one it is, is logged.

    The good one then takes the damaged one's place, so that the next one that is kept is good, too.

    Raises:
        ValueError: as ``load_checkpoint``, if there is no good one.
    """
    try:
        return load_checkpoint(path, identity)
    except DamagedError as error:
        older, flaw = previous(path), error
    try:
        state = load_checkpoint(older, identity)
    except ValueError:
        raise flaw from None
    logger.warning(f"{flaw} Going on from {str(older)!r}, the one before it.")
    link(older, path)
    return state


def canonical(value: Any, storages: set[int] | None = None) -> Any:
    """The same values without a history: what is equal becomes equal bytes, resumed or not.

    Pickle writes an object that it meets again as a reference, so equal strings must be one object, and every tensor
    gets a storage of its own and of its size. State dicts lose their ``_metadata``, which no module here reads.
    """
    storages = set() if storages is None else storages
    if isinstance(value, torch.Tensor):
        tensor, pointer = value.detach().cpu(), value.untyped_storage().data_ptr()
        is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        is_first = pointer not in storages
        storages.add(pointer)
        return tensor if is_whole and is_first else tensor.clone()
    if isinstance(value, dict):
        return {canonical(key, storages): canonical(part, storages) for key, part in value.items()}
    if isinstance(value, list):
        return [canonical(part, storages) for part in value]
    return sys.intern(value) if isinstance(value, str) else value


def load_checkpoint(path: Path, identity: str = "") -> dict[str, Any]:
    """Read a checkpoint; nothing in it is ever unpickled beyond tensors and plain values.

    Args:
        path: the file.
        identity: of the configuration that it has to belong to; the beginning of one suffices.

    Raises:
        DamagedError: if the file is damaged or no checkpoint of ours.
        ValueError: if it does not exist, or is of another version, configuration, data set, split or precision.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist: give --ckpt_path last or the path of one.")
    data = path.read_bytes()
    head = len(MAGIC) + hashlib.sha256().digest_size
    if not data.startswith(MAGIC) or len(data) <= head:
        raise DamagedError(f"checkpoint {str(path)!r} is not one of fedlscl, or cut short: choose another file.")
    body = memoryview(data)[head:]
    if hashlib.sha256(body).digest() != data[len(MAGIC) : head]:
        raise DamagedError(f"checkpoint {str(path)!r} is damaged (its checksum differs): choose an earlier one.")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        is_ours = type(state["version"]) is int and type(state["identity"]) is str
    except Exception as error:  # A checksum can be forged, and torch raises whatever the bytes make it raise.
        raise DamagedError(
            f"checkpoint {str(path)!r} holds more or less than tensors and plain values ({type(error).__name__}): "
            "nothing in it was run; choose another file."
        ) from None
    if not is_ours:
        raise DamagedError(f"checkpoint {str(path)!r} does not say what it belongs to: choose another file.")
    if state["version"] != VERSION:
        remedy = "upgrade it" if state["version"] > VERSION else "start a new run, or use the version that wrote it"
        raise ValueError(
            f"checkpoint {str(path)!r} has version {state['version']}, this program reads {VERSION}: {remedy}."
        )
    saved, wanted = state["identity"].split("-"), identity.split("-")
    if not state["identity"].startswith(identity):
        other = (part for part, old, new in zip(PARTS, saved, wanted, strict=False) if old != new)
        part = next(other, "configuration")
        raise ValueError(
            f"checkpoint {str(path)!r} belongs to another {part}: {PARTS[part]}, or start a new run without "
            "--ckpt_path."
        )
    return state


def write_atomically(path: Path, *parts: bytes | memoryview, kept: Path | None = None) -> None:
    """Write a file so that readers see the old one or the whole new one, also after a loss of power.

    The old one gets the name ``kept`` where that is given and a link can be made.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if kept is not None:
            link(path, kept)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write {path} ({error.strerror}); what stood there is intact") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def link(path: Path, name: Path) -> None:
    """Give a file one more name in one step; where that cannot be, whatever has the name keeps it."""
    temporary = path.with_name(f".{path.name}.link")
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        try:
            os.replace(temporary, name)
        finally:
            # Replacing a name of the same file does nothing at all.
            temporary.unlink(missing_ok=True)
