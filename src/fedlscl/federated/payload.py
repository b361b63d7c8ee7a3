"""What travels between client and server: named tensors, and who sent them."""

from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import save
from torch import Tensor

Payload = dict[str, Tensor]
"""Tensors by name, on the CPU and detached; never modules, optimizers or data sets."""


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
    """Size of the message as it is really serialised (safetensors)."""
    return len(save({name: value.contiguous() for name, value in payload.items()})) if payload else 0
