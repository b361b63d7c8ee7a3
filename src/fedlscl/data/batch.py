"""What every loader yields."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Samples with what is needed to recognise them again.

    ``ids`` are positions in the data set: train samples are 0..N-1, test samples continue from N.
    """

    images: Tensor
    """(B, 3, height, width) uint8 in 0..255, as stored: each net resizes and normalises for itself."""
    labels: Tensor
    """(B,) int64."""
    ids: Tensor
    """(B,) int64."""
    prefix: Tensor | None = None
    """Output of the net's frozen part, when the trainer keeps it in a cache."""
    augmented: bool = False
    """Whether the images were changed at random: what is known of the stored ones does not hold for them."""
