"""Which samples Stage 2 replays (Sec. 4.3): those of lowest loss, kept in a buffer, and some of the current task."""

import torch
from torch import Tensor

from fedlscl.data import Buffer
from fedlscl.federated.client import Client
from fedlscl.objectives import sample_losses


@torch.no_grad()
def scored_buffer(client: Client, per_class: int) -> Buffer:
    """B^n: the buffer so far and, of each class of the current task, the samples of lowest loss."""
    ids, labels, losses = [], [], []
    for batch, output in client.infer(client.train_ids):
        ids.append(batch.ids.cpu())
        labels.append(batch.labels.cpu())
        losses.append(sample_losses(output.trained, batch.labels, client.classes.to(batch.labels.device)).cpu())
    if not ids:
        return client.buffer
    return client.buffer.updated(torch.cat(ids), torch.cat(labels), torch.cat(losses), per_class)


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
