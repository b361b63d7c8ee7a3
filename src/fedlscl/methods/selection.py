"""Which samples Stage 2 replays (Sec. 4.3): those of lowest loss, kept in a buffer, and some of the current task."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlscl.analytic import MomentSums, added, moment_sums
from fedlscl.data import Buffer
from fedlscl.distillation import second_moment
from fedlscl.federated.client import Client
from fedlscl.nets.collaborator import HEADS
from fedlscl.objectives import sample_losses


class Survey(NamedTuple):
    """What one pass of the client's net over its task's samples tells."""

    buffer: Buffer
    """B^n: the buffer so far and, of each class of the current task, the samples of lowest loss."""
    sums: dict[str, MomentSums]
    """Behind each analytic head that was asked for; none for a client without samples."""


def scored_buffer(client: Client, per_class: int) -> Buffer:
    """B^n as the net is now."""
    return survey(client, per_class).buffer


@torch.no_grad()
def survey(client: Client, per_class: int, heads: Sequence[str] = ()) -> Survey:
    """Score the task's samples, and sum up what the given heads read of them."""
    ids, labels, losses = [], [], []
    sums: dict[str, MomentSums] = {}
    for batch, output in client.infer(client.train_ids):
        ids.append(batch.ids.cpu())
        labels.append(batch.labels.cpu())
        losses.append(sample_losses(output.trained, batch.labels, client.classes.to(batch.labels.device)).cpu())
        for head in heads:
            part = moment_sums(getattr(output, HEADS[head]), batch.labels, output.logits.shape[1])
            sums[head] = added(sums[head], part) if head in sums else part
    if not ids:
        return Survey(client.buffer, sums)
    return Survey(client.buffer.updated(torch.cat(ids), torch.cat(labels), torch.cat(losses), per_class), sums)


def feature_moment(client: Client, ids: Tensor) -> Tensor:
    """C_i of the samples' features; of the task's where there are none, and zero of a client without data (ours)."""
    ids = ids if len(ids) else client.train_ids
    if not len(ids):
        size = len(client.net.generator.matrix)
        return torch.zeros(size, size, dtype=torch.float64)
    return second_moment(torch.cat([e for _, (e, _) in client.infer(ids, part=client.net.generate)]))


def predecessor_features(client: Client) -> Tensor:
    """E' of the buffer's samples, (n, feature_dim), on the host: the predecessor stays as it is for a whole task.

    W' = phi'(E') is one product away and would be some thousand numbers per sample.
    """
    net = client.previous
    found = [e.float().cpu() for _, e in client.engine.infer(net, client.data, client.buffer.ids, part=net.embed)]
    return torch.cat(found) if found else torch.empty(0, net.config.feature_dim)


def draw_per_class(client: Client, per_class: int) -> Tensor:
    """Ids of up to ``per_class`` random training samples of each class of the current task."""
    ids = client.train_ids[torch.randperm(len(client.train_ids))]
    labels = client.data.data.labels(ids)
    return torch.cat([ids[labels == label][:per_class] for label in client.classes])
