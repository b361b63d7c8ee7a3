"""GLFC (Dong et al., CVPR 2022, arXiv 2203.11473) on FedAvg: compensation for forgetting at clients and server.

Deviations from the released code, with reasons in docs/methods/glfc.md:
- the proxy reports which of its averages is the best old model instead of sending two models in every round;
- its best score is reset with every task, and the old model is replaced once per task;
- Adam without a schedule; no exemplar is chosen twice; uploads are averaged as in FedAvg here.
"""

from collections.abc import Iterator
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
from fedlscl.federated.payload import Payload, Upload, outgoing, under
from fedlscl.functional.objectives import compensation_weights
from fedlscl.methods.fedavg import FedAvg
from fedlscl.modules import Learner
from fedlscl.nets.net import Frozen, Net, SmallClassifier
from fedlscl.options import Count, NonNegative, Positive, Whole

BEST = "best."
"""Prefix in a client's memory: the best model of the current task."""
PROXY = "proxy."
"""Prefix in a payload: everything that is not the model."""
GRADIENTS = PROXY + "gradients"
CHUNK = 128
"""Images per forward pass of the proxy."""
WEIGHT_DECAY = 1e-5
"""Of the steps that perturb a prototype."""
SEED = 0
"""Seed of the prototype encoder's weights, equal at clients and proxy."""


class CompensationModule(Learner):
    """Gradient compensation and relation distillation (Eq. 2-6): two binary cross-entropies.

    ``columns`` (C,) are the classes of the loss, sorted, with every label. ``new`` are classes of the current task if
    exemplars are replayed; if None, all samples weigh 1. With ``previous``, the old model, both terms have weight 1/2,
    and its predictions are the targets of the part ``old`` of the columns.
    """

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
    label_of, fresh = client.data.data.labels, client.data.train_ids(client.task - 1)
    fresh = fresh[~torch.isin(label_of(fresh), client.buffer.labels)]
    num_classes = len(torch.cat([client.buffer.labels, label_of(fresh)]).unique())
    if not num_classes:
        return client.buffer
    ids, ranks = herded(client, fresh, size // num_classes)
    ids, ranks = torch.cat([client.buffer.ids, ids]), torch.cat([client.buffer.losses, ranks])
    return Buffer.empty().updated(ids, label_of(ids), ranks, per_class=size // num_classes)


def herded(client: Client, ids: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
    """Ids of up to ``per_class`` samples of each class, class by class in herding order, and their rank in it."""
    rows = [F.normalize(output.features.float()).cpu() for _, output in client.infer(ids)]
    labels = client.data.data.labels(ids)
    orders = [ids[:0]]
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        orders.append(ids[members[herding(torch.cat(rows)[members], per_class)]])
    return torch.cat(orders), torch.cat([torch.arange(len(order)) for order in orders])


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


def perturbed_prototypes(client: Client, columns: Tensor, size: int, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """The image nearest to the mean of each class of the task, (n, 3, size, size), and the labels (n,).

    Each is changed by SGD on the net's binary cross-entropy over ``columns``, as the paper hides it.
    """
    chosen, _ = herded(client, client.train_ids, 1)
    batch = client.data.fetch(chosen)
    images = F.interpolate(batch.images.float() / 255, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    targets = (batch.labels[:, None] == columns).float()
    client.net.eval()
    for _ in range(steps):
        images.requires_grad_(True)
        logits = client.net(images.to(client.net.head.weight.device)).logits.cpu()[:, columns]
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum()
        (gradient,) = torch.autograd.grad(loss, images)
        images = (images - lr * (gradient + WEIGHT_DECAY * images)).detach()
    return images, batch.labels


def best_model(client: Client) -> Net | None:
    """The latest model that the proxy reported as best of its task; None before the first."""
    weights = under(BEST, client.memory)
    if not weights:
        return None
    net = deepcopy(client.net).requires_grad_(False).eval()
    net.load_state_dict(weights)
    return net


# Prototypes from gradients (Sec. 3.4) by gradient matching (Zhu et al., NeurIPS 2019, arXiv 1906.08935), which is an
# attack on privacy by construction.


def prototype_encoder(num_classes: int, size: int) -> nn.Sequential:
    """LeNet with sigmoids, random and not trained: images (n, 3, size, size) in 0..1 to logits (n, num_classes)."""
    if size % 4 or size < 4:
        raise ValueError(f"prototype_size must be a positive multiple of 4, got {size}.")
    convolutions = [nn.Conv2d(3, 12, 5, 2, 2), nn.Conv2d(12, 12, 5, 2, 2), nn.Conv2d(12, 12, 5, 1, 2)]
    layers = [layer for convolution in convolutions for layer in (convolution, nn.Sigmoid())]
    encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * (size // 4) ** 2, num_classes))
    generator = torch.Generator().manual_seed(SEED)
    for parameter in encoder.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5, generator)
    return encoder


def prototype_gradient(encoder: nn.Module, image: Tensor, label: Tensor, differentiable: bool = False) -> Tensor:
    """Gradient (num_weights,) of an image's cross-entropy in the encoder's weights; the classifier comes last."""
    loss = F.cross_entropy(encoder(image[None]), label[None])
    parts = torch.autograd.grad(loss, list(encoder.parameters()), create_graph=differentiable)
    return torch.cat([part.flatten() for part in parts])


def infer_labels(encoder: nn.Module, gradients: Tensor) -> Tensor:
    """Labels (n,) of gradients (n, num_weights).

    The classifier's row c has gradient (p_c - [c is the label]) h. Features h after a sigmoid are positive, so that
    only the label's row sums to less than 0.
    """
    *_, weight, bias = encoder.parameters()
    rows = gradients[:, : -len(bias)][:, -weight.numel() :]
    return rows.unflatten(1, weight.shape).sum(2).argmin(1)


def reconstruct(
    encoder: nn.Module, gradient: Tensor, label: Tensor, start: Tensor, steps: int, keep: int, lr: float = 0.1
) -> Tensor:
    """The last ``keep`` of ``steps`` iterates towards an image with this gradient (num_weights,) and label ().

    L-BFGS from ``start`` (3, size, size), each step of up to 20 iterations; the result is (n, 3, size, size) in 0..1,
    fewer than ``keep`` if the search diverges, and at least the start.
    """
    image = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([image], lr=lr)

    def mismatch() -> Tensor:
        distance = (prototype_gradient(encoder, image, label, differentiable=True) - gradient).square().sum()
        (image.grad,) = torch.autograd.grad(distance, image)
        return distance.detach()

    iterates = []
    for _ in range(steps):
        optimizer.step(mismatch)
        if not image.isfinite().all():
            break
        iterates.append(image.detach().clone())
    return torch.stack(iterates[-keep:] or [start]).clamp(0, 1)


@dataclass(kw_only=True)
class GLFC(FedAvg):
    """Clients keep exemplars and weigh gradients; a proxy selects the model to distil from on reconstructed images."""

    supports_foundation: ClassVar = False
    card: ClassVar = MethodCard(
        "CVPR 2022", "2203.11473", "small CNN and head, with exemplars", "all that is trained, gradients of prototypes"
    )
    averages: ClassVar = True
    memory_size: Count = 800
    """Exemplars of a client, shared evenly among its old classes (ours: 20 for each of 40; 2000 in the paper)."""
    entropy_rise: NonNegative = 1.2
    """r_h in nats: a rise of the mean entropy by more signals a new task."""
    oracle_signal: bool = False
    """Tell clients when a task begins instead of detecting it (ours)."""
    bce_classes: Literal["global_seen", "client_seen"] = "global_seen"
    """Columns of the loss: all classes known to the server (released code), or the client's only (ours)."""
    prototype_size: Count = 32
    """Pixels of the images whose gradients are sent."""
    perturbation_steps: Whole = 50
    """Steps of SGD that change a prototype before its gradient is computed."""
    perturbation_lr: Positive = 0.2
    """Their learning rate."""
    reconstruction_steps: Whole = 250
    """Calls of L-BFGS for each prototype at the proxy: nearly all of the server's computation."""
    monitor_images: Count = 20
    """Last iterates of each reconstruction that the proxy keeps."""
    proxy: Payload = field(default_factory=dict, init=False, repr=False)
    """What the proxy knows: ``met`` (num_classes,) is the first task of each class or -1; ``images`` (n, 3, size, size)
    in 0..1 and ``labels`` (n,) are the prototypes reconstructed in ``task``, ``best`` the highest accuracy on them."""

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
            encoder = prototype_encoder(client.data.data.num_classes, self.prototype_size)
            pairs = zip(images, labels, strict=True)
            payload[GRADIENTS] = torch.stack([prototype_gradient(encoder, image, label) for image, label in pairs])
        return outgoing(payload)

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        expected = dict(net.state_dict())
        if GRADIENTS in upload.payload:
            encoder = prototype_encoder(len(upload.class_counts), self.prototype_size)
            size = sum(parameter.numel() for parameter in encoder.parameters())
            expected[GRADIENTS] = torch.empty(int((upload.class_counts > 0).sum()), size, device="meta")
        return expected

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """FedAvg's model, and whether the proxy finds it the best of its task so far."""
        model = self.average([replace(upload, payload=without_proxy(upload.payload)) for upload in uploads])
        present = torch.stack([upload.class_counts > 0 for upload in uploads]).any(0)
        met = self.proxy.get("met", torch.full(present.shape, -1))
        self.proxy["met"] = met = torch.where(present & (met < 0), progress.task, met)
        gradients = [upload.payload[GRADIENTS] for upload in uploads if GRADIENTS in upload.payload]
        is_shift = bool(gradients) and self._reconstruct(torch.cat(gradients), progress.task)
        net = SmallClassifier(self.small_model, len(met), self.small_image_size)
        net.load_state_dict(model)
        answer = {"met": met, "shift": torch.tensor(is_shift), "best": torch.tensor(self._is_best(net))}
        return [model | {PROXY + name: value for name, value in answer.items()}] * len(uploads)

    def _reconstruct(self, gradients: Tensor, task: int) -> bool:
        """Add the images of gradients (n, num_weights) to the proxy's; the first of a task replace the last task's.

        Returns whether they are the first: the last task's best model then becomes all clients' old model.
        """
        encoder = prototype_encoder(len(self.proxy["met"]), self.prototype_size)
        is_first = int(self.proxy.get("task", -1)) < task
        labels, found = infer_labels(encoder, gradients), []
        for gradient, label in zip(gradients, labels, strict=True):
            start = torch.rand(3, self.prototype_size, self.prototype_size)
            found.append(reconstruct(encoder, gradient, label, start, self.reconstruction_steps, self.monitor_images))
        labels = labels.repeat_interleave(torch.tensor([len(images) for images in found]))
        if not is_first:
            found, labels = [self.proxy["images"], *found], torch.cat([self.proxy["labels"], labels])
        # Accuracies on different images do not compare, so the best score is reset (not so in the released code).
        self.proxy |= {"images": torch.cat(found), "labels": labels}
        self.proxy |= {"task": torch.tensor(task), "best": torch.tensor(-1.0)}
        return is_first

    @torch.no_grad()
    def _is_best(self, net: Net) -> bool:
        """Whether ``net`` is at least as accurate as every model of this task; False while there are no images."""
        if "best" not in self.proxy:
            return False
        net.eval()
        classes = (self.proxy["met"] >= 0).nonzero().flatten()
        logits = torch.cat([net(images).logits for images in self.proxy["images"].split(CHUNK)])
        accuracy = (classes[logits[:, classes].argmax(1)] == self.proxy["labels"]).float().mean()
        is_best = bool(accuracy >= self.proxy["best"])
        self.proxy["best"] = torch.maximum(accuracy, self.proxy["best"])
        return is_best

    def download(self, client: Client, payload: Payload) -> None:
        """Load the model; at a shift the best of the previous task becomes the teacher until the next shift."""
        model = without_proxy(payload)
        client.net.load_state_dict(model)
        if payload[PROXY + "shift"]:
            client.previous = best_model(client)
        if payload[PROXY + "best"]:
            client.memory |= {BEST + name: value for name, value in model.items()}
        client.memory |= {"met": payload[PROXY + "met"], "signal": torch.tensor(False)}

    def _detect(self, client: Client) -> bool:
        signal = self.oracle_signal and client.num_synced_rounds == 0
        if not self.oracle_signal and len(client.train_ids):
            outputs, columns = client.infer(client.train_ids), self._classes(client)[0]
            logits = torch.cat([output.logits.float().cpu()[:, columns] for _, output in outputs])
            entropy = torch.distributions.Categorical(logits=logits).entropy().mean()  # in nats
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
