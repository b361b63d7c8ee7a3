"""What a second moment says about the features that it was made of."""

import scipy.linalg
import torch
from torch import Tensor

NEGLIGIBLE = 1e-6
"""Share of the trace below which an eigenvalue is rounding of float32."""


def guesses(moment: Tensor, directions: int) -> Tensor:
    """Unit vectors (k, feature_dim) that may be features behind C (p, p), the mean of e e^T with e = [E; 1].

    The last column of C is the mean of E. From there both ways along each principal direction, up to unit length: with
    one sample the mean is the feature, with two the ends are both of them.
    """
    moment = moment.double()
    mean = moment[:-1, -1] / moment[-1, -1].clamp(min=NEGLIGIBLE)
    values, vectors = largest(moment[:-1, :-1] - torch.outer(mean, mean), directions)
    vectors = vectors[values > NEGLIGIBLE * moment.trace()]  # (k, feature_dim)
    along = vectors @ mean
    reach = (along.square() + 1 - mean @ mean).clamp(min=0).sqrt()
    ends = [mean + (sign * reach - along)[:, None] * vectors for sign in (1, -1)]
    found = torch.cat([mean[None], leading(moment)[None], *ends])
    return torch.nn.functional.normalize(found).float()


def leading(moment: Tensor) -> Tensor:
    """The largest eigenvector without its last number, whose sign is made positive: of one sample again the feature.

    It looks at all of C, so that noise reaches it less than a column.
    """
    vector = largest(moment, 1)[1][0]
    return vector[:-1] * torch.sign(vector[-1])


def largest(matrix: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix (p, p) in float64, falling, and their vectors as rows."""
    size = len(matrix)
    if not number:
        return matrix.new_zeros(0), matrix.new_zeros(0, size)
    values, vectors = scipy.linalg.eigh(matrix.numpy(), subset_by_index=[max(0, size - number), size - 1])
    return torch.from_numpy(values.copy()).flip(0), torch.from_numpy(vectors.T.copy()).flip(0)


def closest(found: Tensor, wanted: Tensor) -> Tensor:
    """Largest cosine of each wanted row (n, d) with any found row (k, d): (n,).

    Example:
        >>> closest(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([1., 0.])
    """
    rows = torch.nn.functional.normalize(found)
    return (torch.nn.functional.normalize(wanted) @ rows.mT).max(1).values
