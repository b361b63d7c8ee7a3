"""Terms by which a classifier judges images made of noise, as pure functions (TARGET 2303.06937, MFCL 2311.07784).

``statistics`` are rows (mean, variance, running mean, running variance) of a batch at each BatchNorm layer, (channels,)
each.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
Averages = Sequence[tuple[Tensor, Tensor]]

EPSILON = 1e-8
"""Added to variances whose quotient is taken."""


def norm_distance(statistics: Rows, averages: Averages = (), momentum: float = 0.9) -> Tensor:
    """Sum over layers of ``||running var - v|| + ||running mean - m||`` (TARGET's L_BN).

    Where there are ``averages`` (mean, variance) of earlier batches, m and v are ``momentum`` parts of them.
    """
    terms = []
    for number, (mean, variance, running_mean, running_variance) in enumerate(statistics):
        if averages:
            earlier_mean, earlier_variance = averages[number]
            mean = torch.lerp(mean, earlier_mean, momentum)
            variance = torch.lerp(variance, earlier_variance, momentum)
        terms += [torch.linalg.vector_norm(running_variance - variance), torch.linalg.vector_norm(running_mean - mean)]
    return torch.stack(terms).sum()


def updated(averages: Averages, statistics: Rows, momentum: float = 0.9) -> list[tuple[Tensor, Tensor]]:
    """The averages after another batch; a first batch is its own."""
    now = [(mean.detach(), variance.detach()) for mean, variance, *_ in statistics]
    if not averages:
        return now
    return [
        (torch.lerp(m, earlier_m, momentum), torch.lerp(v, earlier_v, momentum))
        for (m, v), (earlier_m, earlier_v) in zip(now, averages, strict=True)
    ]


def norm_divergence(statistics: Rows) -> Tensor:
    """Mean over layers and channels of KL(N(running) || N(batch)) (MFCL's batch-statistics loss)."""
    terms = []
    for mean, variance, running_mean, running_variance in statistics:
        v, r = variance + EPSILON, running_variance + EPSILON
        terms.append(((v / r).log() / 2 + (r + (running_mean - mean).square()) / (2 * v) - 0.5).mean())
    return torch.stack(terms).mean()


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the batch of KL(teacher || student) of logits (B, C), where both name the same class (TARGET's L_adv).

    Example:
        >>> disagreement(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(0.)
    """
    target, answer = teacher.float().log_softmax(1), student.float().log_softmax(1)
    divergence = F.kl_div(answer, target, reduction="none", log_target=True).sum(1)
    return (divergence * (teacher.argmax(1) == student.argmax(1))).mean()


def unevenness(logits: Tensor) -> Tensor:
    """``1 + sum p log p / log C`` of the batch's mean softmax p: 0 where classes are even, 1 for one class (MFCL).

    Example:
        >>> unevenness(torch.tensor([[1e4, 0.0], [0.0, 1e4]])).item()
        0.0
    """
    p = logits.float().softmax(1).mean(0)
    return 1 + torch.special.entr(p).sum().neg() / math.log(max(len(p), 2))


def roughness(images: Tensor) -> Tensor:
    """Mean squared distance of images (B, C, h, w) from their blur: Gaussian, 5 x 5, sigma 1, reflected (MFCL)."""
    steps = torch.arange(-2.0, 3.0, device=images.device)
    line = (-steps.square() / 2).exp()
    kernel = torch.outer(line, line) / line.sum().square()
    weight = kernel.to(images.dtype).expand(images.shape[1], 1, 5, 5)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), weight, groups=images.shape[1])
    return F.mse_loss(images, blurred)
