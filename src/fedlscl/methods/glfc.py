"""GLFC (Dong et al., CVPR 2022, arXiv 2203.11473) on FedAvg: compensation for forgetting at clients and server.

Deviations from the released code, with reasons in docs/methods/glfc.md:
- the proxy says which of its answers is the best old model in place of sending two models in every round;
- its best score starts anew with every task, and the pair of models moves on once per task;
- Adam without a schedule; no exemplar is chosen twice; uploads are averaged as in FedAvg here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Progress, Stage
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.inversion import prototype_gradients
from fedlscl.methods.fedavg import FedAvg
from fedlscl.methods.glfc_client import BEST, best_model, extended_memory, mean_entropy, perturbed_prototypes
from fedlscl.methods.glfc_proxy import Proxy
from fedlscl.modules.compensation import CompensationModule
from fedlscl.nets.net import Net
from fedlscl.nets.prototype_encoder import PrototypeEncoder
from fedlscl.nets.small import SmallClassifier

PROXY = "proxy."
"""Prefix of what a message has beside a model."""
GRADIENTS = PROXY + "gradients"


@dataclass(kw_only=True)
class GLFC(FedAvg):
    """Clients keep exemplars and weigh gradients; a proxy picks the model to distil from, on inverted prototypes."""

    card: ClassVar = MethodCard(
        "CVPR 2022",
        "2203.11473",
        trains="small CNN and head, with exemplars",
        uploads="all that is trained, gradients of prototypes",
    )

    averages: ClassVar = True
    memory_size: int = 800
    """Exemplars of a client, shared evenly among its old classes (ours: 20 for each of 40; 2000 in the paper)."""
    entropy_rise: float = 1.2
    """r_h in nats: a new task is taken to have come where the mean entropy rises by more."""
    oracle_signal: bool = False
    """Tell clients when a task begins in place of detecting it (ours)."""
    bce_classes: Literal["global_seen", "client_seen"] = "global_seen"
    """Whose classes are pushed down: all that the server knows of (released code), or the client's own (ours)."""
    prototype_size: int = 32
    """Pixels of the images whose gradients are sent."""
    perturbation_steps: int = 50
    """Steps of SGD that change a prototype before its gradient is taken."""
    perturbation_lr: float = 0.2
    """Their rate."""
    reconstruction_steps: int = 250
    """Calls of L-BFGS for each prototype at the proxy: nearly all that the server computes."""
    monitor_images: int = 20
    """Last iterates of each reconstruction that the proxy keeps."""
    proxy: Proxy = field(default_factory=Proxy, init=False, repr=False)
    """Server state."""

    def __post_init__(self) -> None:
        """Refuse a frozen ViT, through which no prototype can be perturbed."""
        super().__post_init__()
        if self.foundation is not None:
            raise ValueError("foundation is set, but GLFC trains a CNN: leave it out and choose a small_model.")

    def stages(self, client: Client) -> Iterator[Stage]:
        """Train on new data and memory; until the server has moved on, the teacher is the best model it named last."""
        signal = self._detect(client)
        if signal and client.task:
            client.buffer = extended_memory(client, self.memory_size)
        teacher = best_model(client) if client.memory["signal"] and client.task else client.previous
        columns, old = self._classes(client)
        new = client.classes if len(client.buffer) else None
        module = CompensationModule(client.net, columns, new, teacher, old, lr=self.lr)
        ids = torch.cat([client.train_ids, client.buffer.ids])
        yield Stage("train", module, client.loader(ids, self.batch_size), self.local_epochs)

    def upload(self, client: Client) -> Payload:
        """The net; after a signal also the gradients of perturbed prototypes, without labels."""
        payload = client.net.state_dict()
        if client.memory["signal"] and len(client.train_ids):
            payload[GRADIENTS] = self._gradients(client)
        return outgoing(payload)

    def expects(self, upload: Upload, net: Net) -> Payload | None:
        """A net, with one gradient of each class of the task after a signal."""
        expected = dict(net.state_dict())
        if GRADIENTS in upload.payload:
            encoder = PrototypeEncoder(len(upload.class_counts), self.prototype_size)
            size = sum(parameter.numel() for parameter in encoder.parameters())
            expected[GRADIENTS] = torch.empty(int((upload.class_counts > 0).sum()), size, device="meta")
        return expected

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """FedAvg's model, and whether the proxy finds it the best of its task so far."""
        models = [replace(upload, payload=without_proxy(upload.payload)) for upload in uploads]
        model = self.average(models)
        met = self.proxy.meet([upload.class_counts for upload in uploads], progress.task)
        gradients = [upload.payload[GRADIENTS] for upload in uploads if GRADIENTS in upload.payload]
        encoder = PrototypeEncoder(len(met), self.prototype_size)
        bounds = self.reconstruction_steps, self.monitor_images
        is_shift = bool(gradients) and self.proxy.watch(torch.cat(gradients), encoder, progress.task, *bounds)
        net = SmallClassifier(self.small_model, len(met), self.small_image_size)
        net.load_state_dict(model)
        said = {"met": met, "shift": torch.tensor(is_shift), "best": torch.tensor(self.proxy.is_best(net))}
        return [model | {PROXY + name: value for name, value in said.items()}] * len(uploads)

    def download(self, client: Client, payload: Payload) -> None:
        """Take over the model; at a shift the best of the task before becomes the teacher until the next shift."""
        model = without_proxy(payload)
        client.net.load_state_dict(model)
        if payload[PROXY + "shift"]:
            client.previous = best_model(client)
        if payload[PROXY + "best"]:
            client.memory |= {BEST + name: value for name, value in model.items()}
        client.memory |= {"met": payload[PROXY + "met"], "signal": torch.tensor(False)}

    def state_dict(self) -> dict[str, Any]:
        """What the proxy knows."""
        return {"proxy": dict(self.proxy.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.proxy.state = dict(state["proxy"])

    def _detect(self, client: Client) -> bool:
        if self.oracle_signal:
            signal = client.answered == 0
        elif not len(client.train_ids):
            signal = False
        else:
            entropy = mean_entropy(client, self._classes(client)[0])
            signal = bool(entropy - client.memory.get("entropy", 0.0) > self.entropy_rise)
            client.memory["entropy"] = entropy
        client.memory["signal"] = client.memory.get("signal", torch.tensor(False)) | signal
        return signal

    def _classes(self, client: Client) -> tuple[Tensor, Tensor]:
        """Columns of the loss, and those that the old model answers for: its own, the present task's left out."""
        if self.bce_classes == "client_seen":
            return client.seen, client.old[~torch.isin(client.old, client.classes)]
        known = client.memory.get("met", torch.full((client.data.data.num_classes,), -1)).clone()
        is_old = (known >= 0) & (known < client.task)
        is_old[client.classes], known[client.seen] = False, client.task
        return (known >= 0).nonzero().flatten(), is_old.nonzero().flatten()

    def _gradients(self, client: Client) -> Tensor:
        columns, _ = self._classes(client)
        shape = self.prototype_size, self.perturbation_steps, self.perturbation_lr
        images, labels = perturbed_prototypes(client, columns, *shape)
        return prototype_gradients(PrototypeEncoder(client.data.data.num_classes, images.shape[-1]), images, labels)


def without_proxy(payload: Payload) -> Payload:
    """The model in a message."""
    return {name: value for name, value in payload.items() if not name.startswith(PROXY)}
