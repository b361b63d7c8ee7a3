"""Second moments and Gram matrices are symmetric and positive semidefinite; what a client sends as one may not be."""

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""Of the trace: what rounding to float32 may move an eigenvalue."""


def is_semidefinite(matrix: Tensor) -> bool:
    """Whether a matrix (d, d) is a sum of outer products x x^T, up to rounding.

    Example:
        >>> is_semidefinite(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        True
        >>> is_semidefinite(torch.tensor([[1.0, 1.1], [1.1, 1.0]]))
        False
    """
    double = matrix.double()
    allowed = float(TOLERANCE * double.diagonal().sum())
    if not double.any():
        return True
    if not 0 < allowed < float("inf") or float((double - double.mT).abs().max()) > allowed:
        return False
    lifted = double + allowed * torch.eye(len(double), dtype=torch.float64)
    return int(torch.linalg.cholesky_ex(lifted).info) == 0
