"""What travels between client and server: named tensors, and who sent them."""

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
LARGEST_HEADER = 4 * 2**20
"""Bytes of a message that describe its tensors; a ViT-B/16 needs some 20,000."""


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
    """Detach and copy to the CPU what leaves a client or the server."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def num_bytes(payload: Payload) -> int:
    """Size of the message as it is really serialised (safetensors); its form decides, and is serialised once."""
    return _num_bytes(tuple((name, value.shape, value.dtype) for name, value in payload.items())) if payload else 0


@lru_cache(maxsize=1024)
def _num_bytes(form: tuple[tuple[str, torch.Size, torch.dtype], ...]) -> int:
    return len(write_payload({name: torch.zeros(shape, dtype=dtype) for name, shape, dtype in form}))


def write_payload(payload: Payload) -> bytes:
    """The message as safetensors."""
    return save({name: value.contiguous() for name, value in payload.items()})


def read_payload(data: bytes, limit: int | None = None) -> Payload:
    """Tensors of a message that anybody may have written; see ``read_message``."""
    return read_message(data, limit)[1]


def read_message(data: bytes, limit: int | None = None) -> tuple[dict[str, str], Payload]:
    """Metadata and tensors of a message that anybody may have written; nothing in it is ever executed.

    Tensors get memory of their own, since its alignment may decide the last bit of a product.

    Args:
        data: safetensors.
        limit: most bytes that are looked at.

    Raises:
        ValueError: in one line, whatever the bytes are, if they are not one whole message.
    """
    if limit is not None and len(data) > limit:
        raise ValueError(f"message of {len(data)} bytes is larger than {limit}")
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"message of {len(data)} bytes is cut short, or no safetensors")
    if size > LARGEST_HEADER:
        raise ValueError(f"message has a header of {size} bytes, more than {LARGEST_HEADER}")
    try:
        # The library keeps one of two tensors of the same name without a word.
        metadata = json.loads(data[8 : 8 + size], object_pairs_hook=_once).get("__metadata__", {})
        mapped = load(data)
        names = [name for name, value in mapped.items() if value.dtype == torch.bool and _holds_more_than_bits(value)]
        payload = {name: value.clone() for name, value in mapped.items()}
    except Exception as error:  # The library raises one kind for each way of being broken, and torch has its own.
        raise ValueError(f"message is no safetensors ({one_line(error)})") from None
    if names:
        raise ValueError(f"message has a truth value other than 0 and 1 in {one_line(names[0])!r}")
    return metadata, payload


def one_line(value: Any, length: int = 80) -> str:
    """The beginning of what somebody else wrote, fit for a log."""
    text = " ".join(str(value).split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def _holds_more_than_bits(value: Tensor) -> bool:
    return bool((value.view(torch.uint8) > 1).any())
