"""Fig. 3: which block of the frozen ViT is adapted.

python benchmarks/blocks.py --preset cpu --data_root DATA
"""

import argparse
import sys

from presets import Run, variant
from sweep import drive

BLOCKS = (0, 3, 6, 9, 11)
"""Counted from 0."""


def experiments(options: argparse.Namespace) -> dict[str, list[Run]]:
    """A row for each block."""
    return {"blocks": [variant(f"block{value}", options, collaborator__blocks=[value]) for value in BLOCKS]}


if __name__ == "__main__":
    sys.exit(drive("Fig. 3: which block of the frozen ViT is adapted.", experiments))
