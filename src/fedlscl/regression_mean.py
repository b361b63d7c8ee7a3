"""RegMean (Jin et al., ICLR 2023, arXiv 2212.09849): linear maps merged in closed form from the Grams of their inputs.

A Gram G = X X^T is a matrix (d, d), or its diagonal alone, (d,).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-6
"""Ridge of the merge, relative to the mean eigenvalue of the summed Grams (ours): float32 sums are no more exact."""


def regression_mean(weights: Sequence[Tensor], grams: Sequence[Tensor], epsilon: float = EPSILON) -> Tensor:
    """The map W that minimises ``sum_i ||(W - W_i) X_i||^2`` for maps W_i (out, d), with G_i = X_i X_i^T.

    Solved in float64 around the plain mean M: W = M + (sum_i (W_i - M) G_i) (sum_i G_i + e I)^-1, so that directions
    in which nobody has inputs keep the mean; the pseudo-inverse would delete what all clients agree on there.

    Example:
        >>> regression_mean([torch.tensor([[1.0, 1.0]]), torch.tensor([[5.0, 3.0]])],
        ...                 [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])], epsilon=1e-9)
        tensor([[2., 2.]])
    """
    stacked = torch.stack([weight.double() for weight in weights])
    mean = stacked.mean(0)
    total = torch.stack([gram.double() for gram in grams]).sum(0)
    moved = torch.stack([_times(w - mean, gram.double()) for w, gram in zip(stacked, grams, strict=True)]).sum(0)
    ridge = epsilon * diagonal(total).mean() + torch.finfo(torch.float64).tiny
    if total.dim() == 1:
        step = moved / (total + ridge)
    else:
        step = torch.linalg.solve(total + ridge * torch.eye(len(total), dtype=total.dtype), moved, left=False)
    return (mean + step).to(weights[0].dtype)


def shares(grams: Tensor, epsilon: float = EPSILON) -> Tensor:
    """What each of several maps counts for, input by input, in their regression mean with diagonal Grams (n, d).

    ``sum_i W_i * shares[i]`` is ``regression_mean``; each column sums to one.

    Example:
        >>> shares(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        tensor([[0.7500, 0.5000],
                [0.2500, 0.5000]])
    """
    double = grams.double()
    ridge = epsilon * double.sum(0).mean() + torch.finfo(torch.float64).tiny
    return ((double + ridge / len(double)) / (double.sum(0) + ridge)).to(grams.dtype)


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """Shrink to alpha G + (1 - alpha) diag(G) for a Gram (d, d); a diagonal stays as it is."""
    return gram if gram.dim() == 1 else alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())


def project(gram: Tensor, down: Tensor) -> Tensor:
    """A G A^T (rank, rank): the Gram of what a reading factor A (rank, d) makes of the inputs."""
    projected = _times(down.double(), gram.double()) @ down.double().mT
    return ((projected + projected.mT) / 2).to(gram.dtype)


def diagonal(gram: Tensor) -> Tensor:
    """The diagonal (d,) of a Gram in either form."""
    return gram if gram.dim() == 1 else gram.diagonal()


def pack(gram: Tensor) -> Tensor:
    """A Gram as one row: its diagonal as it is, or the upper triangle of a matrix."""
    return gram if gram.dim() == 1 else gram[tuple(torch.triu_indices(*gram.shape))]


def packed_size(size: int) -> int:
    """Length of the row that a whole Gram of ``size`` inputs makes."""
    return size * (size + 1) // 2


def unpack(values: Tensor, size: int) -> Tensor:
    """The Gram of ``size`` inputs that ``pack`` made a row of.

    Example:
        >>> unpack(pack(torch.tensor([[1.0, 2.0], [2.0, 3.0]])), 2)
        tensor([[1., 2.],
                [2., 3.]])
    """
    if len(values) == size:
        return values
    gram = values.new_zeros(size, size)
    rows, columns = torch.triu_indices(size, size)
    gram[rows, columns] = values
    gram[columns, rows] = values
    return gram


@contextmanager
def input_grams(layers: Mapping[str, Any], full: Collection[str] = ()) -> Iterator[dict[str, Tensor]]:
    """Sum up x^T x over all rows that enter each layer while the context is open, in float32 in any precision.

    Args:
        layers: with a ``weight`` (out, d), by name.
        full: names of layers whose whole Gram (d, d) is wanted; the others give its diagonal (d,).
    """
    sums = {
        name: layer.weight.new_zeros((layer.weight.shape[1],) * (1 + (name in full))) for name, layer in layers.items()
    }

    def collect(name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            gram = rows.mT @ rows if name in full else rows.square().sum(0)
        sums[name] = sums[name].to(x.device) + gram

    def hook(name: str) -> Any:
        return lambda layer, inputs, output: collect(name, inputs[0])

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _times(weight: Tensor, gram: Tensor) -> Tensor:
    return weight * gram if gram.dim() == 1 else weight @ gram
