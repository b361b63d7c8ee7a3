"""MFCL (Babakniya et al., NeurIPS 2023, arXiv 2311.07784): FedAvg with a synthesizer that the server trains.

Ours: old classes are those that any client has met, the cross-entropy on real images is over the client's own classes
of the task, and the balanced one over these and the old ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fedlscl.data import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Stage
from fedlscl.federated.payload import Payload, outgoing
from fedlscl.methods.data_free import (
    CLASSES,
    SYNTHESIS,
    DataFree,
    GeneratorWithTeacher,
    MimickingModule,
    SynthesisModule,
    Synthesizer,
)
from fedlscl.modules.learner import ClassificationModule
from fedlscl.nets.net import Net

NET = SYNTHESIS + "net."
"""Begins the names of the synthesizer's weights in an answer and in a client's memory."""


@dataclass(kw_only=True)
class MFCL(DataFree):
    """FedAvg whose clients replay a synthesizer's images; it comes down once per task and learns from task to task."""

    card: ClassVar = MethodCard(
        "NeurIPS 2023",
        "2311.07784",
        trains="CNN and head from scratch; the server an image synthesizer",
        uploads="CNN, head",
    )

    noise_dim: int = 1000
    """Width of the synthesizer's input."""
    replay_size: int = 128
    """Synthetic images beside every batch of real ones."""
    lambda_head: float = 1.0
    """w_ft, of the cross-entropy over old and new classes that trains the head alone."""
    lambda_features: float = 0.1
    """w_kd, of the features' distance through the old head."""
    synthesis_steps: int = 500
    """Steps of the synthesizer per task (pi; 100 in the released code, the number is ours)."""
    synthesis_batch: int = 128
    """Images of each."""
    synthesis_lr: float = 1e-3
    """Its learning rate."""
    synthesis_temperature: float = 1000.0
    """tau by which the teacher's logits are divided before it is asked to be sure."""
    lambda_even: float = 1.0
    """w_ie, of the classes' unevenness."""
    lambda_norm: float = 50.0
    """w_bn, of the divergence from the BatchNorm statistics."""
    lambda_smooth: float = 1e-3
    """w_noise, of the distance from a blurred copy."""
    synthesizer: Payload = field(default_factory=dict, init=False, repr=False)

    def stages(self, client: Client) -> Iterator[Stage]:
        """Plain training until there are synthetic images; who missed the round that brought them has none."""
        loader = client.loader(client.train_ids, self.batch_size)
        if client.previous is None or CLASSES not in client.memory:
            module = ClassificationModule(client.net, client.classes, lr=self.lr)
        else:
            weights = {n.removeprefix(NET): value for n, value in client.memory.items() if n.startswith(NET)}
            module = MimickingModule(
                client.net,
                client.previous,
                self._build_synthesizer(client.net, weights),
                client.memory[CLASSES],
                client.classes,
                self.replay_size,
                self.lambda_head,
                self.lambda_features,
                lr=self.lr,
            )
        yield Stage("train", module, loader, self.local_epochs)

    def synthesise(self, teacher: Net, classes: Tensor) -> Iterator[Stage]:
        """Train the synthesizer on, against the new global net."""
        synthesizer = self._build_synthesizer(teacher, self.synthesizer)
        module = SynthesisModule(
            GeneratorWithTeacher(synthesizer, teacher),
            classes,
            self.synthesis_temperature,
            self.lambda_even,
            self.lambda_norm,
            self.lambda_smooth,
            lr=self.synthesis_lr,
        )
        yield Stage("synthesis", module, list(self._noise()), 1)
        self.synthesizer = outgoing(synthesizer.state_dict())
        self.parcel |= {NET + name: value for name, value in self.synthesizer.items()}

    def _build_synthesizer(self, classifier: Net, weights: Payload) -> Synthesizer:
        """One for a classifier's mean and std, with given weights, or a fresh one where there are none."""
        mean, std = classifier.small.mean.tolist(), classifier.small.std.tolist()
        net = Synthesizer(self.noise_dim, self.synthesis_channels, self.synthesis_size, True, mean, std)
        if weights:
            net.load_state_dict(weights)
        return net

    def _noise(self) -> Iterator[Batch]:
        nothing = torch.full((self.synthesis_batch,), -1)
        for _ in range(self.synthesis_steps):
            yield Batch(torch.randn(self.synthesis_batch, self.noise_dim), nothing, nothing)
