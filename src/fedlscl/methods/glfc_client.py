"""What a client of GLFC finds out by itself: exemplars, a prototype of each class, and whether a new task has come."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.data import Buffer
from fedlscl.federated.client import Client
from fedlscl.herding import herding
from fedlscl.inversion import perturbed
from fedlscl.nets.net import Net

BEST = "best."
"""Prefix in a client's memory: the best model of the current task."""


def extended_memory(client: Client, size: int) -> Buffer:
    """The client's exemplars and, for the classes of the task before, as many new ones; every class has equally many.

    They are chosen by herding in the features of the net as it is. A class keeps the beginning of its order.
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
    """Ids of up to ``per_class`` samples of each class, class by class in herding order, and their place in it."""
    rows = [F.normalize(output.features.float()).cpu() for _, output in client.infer(ids)]
    labels = client.data.data.labels(ids)
    chosen, ranks = [ids[:0]], [ids[:0]]
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = herding(torch.cat(rows)[members], per_class)
        chosen.append(ids[members[order]])
        ranks.append(torch.arange(len(order)))
    return torch.cat(chosen), torch.cat(ranks)


@torch.no_grad()
def mean_entropy(client: Client, columns: Tensor) -> Tensor:
    """Mean entropy in nats of the net's softmax over ``columns`` on the current task's training samples, a scalar."""
    logits = torch.cat([output.trained.float().cpu()[:, columns] for _, output in client.infer(client.train_ids)])
    return torch.distributions.Categorical(logits=logits).entropy().mean()


def perturbed_prototypes(client: Client, columns: Tensor, size: int, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """Of each class of the task the image nearest to the mean, (n, 3, size, size) in 0..1, and the labels (n,).

    Each is changed by SGD so that the net's binary cross-entropy over ``columns`` falls, as the paper hides it.
    """
    chosen, _ = herded(client, client.train_ids, 1)
    batch = client.data.fetch(chosen)
    images = F.interpolate(batch.images.float() / 255, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    targets = (batch.labels[:, None] == columns).float()

    def loss(images: Tensor) -> Tensor:
        logits = client.net(images.to(client.net.head.weight.device)).trained.cpu()[:, columns]
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum()

    client.net.eval()
    return perturbed(images, loss, steps, lr), batch.labels


def best_model(client: Client) -> Net | None:
    """The best model of the task that the proxy has named last, if it has."""
    weights = {name.removeprefix(BEST): value for name, value in client.memory.items() if name.startswith(BEST)}
    if not weights:
        return None
    net = deepcopy(client.net).requires_grad_(False).eval()
    net.load_state_dict(weights)
    return net
