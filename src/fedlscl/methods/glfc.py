"""GLFC (Dong et al., CVPR 2022, arXiv 2203.11473) on FedAvg: compensation for forgetting at clients and server.

Deviations from the released code, with reasons in docs/methods/glfc.md:
- the proxy reports which of its averages is the best old model instead of sending two models in every round;
- its best score is reset with every task, and the old model is replaced once per task;
- Adam without a schedule; no exemplar is chosen twice; uploads are averaged as in FedAvg here.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.data import Buffer
from fedlscl.data.loader import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import MethodCard, Progress, Stage
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.objectives import compensation_weights
from fedlscl.methods.fedavg import FedAvg
from fedlscl.modules import Learner
from fedlscl.nets.net import Frozen, Net, SmallClassifier

BEST = "best."
"""Prefix in a client's memory: the best model of the current task."""
PROXY = "proxy."
"""Prefix in a payload: everything that is not the model."""
GRADIENTS = PROXY + "gradients"
CHUNK = 128
"""Images per forward pass of the proxy."""
SEED = 0
"""Seed of the prototype encoder's weights, equal at clients and proxy."""


class CompensationModule(Learner):
    """Gradient compensation and relation distillation (Eq. 2-6): two binary cross-entropies.

    Args:
        net: is trained.
        columns: classes of the loss, (C,) sorted; every label is among them.
        new: classes of the current task if exemplars are replayed; if None, all samples weigh 1.
        previous: the old model, if there is one; both terms then have weight 1/2.
        old: the part of ``columns`` whose targets are the old model's predictions.
        optimisation: Learner's lr and so on.
    """

    columns: Tensor
    new: Tensor | None
    is_old: Tensor

    def __init__(
        self, net: Net, columns: Tensor, new: Tensor | None = None, previous: Net | None = None,
        old: Tensor | None = None, **optimisation: Any,
    ) -> None:  # fmt: skip
        super().__init__(net, **optimisation)
        self.previous = None if previous is None else Frozen(previous)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("new", new, persistent=False)
        self.register_buffer("is_old", torch.isin(columns, columns[:0] if old is None else old), persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compensation alone, or the mean of compensation and relation."""
        logits = self.net(batch.images, batch.prefix).logits.float()
        targets = (batch.labels[:, None] == self.columns).to(logits)
        weights = None
        if self.new is not None:
            weights = compensation_weights(logits, batch.labels, torch.isin(batch.labels, self.new))[:, None]
        logits = logits[:, self.columns]
        compensation = F.binary_cross_entropy_with_logits(logits, targets, weights)
        if self.previous is None:
            return {"compensation": compensation}
        previous = self.previous(batch.images, batch.prefix).logits.float()[:, self.columns].sigmoid()
        relation = F.binary_cross_entropy_with_logits(logits, torch.where(self.is_old, previous, targets))
        return {"compensation": compensation / 2, "relation": relation / 2}


# Exemplars, task signal, prototypes and the old model of a client.


def extended_memory(client: Client, size: int) -> Buffer:
    """The client's exemplars with those of the previous task's classes added; every class has equally many.

    They are chosen by herding in the features of the current net. A class keeps the first of its order.
    """
    fresh = client.data.train_ids(client.task - 1)
    fresh = fresh[~torch.isin(client.data.data.labels(fresh), client.buffer.labels)]
    num_classes = len(torch.cat([client.buffer.labels, client.data.data.labels(fresh)]).unique())
    if not num_classes:
        return client.buffer
    ids, ranks = herded(client, fresh, size // num_classes)
    ids, ranks = torch.cat([client.buffer.ids, ids]), torch.cat([client.buffer.losses, ranks.float()])
    return Buffer.empty().updated(ids, client.data.data.labels(ids), ranks, per_class=size // num_classes)


def herded(client: Client, ids: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
    """Ids of up to ``per_class`` samples of each class, class by class in herding order, and their rank in it."""
    rows = [F.normalize(output.features.float()).cpu() for _, output in client.infer(ids)]
    labels = client.data.data.labels(ids)
    chosen, ranks = [ids[:0]], [ids[:0]]
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = herding(torch.cat(rows)[members], per_class)
        chosen.append(ids[members[order]])
        ranks.append(torch.arange(len(order)))
    return torch.cat(chosen), torch.cat(ranks)


def herding(features: Tensor, count: int) -> Tensor:
    """Indices of up to ``count`` rows of (n, width), best first (Welling, ICML 2009; iCaRL, arXiv 1611.07725).

    Step j chooses the row that brings the mean of the j chosen ones nearest to the mean of all; no row twice (ours). A
    shorter order is the beginning of a longer one.

    Example:
        >>> herding(torch.tensor([[0.0], [4.0], [2.5], [2.0]]), 2)
        tensor([3, 2])
    """
    features = features.double()
    mean, total = features.mean(0), torch.zeros_like(features[0])
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen = []
    for step in range(1, min(count, len(features)) + 1):
        distance = (mean - (total + features) / step).norm(dim=1)
        best = int(distance.masked_fill(~free, torch.inf).argmin())
        total, free[best] = total + features[best], False
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64)


@torch.no_grad()
def mean_entropy(client: Client, columns: Tensor) -> Tensor:
    """Mean entropy in nats of the net's softmax over ``columns`` on the current task's training samples, a scalar."""
    logits = torch.cat([output.logits.float().cpu()[:, columns] for _, output in client.infer(client.train_ids)])
    return torch.distributions.Categorical(logits=logits).entropy().mean()


def perturbed_prototypes(client: Client, columns: Tensor, size: int, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """The image nearest to the mean of each class of the task, (n, 3, size, size) in 0..1, and the labels (n,).

    Each is changed by SGD on the net's binary cross-entropy over ``columns``, as the paper hides it.
    """
    chosen, _ = herded(client, client.train_ids, 1)
    batch = client.data.fetch(chosen)
    images = F.interpolate(batch.images.float() / 255, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    targets = (batch.labels[:, None] == columns).float()

    def loss(images: Tensor) -> Tensor:
        logits = client.net(images.to(client.net.head.weight.device)).logits.cpu()[:, columns]
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum()

    client.net.eval()
    return perturbed(images, loss, steps, lr), batch.labels


def perturbed(
    images: Tensor, loss: Callable[[Tensor], Tensor], steps: int, lr: float, weight_decay: float = 1e-5
) -> Tensor:
    """Images after ``steps`` of SGD on ``loss(images)``, independent of each other if the loss is a sum over images."""
    images = images.clone()
    for _ in range(steps):
        images.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(images), images)
        images = (images - lr * (gradient + weight_decay * images)).detach()
    return images


def best_model(client: Client) -> Net | None:
    """The latest model that the proxy reported as best of its task; None before the first."""
    weights = {name.removeprefix(BEST): value for name, value in client.memory.items() if name.startswith(BEST)}
    if not weights:
        return None
    net = deepcopy(client.net).requires_grad_(False).eval()
    net.load_state_dict(weights)
    return net


# Prototypes from gradients (Sec. 3.4) by gradient matching (Zhu et al., NeurIPS 2019, arXiv 1906.08935), which is an
# attack on privacy by construction.


class PrototypeEncoder(nn.Module):
    """LeNet with sigmoids, random and not trained: images (n, 3, size, size) in 0..1 to logits (n, num_classes)."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        if size % 4 or size < 4:
            raise ValueError(f"prototype_size must be a positive multiple of 4, got {size}.")
        self.num_classes, self.size, self.width = num_classes, size, 12 * (size // 4) ** 2
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 12, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2),
            nn.Sigmoid(),
        )
        self.classifier = nn.Linear(self.width, num_classes)
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.5, 0.5, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in 0..1, which are not normalised."""
        return self.classifier(self.convolutions(images).flatten(1))


def prototype_gradients(encoder: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradients (n, num_weights) of each image's cross-entropy in the encoder's weights; the classifier comes last."""
    pairs = zip(images, labels, strict=True)
    return torch.stack([_gradient(encoder, image[None], label[None]) for image, label in pairs]).detach()


def infer_labels(gradients: Tensor, num_classes: int, width: int) -> Tensor:
    """Labels (n,) of gradients (n, num_weights).

    The classifier's row c has gradient (p_c - [c is the label]) h. Features h after a sigmoid are positive, so that
    only the label's row sums to less than 0.
    """
    rows = gradients[:, -(num_classes * width + num_classes) : -num_classes]
    return rows.view(len(gradients), num_classes, width).sum(2).argmin(1)


def reconstruct(
    encoder: nn.Module, gradient: Tensor, label: Tensor, start: Tensor, steps: int, keep: int, lr: float = 0.1
) -> Tensor:
    """Images whose gradient is ``gradient`` (num_weights,): the last ``keep`` iterates of L-BFGS.

    Args:
        encoder: the net of the gradient.
        gradient: as a client sent it.
        label: its class, a scalar.
        start: first guess, (3, size, size).
        steps: calls of the optimizer, each of up to 20 iterations.
        keep: maximum number of returned iterates.
        lr: step of L-BFGS.

    Returns:
        (min(keep, steps), 3, size, size) in 0..1; fewer if the search diverges, and at least the start.
    """
    image = start[None].clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([image], lr=lr)

    def mismatch() -> Tensor:
        optimizer.zero_grad()
        distance = (_gradient(encoder, image, label[None], differentiable=True) - gradient).square().sum()
        (image.grad,) = torch.autograd.grad(distance, image)
        return distance.detach()

    iterates = []
    for _ in range(steps):
        optimizer.step(mismatch)
        if not image.isfinite().all():
            break
        iterates.append(image.detach()[0].clone())
    return torch.stack(iterates[-keep:] or [start]).clamp(0, 1)


def _gradient(encoder: nn.Module, image: Tensor, label: Tensor, differentiable: bool = False) -> Tensor:
    loss = F.cross_entropy(encoder(image), label)
    parts = torch.autograd.grad(loss, list(encoder.parameters()), create_graph=differentiable)
    return torch.cat([part.flatten() for part in parts])


class Proxy:
    """GLFC's proxy server; its knowledge is in ``state``, tensors by name.

    ``met`` (num_classes,) is the first task of each class, -1 before it; ``images`` (n, 3, size, size) in 0..1 and
    ``labels`` (n,) are the reconstructed prototypes of task ``task``; ``best`` is the highest accuracy on them so far.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def add_classes(self, class_counts: Iterable[Tensor], task: int) -> Tensor:
        """Record the classes that any client has samples of; returns a copy of ``met``."""
        participants = torch.stack([counts > 0 for counts in class_counts]).any(0)
        met = self.state.get("met", torch.full(participants.shape, -1))
        self.state["met"] = torch.where(participants & (met < 0), task, met)
        return self.state["met"].clone()

    def add_prototypes(self, gradients: Tensor, encoder: PrototypeEncoder, task: int, steps: int, keep: int) -> bool:
        """Reconstruct images from gradients (n, num_weights); the first ones of a task replace the previous task's.

        Returns:
            whether they are the first: the best model of the previous task then becomes all clients' old model.
        """
        is_first = int(self.state.get("task", torch.tensor(-1))) < task
        labels = infer_labels(gradients, encoder.num_classes, encoder.width)
        found = []
        for gradient, label in zip(gradients, labels, strict=True):
            start = torch.rand(3, encoder.size, encoder.size)
            found.append(reconstruct(encoder, gradient, label, start, steps, keep))
        labels = labels.repeat_interleave(torch.tensor([len(images) for images in found]))
        images = torch.cat(found)
        if not is_first:
            images, labels = torch.cat([self.state["images"], images]), torch.cat([self.state["labels"], labels])
        # Accuracies on different images do not compare, so the best score is reset (not so in the released code).
        self.state |= {"images": images, "labels": labels, "task": torch.tensor(task), "best": torch.tensor(-1.0)}
        return is_first

    @torch.no_grad()
    def is_best(self, net: Net) -> bool:
        """Whether ``net`` is at least as accurate as every model of this task; False while there are no images."""
        if "best" not in self.state:
            return False
        net.eval()
        classes = (self.state["met"] >= 0).nonzero().flatten()
        logits = torch.cat([net(images).logits for images in self.state["images"].split(CHUNK)])
        accuracy = (classes[logits[:, classes].argmax(1)] == self.state["labels"]).float().mean()
        if accuracy < self.state["best"]:
            return False
        self.state["best"] = accuracy
        return True


@dataclass(kw_only=True)
class GLFC(FedAvg):
    """Clients keep exemplars and weigh gradients; a proxy selects the model to distil from on reconstructed images."""

    card: ClassVar = MethodCard(
        "CVPR 2022", "2203.11473", "small CNN and head, with exemplars", "all that is trained, gradients of prototypes"
    )

    averages: ClassVar = True
    memory_size: int = 800
    """Exemplars of a client, shared evenly among its old classes (ours: 20 for each of 40; 2000 in the paper)."""
    entropy_rise: float = 1.2
    """r_h in nats: a rise of the mean entropy by more signals a new task."""
    oracle_signal: bool = False
    """Tell clients when a task begins instead of detecting it (ours)."""
    bce_classes: Literal["global_seen", "client_seen"] = "global_seen"
    """Columns of the loss: all classes known to the server (released code), or the client's only (ours)."""
    prototype_size: int = 32
    """Pixels of the images whose gradients are sent."""
    perturbation_steps: int = 50
    """Steps of SGD that change a prototype before its gradient is computed."""
    perturbation_lr: float = 0.2
    """Their learning rate."""
    reconstruction_steps: int = 250
    """Calls of L-BFGS for each prototype at the proxy: nearly all of the server's computation."""
    monitor_images: int = 20
    """Last iterates of each reconstruction that the proxy keeps."""
    proxy: Proxy = field(default_factory=Proxy, init=False, repr=False)
    """Server state."""

    def __post_init__(self) -> None:
        """Refuse a frozen ViT, through which no prototype can be perturbed."""
        super().__post_init__()
        if self.foundation is not None:
            raise ValueError("GLFC does not support `foundation`: set `small_model` instead.")

    def stages(self, client: Client) -> Iterator[Stage]:
        """Train on new data and exemplars; between a signal and the server's shift the teacher is the best model."""
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
            images, labels = perturbed_prototypes(
                client, self._classes(client)[0], self.prototype_size, self.perturbation_steps, self.perturbation_lr
            )
            encoder = PrototypeEncoder(client.data.data.num_classes, self.prototype_size)
            payload[GRADIENTS] = prototype_gradients(encoder, images, labels)
        return outgoing(payload)

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        expected = dict(net.state_dict())
        if GRADIENTS in upload.payload:
            encoder = PrototypeEncoder(len(upload.class_counts), self.prototype_size)
            size = sum(parameter.numel() for parameter in encoder.parameters())
            expected[GRADIENTS] = torch.empty(int((upload.class_counts > 0).sum()), size, device="meta")
        return expected

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """FedAvg's model, and whether the proxy finds it the best of its task so far."""
        model = self.average([replace(upload, payload=without_proxy(upload.payload)) for upload in uploads])
        met = self.proxy.add_classes([upload.class_counts for upload in uploads], progress.task)
        gradients = [upload.payload[GRADIENTS] for upload in uploads if GRADIENTS in upload.payload]
        encoder, is_shift = PrototypeEncoder(len(met), self.prototype_size), False
        if gradients:
            is_shift = self.proxy.add_prototypes(
                torch.cat(gradients), encoder, progress.task, self.reconstruction_steps, self.monitor_images
            )
        net = SmallClassifier(self.small_model, len(met), self.small_image_size)
        net.load_state_dict(model)
        flags = {"shift": torch.tensor(is_shift), "best": torch.tensor(self.proxy.is_best(net))}
        return [model | {PROXY + name: value for name, value in {"met": met, **flags}.items()}] * len(uploads)

    def download(self, client: Client, payload: Payload) -> None:
        """Load the model; at a shift the best of the previous task becomes the teacher until the next shift."""
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
            signal = client.num_synced_rounds == 0
        elif not len(client.train_ids):
            signal = False
        else:
            entropy = mean_entropy(client, self._classes(client)[0])
            signal = bool(entropy - client.memory.get("entropy", 0.0) > self.entropy_rise)
            client.memory["entropy"] = entropy
        client.memory["signal"] = client.memory.get("signal", torch.tensor(False)) | signal
        return signal

    def _classes(self, client: Client) -> tuple[Tensor, Tensor]:
        """Columns of the loss, and those with the old model's targets, without the client's current classes."""
        if self.bce_classes == "client_seen":
            return client.seen, client.old[~torch.isin(client.old, client.classes)]
        met = client.memory.get("met", torch.full((client.data.data.num_classes,), -1)).clone()
        is_old = (met >= 0) & (met < client.task)
        is_old[client.classes], met[client.seen] = False, client.task
        return (met >= 0).nonzero().flatten(), is_old.nonzero().flatten()


def without_proxy(payload: Payload) -> Payload:
    """The model in a payload."""
    return {name: value for name, value in payload.items() if not name.startswith(PROXY)}
