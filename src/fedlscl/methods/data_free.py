"""What TARGET and MFCL share: at the end of a task the server makes images out of the global net."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedlscl.federated.client import Client
from fedlscl.federated.method import Progress, Stage
from fedlscl.federated.payload import Payload, Upload
from fedlscl.methods.fedavg import FedAvg
from fedlscl.nets.net import Net
from fedlscl.nets.synthesizer import start_size

SYNTHESIS = "synthesis."
"""Begins the names of what the server adds to its answer and clients keep."""

CLASSES = SYNTHESIS + "classes"
"""The old classes: what any client had met when the images were made."""


@dataclass(kw_only=True)
class DataFree(FedAvg):
    """FedAvg of CNNs whose server synthesises at the end of every task but the run's last."""

    averages: ClassVar = True
    noise_dim: int = 256
    """Width of the synthesizer's input."""
    synthesis_size: int = 32
    """Pixels of synthetic images; the CNN scales them to its own input."""
    synthesis_channels: Sequence[int] = (128, 128, 64)
    """Feature maps of the synthesizer, doubling in size up to ``synthesis_size``; both papers' for small images."""
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool), init=False, repr=False)
    parcel: Payload = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse sizes that the synthesizer cannot reach, and nets without batch statistics of their own."""
        super().__post_init__()
        start_size(self.synthesis_channels, self.synthesis_size)
        if self.foundation is not None:
            raise ValueError(f"foundation is none of {type(self).__name__}'s: leave it out, it trains a small_model.")

    @abstractmethod
    def synthesise(self, teacher: Net, classes: Tensor) -> Iterator[Stage]:
        """Learn from the global net what it knows of ``classes`` and put what clients need into ``parcel``."""

    def server_stages(self, uploads: list[Upload], progress: Progress) -> Iterator[Stage]:
        """Note new classes, and synthesise where another task follows."""
        if not progress.last:
            return
        met = torch.stack([upload.class_counts for upload in uploads]).sum(0) > 0
        self.seen = met | self.seen if len(self.seen) else met
        if not progress.final:
            teacher = self.build_net(0, len(met))
            teacher.load_state_dict(self.average(uploads))
            classes = self.seen.nonzero()[:, 0]
            self.parcel = {CLASSES: classes}
            yield from self.synthesise(teacher, classes)

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """The average, and what was synthesised."""
        parcel, self.parcel = self.parcel, {}
        return [{**answer, **parcel} for answer in super().aggregate(uploads, progress)]

    def download(self, client: Client, payload: Payload) -> None:
        """Take over the average and keep the rest."""
        kept = {name: value for name, value in payload.items() if name.startswith(SYNTHESIS)}
        client.memory |= kept
        super().download(client, {name: value for name, value in payload.items() if name not in kept})

    def end_task(self, client: Client) -> None:
        """The global model becomes the teacher."""
        client.snapshot()

    def state_dict(self) -> dict[str, Any]:
        """Which classes any client has met."""
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.seen = state["seen"]
