"""Terms of local objectives, as pure functions."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor, labels: Tensor, classes: Tensor | None = None, counts: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy over the columns ``classes`` (sorted) of logits (B, num_classes); over all columns if None.

    Columns are selected, not filled with minus infinity, so that no term can become 0 * inf. With ``counts``
    (num_classes,) of training samples it is the balanced softmax (Ren et al., NeurIPS 2020, arXiv 2007.10740).

    Example:
        >>> cross_entropy(torch.tensor([[9.0, 1.0, 1.0]]), torch.tensor([2]), torch.tensor([1, 2]))
        tensor(0.6931)
    """
    logits = logits.float() if counts is None else logits.float() + counts.clamp(min=1).float().log()
    if classes is not None:
        logits, labels = logits[:, classes], torch.searchsorted(classes, labels)
    return F.cross_entropy(logits, labels, reduction=reduction)


def consistency(current: Tensor, previous: Tensor, chosen: Tensor) -> Tensor:
    """Mean squared distance ``||current - previous||^2`` (Eq. 4) over the ``chosen`` (B,) rows of (B, d); 0 if none."""
    distance = (current.float() - previous.float()).square().sum(1)
    return (distance * chosen).sum() / chosen.sum().clamp(min=1)


def proximal(parameters: Iterable[Tensor], anchors: Iterable[Tensor]) -> Tensor:
    """``||w - w_g||^2 / 2`` summed over all tensors (FedProx)."""
    return torch.stack([(w - anchor).square().sum() for w, anchor in zip(parameters, anchors, strict=True)]).sum() / 2


def consolidation(parameters: Iterable[Tensor], anchors: Iterable[Tensor], fishers: Iterable[Tensor]) -> Tensor:
    """``sum F (w - w*)^2 / 2`` over all tensors (EWC)."""
    terms = [(f * (w - a).square()).sum() for w, a, f in zip(parameters, anchors, fishers, strict=True)]
    return torch.stack(terms).sum() / 2


def knowledge_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over rows of (B, C) logits (LwF)."""
    target = F.log_softmax(teacher.float() / temperature, 1)
    predicted = F.log_softmax(student.float() / temperature, 1)
    return temperature**2 * F.kl_div(predicted, target, reduction="batchmean", log_target=True)


def retention(base: Tensor, anchor: Tensor, gates: Tensor) -> Tensor:
    """``sum_s ||(B - B*) * g_s||^2 / 2`` for a base (rows, ...) and the gates (s, rows) of earlier tasks (FedWeIT).

    With a constant adaptive part A_s, this is ``||B g_s + A_s - theta*_s||^2 / 2`` for theta*_s = B* g_s + A_s.
    """
    drift = (base - anchor).square().flatten(1).sum(1)
    return (drift * gates.square().sum(0)).sum() / 2


def compensation_weights(logits: Tensor, labels: Tensor, is_new: Tensor) -> Tensor:
    """``|sigmoid(z_y) - 1|`` over its mean among samples of the same group, (B,), without gradient (GLFC).

    The groups are new and replayed classes, by ``is_new`` (B,); the mean weight of each is 1. ``logits`` (B, C) have
    the column of every label (B,). All weights of a perfectly fitted group are 1 (ours).
    """
    size = (logits.detach().float().gather(1, labels[:, None])[:, 0].sigmoid() - 1).abs()
    weights = torch.ones_like(size)
    for group in (is_new, ~is_new):
        mean = size[group].mean() if group.any() else size.new_zeros(())
        if mean > 0:
            weights[group] = size[group] / mean
    return weights
