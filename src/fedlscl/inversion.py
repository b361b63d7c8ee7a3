"""Images from gradients: what GLFC's clients send about a prototype, and how its proxy turns that into an image again.

Gradient matching is that of Zhu et al., NeurIPS 2019, arXiv 1906.08935. It is an attack on privacy by construction.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def perturbed(
    images: Tensor, loss: Callable[[Tensor], Tensor], steps: int, lr: float, weight_decay: float = 1e-5
) -> Tensor:
    """Images after ``steps`` of SGD on ``loss(images)``, each by itself where the loss is a sum over images."""
    images = images.clone()
    for _ in range(steps):
        images.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(images), images)
        images = (images - lr * (gradient + weight_decay * images)).detach()
    return images


def prototype_gradients(encoder: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each image's cross-entropy in the encoder's weights, (n, num_weights); the classifier comes last."""
    return torch.stack(
        [_gradient(encoder, image[None], label[None]) for image, label in zip(images, labels, strict=True)]
    ).detach()


def infer_labels(gradients: Tensor, num_classes: int, width: int) -> Tensor:
    """Labels (n,) that gradients (n, num_weights) betray.

    The classifier's row c has gradient (p_c - [c is the label]) h. Features h behind a sigmoid are positive, so that
    only the label's row sums to less than 0.
    """
    rows = gradients[:, -(num_classes * width + num_classes) : -num_classes]
    return rows.view(len(gradients), num_classes, width).sum(2).argmin(1)


def reconstruct(
    encoder: nn.Module, gradient: Tensor, label: Tensor, start: Tensor, steps: int, keep: int, lr: float = 0.1
) -> Tensor:
    """Images whose gradient is ``gradient`` (num_weights,): the last ``keep`` iterates of L-BFGS.

    Args:
        encoder: the net that the gradient is of.
        gradient: what a client sent.
        label: its class, a scalar.
        start: first guess, (3, size, size).
        steps: calls of the optimizer, each of up to 20 iterations.
        keep: the most iterates returned.
        lr: step of L-BFGS.

    Returns:
        (min(keep, steps), 3, size, size) in 0..1; fewer where the search breaks down, and at least the start.
    """
    image = start[None].clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([image], lr=lr)

    def mismatch() -> Tensor:
        optimizer.zero_grad()
        distance = (_gradient(encoder, image, label[None], differentiable=True) - gradient).square().sum()
        (image.grad,) = torch.autograd.grad(distance, image)
        return distance.detach()

    iterates = [start]
    for _ in range(steps):
        optimizer.step(mismatch)
        if not image.isfinite().all():
            break
        iterates.append(image.detach()[0].clone())
    return torch.stack(iterates[1:][-keep:] or iterates).clamp(0, 1)


def _gradient(encoder: nn.Module, image: Tensor, label: Tensor, differentiable: bool = False) -> Tensor:
    loss = F.cross_entropy(encoder(image), label)
    parts = torch.autograd.grad(loss, list(encoder.parameters()), create_graph=differentiable)
    return torch.cat([part.flatten() for part in parts])
