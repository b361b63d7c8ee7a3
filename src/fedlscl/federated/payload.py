"""Messages between client and server: named tensors, serialised with safetensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

Payload = dict[str, Tensor]
"""Tensors by name, on the CPU and detached; never modules, optimizers or data sets."""
MAX_HEADER = 4 * 2**20
"""Maximum bytes of a safetensors header; that of a ViT-B/16 has about 20,000."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One client's message of one round."""

    client: int
    task: int
    round: int
    payload: Payload
    class_counts: Tensor
    """Training samples of the current task by class, (num_classes,)."""

    @property
    def num_samples(self) -> int:
        """Training samples of the current task: the weight of FedAvg."""
        return int(self.class_counts.sum())


def outgoing(tensors: Mapping[str, Tensor]) -> Payload:
    """Detached copies on the CPU, ready to be sent."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Payload:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def num_bytes(payload: Payload) -> int:
    """Size of a message as serialised; computed once for each set of names, shapes and dtypes."""
    return _num_bytes(tuple((name, value.shape, value.dtype) for name, value in payload.items())) if payload else 0


@lru_cache(maxsize=1024)
def _num_bytes(spec: tuple[tuple[str, torch.Size, torch.dtype], ...]) -> int:
    return len(write_payload({name: torch.zeros(shape, dtype=dtype) for name, shape, dtype in spec}))


def write_payload(payload: Payload, metadata: dict[str, str] | None = None) -> bytes:
    """Serialise tensors and metadata with safetensors."""
    return save({name: value.contiguous() for name, value in payload.items()}, metadata)


def read_message(data: bytes, limit: int | None = None) -> tuple[dict[str, str], Payload]:
    """Metadata and tensors of an untrusted message of at most ``limit`` bytes; nothing in it is executed.

    Tensors are copied, since the alignment of their memory may decide the last bit of a product.

    Raises:
        ValueError: if the bytes are not exactly one message; the text has one line, whatever they contain.
    """
    if limit is not None and len(data) > limit:
        raise ValueError(f"message of {len(data)} bytes is larger than {limit}")
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"message of {len(data)} bytes is cut short, or not safetensors")
    if size > MAX_HEADER:
        raise ValueError(f"message has a header of {size} bytes, more than {MAX_HEADER}")
    try:
        # safetensors silently keeps one of two tensors of the same name.
        metadata = json.loads(data[8 : 8 + size], object_pairs_hook=_unique).get("__metadata__", {})
        mapped = load(data)
        invalid = [n for n, v in mapped.items() if v.dtype == torch.bool and (v.view(torch.uint8) > 1).any()]
        payload = {name: value.clone() for name, value in mapped.items()}
    except Exception as error:  # safetensors and torch raise many kinds of errors.
        raise ValueError(f"message is not safetensors ({one_line(error)})") from None
    if invalid:
        raise ValueError(f"message has a truth value other than 0 and 1 in {one_line(invalid[0])!r}")
    return metadata, payload


def one_line(value: Any, length: int = 80) -> str:
    """The beginning of an untrusted text on one line of printable characters, for logs."""
    text = " ".join(str(value).split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found
