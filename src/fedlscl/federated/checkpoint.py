"""Checkpoints: tensors and plain values in one file, replaced atomically, with a checksum and one predecessor."""

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
"""Format of the file; since 2 the identity covers all pixels and the class names."""
PARTS = {
    "configuration": "use the config.yaml beside it and the same weights files",
    "data set or split": "use the images, labels and class names of that run, and the config.yaml beside it",
    "precision": "use the trainer.precision and the device that it was trained with",
}
"""Parts of an identity, which hyphens separate, with the remedy for a difference."""
MAGIC = b"fedlscl\n"
logger = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A checkpoint is damaged or not a checkpoint."""


def previous(path: Path) -> Path:
    """Path of the checkpoint that was written before the one at ``path``, such as checkpoint.previous.pt."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; the one it replaces stays as ``previous(path)``."""
    buffer = io.BytesIO()
    torch.save(canonical({"version": VERSION, **state}), buffer)
    body = buffer.getbuffer()
    write_atomically(path, MAGIC, hashlib.sha256(body).digest(), body, kept=previous(path))


def load_last_good(path: Path, identity: str = "") -> dict[str, Any]:
    """Read a checkpoint as ``load_checkpoint``; the previous one, with a warning, replaces one that is damaged."""
    try:
        return load_checkpoint(path, identity)
    except DamagedError as damage:
        older = previous(path)
        try:
            state = load_checkpoint(older, identity)
        except DamagedError:
            remedy = "continue from a copy, or start a new run."
            raise DamagedError(f"{damage} {str(older)!r}, the one before it, is damaged, too: {remedy}") from None
        except ValueError:
            raise damage from None
        logger.warning(f"{damage} Resuming from {str(older)!r}, the one before it.")
        _link(older, path)
        return state


def canonical(value: Any, storages: set[int] | None = None) -> Any:
    """The same values in a form whose pickle depends on the values alone, so that equal states give equal bytes.

    Pickle refers to objects it has met before, so equal strings are interned, and each tensor gets its own storage of
    its size. State dicts lose their ``_metadata``, which no module here reads.
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
    """Read a checkpoint of a run with this fingerprint, or a prefix of it; only tensors and plain values are unpickled.

    Raises:
        DamagedError: if the file is damaged or not a checkpoint of fedlscl.
        ValueError: if it does not exist, or is of another version, configuration, data set, split or precision.
    """
    name = f"checkpoint {str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{name} does not exist: give --ckpt_path last or the path of one.")
    data = path.read_bytes()
    start = len(MAGIC) + hashlib.sha256().digest_size
    if not data.startswith(MAGIC) or len(data) <= start:
        raise DamagedError(f"{name} is not a checkpoint of fedlscl, or cut short: choose another file.")
    body = memoryview(data)[start:]
    if hashlib.sha256(body).digest() != data[len(MAGIC) : start]:
        raise DamagedError(f"{name} is damaged (its checksum differs): choose an earlier one.")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        has_header = type(state["version"]) is int and type(state["identity"]) is str
    except Exception as error:  # A checksum can be forged, and torch raises many kinds of errors.
        raise DamagedError(
            f"{name} must contain tensors and plain values only ({type(error).__name__}): nothing in it was run; "
            "choose another file."
        ) from None
    if not has_header:
        raise DamagedError(f"{name} lacks version or identity: choose another file.")
    if state["version"] != VERSION:
        remedy = "upgrade it" if state["version"] > VERSION else "start a new run, or use the version that wrote it"
        raise ValueError(f"{name} has version {state['version']}, this program reads {VERSION}: {remedy}.")
    if not state["identity"].startswith(identity):
        pairs = zip(PARTS, state["identity"].split("-"), identity.split("-"), strict=False)
        part = next((part for part, saved, wanted in pairs if saved != wanted), "configuration")
        raise ValueError(f"{name} belongs to another {part}: {PARTS[part]}, or start a new run without --ckpt_path.")
    return state


def write_atomically(path: Path, *parts: bytes | memoryview, kept: Path | None = None) -> None:
    """Write a file so that readers see the old or the whole new content, also after a power failure.

    The replaced file gets the name ``kept``, where the file system has hard links.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if kept is not None:
            _link(path, kept)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        text = f"could not write {path} ({error.strerror}); its previous content is intact"
        raise OSError(error.errno, text) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _link(path: Path, name: Path) -> None:
    temporary = path.with_name(f".{path.name}.link")
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        try:
            os.replace(temporary, name)
        finally:
            temporary.unlink(missing_ok=True)  # os.replace does nothing if both names are of the same file
